"""The parts that train at stage 3: where gradients and states of sharded parameters rest, and what connects them.

::

    ranks  weights      gradients                                    states, and who updates them
    1      device       device                    LoneGrads          as at stage 2
    1      host         device, or host if large  LoneGrads          device, or host and streamed through the device
    1      host         host                      LoneGrads          host, "step_on": "host": a host thread
    N      device       device                    ShardedGrads       as for 1
    N      host         device, if small enough   ShardedGrads       device, or host and streamed through the device
    N      host         host                      ShardedGrads       host, otherwise or with "step_on": "host"
    any    either       as above                  as above           "both": streamed through the device, and the host
    any    either       where weights are         either             NVMe, "device": "nvme": host cores

Whole parameters, which are small, go the way of stage 1 with states on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_zero_plugin.config.settings import EngineSettings
from hf_zero_plugin.engine import assembly, initial_values, state_homes
from hf_zero_plugin.engine.assembly import Chosen
from hf_zero_plugin.engine.buckets import BucketLayout, Piece, Slot, cut_pieces, cut_whole_parameters
from hf_zero_plugin.engine.client_home import ClientHome
from hf_zero_plugin.engine.device_home import DeviceHome
from hf_zero_plugin.engine.device_memory import capacity_bytes
from hf_zero_plugin.engine.flat import FlatWeights
from hf_zero_plugin.engine.gradients import ReduceOptions
from hf_zero_plugin.engine.lone_grads import LoneGrads
from hf_zero_plugin.engine.master_weights import Context, Home, MasterWeights
from hf_zero_plugin.engine.offload_host import HostHome
from hf_zero_plugin.engine.offload_nvme import NvmeHome
from hf_zero_plugin.engine.optimizers import TorchRule, UpdateRule
from hf_zero_plugin.engine.parts import Assembly
from hf_zero_plugin.engine.readiness import Doors
from hf_zero_plugin.engine.resident_grads import ResidentGrads
from hf_zero_plugin.engine.sharded_grads import ShardedGrads, Stage3Grads
from hf_zero_plugin.engine.sharding import Sharding
from hf_zero_plugin.engine.state_file import refuse_directory
from hf_zero_plugin.engine.unit_transfers import UnitTransfers

__all__ = ["Plan", "connect_training", "refuse_impossible_states"]


class Plan(NamedTuple):
    """What goes where. Layouts of whole parameters come first, and so do their indices."""

    whole: list[BucketLayout]
    sharded: list[BucketLayout]
    frozen: list[BucketLayout]
    """Storage of sharded parameters that are not trained; numbered apart, like their indices."""
    names: list[str]
    """By index in ``whole`` and ``sharded``."""
    frozen_names: list[str]

    @property
    def places(self) -> dict[str, tuple[BucketLayout, Slot, bool]]:
        """Sharded parameter -> (layout, slot, whether it is trained)."""
        trained = {self.names[s.spec.index]: (layout, s, True) for layout in self.sharded for s in layout.slots}
        rest = {self.frozen_names[s.spec.index]: (layout, s, False) for layout in self.frozen for s in layout.slots}
        return {**trained, **rest}


def connect_training(
    parts: Assembly,
    settings: EngineSettings,
    plan: Plan,
    flats: Sequence[Tensor],
    home: torch.device,
    chosen: Chosen,
    group: dist.ProcessGroup | None,
) -> None:
    """Connect gradients, masters and doors; masters of sharded parameters are what their weights are now."""
    assert parts.shards is not None and parts.optimizer is not None
    rule, _, client = chosen
    by_name = dict(parts.module.named_parameters())
    parts.params = [by_name[name] for name in plan.names]
    parts.layouts = [*plan.whole, *plan.sharded]
    parts.gather_group = group
    parts.weights = FlatWeights(parts.layouts, parts.params, parts.device)
    exact = initial_values.adopt_weights(parts.weights, plan.whole, parts.sharding, group)
    parts.weights.flats += flats
    streams = _streams(parts, settings, rule, client, home, flats, group)
    parts.grads = _make_grads(parts, settings, plan, flats, group, streams)
    homes = _make_homes(parts, settings, plan, home, rule, client, streams)
    parts.masters = MasterWeights(homes, parts.grads, len(parts.layouts))
    num_whole = len(plan.whole)
    for owner, index, piece in parts.masters.pieces():
        if piece.bucket < num_whole:
            owner.set_master(index, exact(piece))
        else:
            weight = owner.context.weight_of(piece)
            is_master = weight.dtype == torch.float32 and weight.device == owner.context.device
            place = torch.device("cpu") if owner.is_on_host else owner.context.device
            owner.set_master(index, weight if is_master else weight.to(place, torch.float32))
    parts.doors = Doors(parts.module, plan.whole, parts.params)
    parts.doors.guard(parts.masters)
    buckets = {plan.names[slot.spec.index]: layout.index for layout in plan.sharded for slot in layout.slots}
    sharded = parts.grads.sharded
    if isinstance(sharded, LoneGrads):
        parts.shards.transfers = UnitTransfers(parts.shards, parts.masters, buckets, sharded.take)
    else:
        assembly.prefetch_states(parts)
        parts.shards.guard(parts.masters, buckets)


def refuse_impossible_states(settings: EngineSettings, chosen: Chosen, sharding: Sharding) -> None:
    """States that ``connect_training`` has no way to make: found out before the model's weights are taken apart."""
    state_homes.state_types(settings, chosen.rule, chosen.client)
    if settings.offload_optimizer.device == "nvme":
        state_homes.refuse_own_states_on_nvme(chosen.rule, chosen.client)
        refuse_directory(settings.offload_optimizer.nvme_path or "")
    if chosen.client is not None or not chosen.rule.elementwise:
        state_homes.refuse_cut_parameters(chosen.rule, chosen.client, sharding)


def _make_grads(
    parts: Assembly,
    settings: EngineSettings,
    plan: Plan,
    flats: Sequence[Tensor],
    group: dist.ProcessGroup | None,
    streams: bool,
) -> Stage3Grads:
    assert parts.weights is not None and parts.shards is not None
    sharding = parts.sharding
    accumulate_fp32 = assembly.accumulates_in_fp32(settings)
    num_whole = sum(len(layout.slots) for layout in plan.whole)
    whole = None
    if plan.whole:
        whole = ResidentGrads(
            plan.whole,
            parts.params[:num_whole],
            sharding,
            ReduceOptions(sharding.world_size, op=settings.gradient_allreduce_op),
            group=group,
            overlap=False,  # after FSDP2's collectives, which ranks may reach in another order
            flats=parts.weights.flats[: len(plan.whole)],
            accumulate_fp32=accumulate_fp32,
        )
    # FSDP2 takes the mean.
    factor = float(sharding.world_size) if settings.gradient_allreduce_op == "sum" else 1.0
    if sharding.world_size > 1:
        sharded = ShardedGrads(
            plan.sharded,
            parts.params,
            sharding,
            flats,
            device=parts.device,
            accumulate_fp32=accumulate_fp32,
            factor=factor,
            kept=parts.shards.params if streams else (),
        )
        return Stage3Grads(whole, sharded)
    num_bytes = _grad_bytes(settings, flats)
    is_offloaded = bool(flats) and flats[0].device != parts.device
    lone = LoneGrads(
        plan.sharded,
        sharding,
        flats,
        device=parts.device,
        on_host=is_offloaded and not (streams and _fits_device(num_bytes, parts.device)),
        accumulate_fp32=accumulate_fp32,
        pin_memory=settings.offload_param.pin_memory,
    )
    return Stage3Grads(whole, lone)


DEVICE_SHARE = 0.25
"""Gradients of offloaded weights stay on the device if they take no more than this share of it: two bytes a parameter
there save two of host memory and two on the link, each way."""


def _grad_bytes(settings: EngineSettings, flats: Sequence[Tensor]) -> int:
    return sum(flat.numel() * (4 if assembly.sums_in_fp32(settings) else flat.element_size()) for flat in flats)


def _fits_device(num_bytes: int, device: torch.device) -> bool:
    return num_bytes <= DEVICE_SHARE * capacity_bytes(device)


def _streams(
    parts: Assembly,
    settings: EngineSettings,
    rule: UpdateRule,
    client: Any,
    home: torch.device,
    flats: Sequence[Tensor],
    group: dist.ProcessGroup | None,
) -> bool:
    """Whether offloaded weights are updated on the device, which their states live on or pass through.

    With several ranks that is so if it is asked for or the states are offloaded as well, and if the gradients of every
    rank's part fit there: ranks must agree, since a step that overflows is skipped on the device in one case, with all
    its collectives, and on the host in the other.
    """
    can = (
        home != parts.device
        and parts.device.type == "cuda"
        and client is None
        and rule.elementwise
        and not isinstance(rule, TorchRule)
        and settings.offload_optimizer.step_on != "host"
        and settings.offload_optimizer.device != "nvme"
    )
    if parts.sharding.world_size == 1 or not can:
        return can
    if settings.offload_optimizer.step_on != "device" and settings.offload_optimizer.device == "none":
        return False  # states of which nobody knows that they fit
    fits = torch.tensor(int(_fits_device(_grad_bytes(settings, flats), parts.device)), device=parts.device)
    dist.all_reduce(fits, dist.ReduceOp.MIN, group)
    return bool(fits)


def _make_homes(
    parts: Assembly,
    settings: EngineSettings,
    plan: Plan,
    home: torch.device,
    rule: UpdateRule,
    client: torch.optim.Optimizer | None,
    streams: bool,
) -> list[Home]:
    """States of whole parameters stay on the device: they are few, and gathered on the main thread.

    States of offloaded parameters are updated on the device if ``streams``, wherever they rest; otherwise they rest
    where the parameters are, and are updated there.
    """
    assert parts.weights is not None and parts.grads is not None and parts.optimizer is not None
    whole = Context(
        rule=rule,
        weights=parts.weights.flats,
        grads=parts.grads,
        finish_bucket=lambda bucket, owner: assembly.finish_bucket(parts, bucket, owner),
        device=parts.device,
        is_alone=parts.sharding.world_size == 1,
        groups=parts.optimizer.param_groups,
        types=state_homes.state_types(settings, rule, client),
        sums_in_fp32=assembly.sums_in_fp32(settings),
    )
    sharded = whole._replace(finish_bucket=lambda bucket, owner: None, device=home, is_alone=True)
    offload = settings.offload_optimizer
    if client is not None:
        pieces = [piece for layout in parts.layouts for piece in cut_whole_parameters(layout)]
        indices = [slot.spec.index for layout in parts.layouts for slot in layout.slots]
        states = torch.device("cpu") if offload.device == "cpu" else home
        return [ClientHome(sharded, pieces, client, parts.params, indices, states)]
    device_home = DeviceHome(whole, list(_cut(plan.whole, rule, parts)))
    if home == parts.device:
        return [device_home, *state_homes.make_homes(parts, settings, sharded, None, plan.sharded)]
    if streams:
        on_device = sharded._replace(device=parts.device)
        return [device_home, *state_homes.make_homes(parts, settings, on_device, None, plan.sharded)]
    _tell_what_does_not_apply(parts, settings)
    threaded = state_homes.is_threaded(offload, parts.device)
    if offload.device == "nvme":
        cut = list(_cut(plan.sharded, rule, parts, state_homes.STREAM_PIECE_NUMEL))
        return [device_home, NvmeHome(sharded, cut, offload, settings.aio, threaded=threaded)]
    pieces, share = list(_cut(plan.sharded, rule, parts)), offload.host_threads_share
    return [device_home, HostHome(sharded, pieces, pin_memory=False, threaded=threaded, threads_share=share)]


def _tell_what_does_not_apply(parts: Assembly, settings: EngineSettings) -> None:
    """Keys that would act if states streamed through the device, where several ranks update weights on their hosts."""
    offload = settings.offload_optimizer
    if parts.device.type != "cuda" or parts.sharding.rank or offload.device != "cpu":
        return
    why = "a rank's gradients take more than a quarter of its GPU, or the optimizer's states cannot be streamed"
    if offload.step_on == "host":
        why = 'with offload_param and "step_on": "host" that is so'
    state_homes.tell_that_states_stay_on_the_host(offload, why)


def _cut(
    layouts: Sequence[BucketLayout], rule: UpdateRule, parts: Assembly, max_numel: int | None = None
) -> Iterator[Piece]:
    for layout in layouts:
        if rule.elementwise:
            yield from cut_pieces(layout, parts.sharding.shard_of(layout), max_numel=max_numel)
        else:
            yield from cut_whole_parameters(layout)
