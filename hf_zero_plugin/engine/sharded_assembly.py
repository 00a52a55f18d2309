"""Putting a stage 3 engine together: storage for the shards, FSDP2 over the model, values rank by rank.

::

    1  plan     which parameters stay whole and which are FSDP2's; buckets over this rank's part of each
    2  shard    the model's parameters become meta tensors, FSDP2 takes them, flat buckets become their storage
    3  fill     one parameter at a time: rank 0's values -> everybody's rows -> weights and fp32 masters

Rank 0 alone needs values; elsewhere parameters may be meta tensors. A parameter's own memory is freed once it is
filled in, and no rank ever holds more than one rank's part of one parameter beside its shards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_zero_plugin.config.settings import EngineSettings
from hf_zero_plugin.engine import assembly
from hf_zero_plugin.engine.assembly import BUCKET_NUMEL, DTYPES, Assembly
from hf_zero_plugin.engine.buckets import (
    BucketLayout,
    ParamSpec,
    Piece,
    Slot,
    cut_pieces,
    cut_whole_parameters,
    plan_buckets,
)
from hf_zero_plugin.engine.client_home import ClientHome
from hf_zero_plugin.engine.flat import FlatWeights
from hf_zero_plugin.engine.fsdp import (
    find_units,
    is_sharded,
    make_mesh,
    put_storage,
    reshard_all,
    settle_root,
    shard_units,
    sharded_params,
)
from hf_zero_plugin.engine.gradients import ReduceOptions, ResidentGrads
from hf_zero_plugin.engine.master_weights import Context, DeviceHome, Home, MasterWeights
from hf_zero_plugin.engine.offload_host import HostHome
from hf_zero_plugin.engine.optimizers import UpdateRule
from hf_zero_plugin.engine.readiness import Doors
from hf_zero_plugin.engine.sharded_grads import ShardedGrads, Stage3Grads
from hf_zero_plugin.engine.sharded_values import (
    Fill,
    make_real,
    make_storage,
    name_sharded,
    place_the_rest,
    swap_for_meta,
)
from hf_zero_plugin.engine.sharding import sharding_for
from hf_zero_plugin.engine.shards import Shards, span_of, watch_evaluation
from hf_zero_plugin.errors import ConfigError

__all__ = ["assemble_sharded"]


class _Plan(NamedTuple):
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


def assemble_sharded(
    module: nn.Module,
    settings: EngineSettings,
    device: torch.device,
    param_groups: list[dict[str, Any]] | None,
    client: torch.optim.Optimizer | None,
    rank: int,
    world_size: int,
    group: dist.ProcessGroup | None,
) -> Assembly:
    """Build all parts of a stage 3 engine; the module is sharded in place, and stays so when the engine ends."""
    mesh = make_mesh(device, group)
    reshard_all(module)
    parts = Assembly(module, device, sharding_for(settings.stage, rank=rank, world_size=world_size))
    compute = DTYPES[settings.precision] if settings.precision != "fp32" else None
    rule: UpdateRule | None = None
    client_steps = False
    if param_groups is not None:
        rule, parts.optimizer, client_steps = assembly.choose_optimizer(settings, param_groups, client)
    groups = parts.optimizer.param_groups if parts.optimizer is not None else []
    name_sharded(groups, module)
    cut = _names_to_cut(module, settings.stage3.param_persistence_threshold)
    plan = _plan(module, groups, cut, compute, parts, settings)
    originals = {name: param for name, param in module.named_parameters() if name in cut}
    replaced = make_real(module, cut)
    trained_whole = {name for layout in plan.whole for name in (slot.spec.name for slot in layout.slots)}
    place_the_rest(module, device, compute, cut | trained_whole, group)
    if not is_sharded(module):
        units = find_units(module, settings.stage3.leaf_module_classes)
        swap_for_meta(module, originals, compute)
        whole = {param for name, param in module.named_parameters() if name not in cut}
        wire = settings.communication_dtype
        shard_units(module, units, whole, settings, mesh, DTYPES[wire] if wire is not None else None)
        watch_evaluation(module)
        sources: dict[str, Tensor] = dict(originals)
    else:
        sources = {item.name: item.padded for item in sharded_params(module)}

    home = torch.device("cpu") if settings.offload_param.device == "cpu" else device
    flats = make_storage(module, [*plan.sharded, *plan.frozen], home, settings)
    flat_of = dict(zip([id(layout) for layout in [*plan.sharded, *plan.frozen]], flats))
    places = plan.places
    for item in sharded_params(module):
        layout, slot, _ = places[item.name]
        put_storage(item, flat_of[id(layout)][slot.start : slot.end + slot.spec.reserve])
    settle_root(module)
    parts.shards = Shards(module, device, group)
    parts.shards.remember(originals)
    replaced.update({id(param): parts.shards.by_name[name].param for name, param in originals.items()})
    for param_group in groups:
        param_group["params"] = [replaced.get(id(param), param) for param in param_group["params"]]

    if rule is not None:
        _wire(parts, settings, plan, flats[: len(plan.sharded)], home, rule, client if client_steps else None, group)
    fill = Fill(parts, group, rank, world_size)
    for item in parts.shards.params:  # in the model's order: ranks whose parts differ in size have other layouts
        layout, slot, is_trained = places[item.name]
        fill(sources[item.name], flat_of[id(layout)], layout, slot, is_trained)
    return parts


def _names_to_cut(module: nn.Module, threshold: int) -> set[str]:
    """Parameters for FSDP2. Small ones stay whole, and so do those that it cannot cut."""
    if is_sharded(module):
        return {item.name for item in sharded_params(module)}
    return {
        name
        for name, param in module.named_parameters()
        if param.numel() > threshold and param.ndim > 0 and param.is_floating_point()
    }


def _plan(
    module: nn.Module,
    groups: Sequence[dict[str, Any]],
    cut: set[str],
    compute: torch.dtype | None,
    parts: Assembly,
    settings: EngineSettings,
) -> _Plan:
    group_of = {id(param): index for index, group in enumerate(groups) for param in group["params"]}
    rank, world_size = parts.sharding.rank, parts.sharding.world_size
    whole: list[ParamSpec] = []
    sharded: list[ParamSpec] = []
    frozen: list[ParamSpec] = []
    for name, param in module.named_parameters():
        dtype = compute if compute is not None and param.is_floating_point() else param.dtype
        trained = param.requires_grad and id(param) in group_of
        shape = tuple(param.shape)
        if name in cut:
            span = span_of(shape, rank, world_size)
            rows = (span.end - span.start) // max(1, torch.Size(shape[1:]).numel())
            spec = ParamSpec(
                index=0,
                name=name,
                shape=(rows, *shape[1:]),
                numel=span.end - span.start,
                dtype=dtype,
                group=group_of[id(param)] if trained else 0,
                offset=span.start,
                reserve=span.padding,
                whole_shape=shape,
            )
            (sharded if trained else frozen).append(spec)
        elif trained:
            whole.append(ParamSpec(0, name, shape, param.numel(), dtype, group_of[id(param)]))
    if groups and not whole and not sharded:
        raise ConfigError(
            "no parameter of the model is trainable and known to the optimizer: unfreeze something "
            "(param.requires_grad_(True)) before the engine is made."
        )
    numel = max(1, min(settings.reduce_bucket_size, BUCKET_NUMEL))
    whole = [dataclasses.replace(spec, index=index) for index, spec in enumerate(whole)]
    sharded = [dataclasses.replace(spec, index=len(whole) + index) for index, spec in enumerate(sharded)]
    frozen = [dataclasses.replace(spec, index=index) for index, spec in enumerate(frozen)]
    whole_layouts = plan_buckets(whole, bucket_numel=numel, num_shards=parts.sharding.num_shards)
    sharded_layouts = [
        dataclasses.replace(layout, index=layout.index + len(whole_layouts))
        for layout in plan_buckets(sharded, bucket_numel=numel, num_shards=1)
    ]
    return _Plan(
        whole_layouts,
        sharded_layouts,
        plan_buckets(frozen, bucket_numel=numel, num_shards=1),
        [spec.name for spec in [*whole, *sharded]],
        [spec.name for spec in frozen],
    )


# -------------------------------------------------------------------- training


def _wire(
    parts: Assembly,
    settings: EngineSettings,
    plan: _Plan,
    flats: Sequence[Tensor],
    home: torch.device,
    rule: UpdateRule,
    client: torch.optim.Optimizer | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Connect gradients, masters and doors; masters of sharded parameters are left at zero for ``Fill``."""
    assert parts.shards is not None and parts.optimizer is not None
    by_name = dict(parts.module.named_parameters())
    parts.params = [by_name[name] for name in plan.names]
    parts.layouts = [*plan.whole, *plan.sharded]
    parts.gather_group = group
    parts.weights = FlatWeights(parts.layouts, parts.params, parts.device)
    exact = assembly.adopt_weights(parts.weights, plan.whole, parts.sharding, group)
    parts.weights.flats += flats
    parts.grads = _make_grads(parts, settings, plan, flats, group)
    homes = _make_homes(parts, settings, plan, home, rule, client)
    parts.masters = MasterWeights(homes, parts.grads, len(parts.layouts))
    num_whole = len(plan.whole)
    for owner, index, piece in parts.masters.pieces():
        if piece.bucket < num_whole:
            owner.set_master(index, exact(piece))
        else:
            weight = owner.context.weight_of(piece)
            is_master = weight.dtype == torch.float32 and weight.device == owner.context.device
            zeros = torch.zeros(piece.numel, device=owner.context.device)
            owner.set_master(index, weight if is_master else zeros)
    assembly.prefetch_states(parts)
    parts.doors = Doors(parts.module, plan.whole, parts.params)
    parts.doors.guard(parts.masters)
    buckets = {plan.names[slot.spec.index]: layout.index for layout in plan.sharded for slot in layout.slots}
    parts.shards.guard(parts.masters, buckets)


def _make_grads(
    parts: Assembly, settings: EngineSettings, plan: _Plan, flats: Sequence[Tensor], group: dist.ProcessGroup | None
) -> Stage3Grads:
    assert parts.weights is not None and parts.shards is not None
    sharding = parts.sharding
    wanted = settings.grad_accum_dtype or ("fp32" if settings.precision == "bf16" else settings.precision)
    accumulate_fp32 = wanted == "fp32" and settings.precision != "fp32"
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
    sharded = ShardedGrads(plan.sharded, parts.params, sharding, flats, accumulate_fp32=accumulate_fp32, factor=factor)
    return Stage3Grads(whole, sharded)


def _make_homes(
    parts: Assembly,
    settings: EngineSettings,
    plan: _Plan,
    home: torch.device,
    rule: UpdateRule,
    client: torch.optim.Optimizer | None,
) -> list[Home]:
    """States of whole parameters stay on the device: they are few, and gathered on the main thread.

    States of offloaded parameters are where the parameters are, and are stepped there.
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
    )
    sharded = whole._replace(finish_bucket=lambda bucket, owner: None, device=home, is_alone=True)
    if client is not None:
        assembly.refuse_cut_parameters(rule, client, parts.sharding)
        pieces = [piece for layout in parts.layouts for piece in cut_whole_parameters(layout)]
        indices = [slot.spec.index for layout in parts.layouts for slot in layout.slots]
        states = torch.device("cpu") if settings.offload_optimizer.device == "cpu" else home
        return [ClientHome(sharded, pieces, client, parts.params, indices, states)]
    device_home = DeviceHome(whole, list(_cut(plan.whole, rule, parts)))
    if home == parts.device:
        return [device_home, *assembly.make_homes(parts, settings, sharded, None, plan.sharded)]
    threaded = parts.device.type == "cuda" or settings.offload_optimizer.step_on == "host"
    return [device_home, HostHome(sharded, list(_cut(plan.sharded, rule, parts)), pin_memory=False, threaded=threaded)]


def _cut(layouts: Sequence[BucketLayout], rule: UpdateRule, parts: Assembly) -> Iterator[Piece]:
    if not rule.elementwise:
        assembly.refuse_cut_parameters(rule, None, parts.sharding)
    for layout in layouts:
        if rule.elementwise:
            yield from cut_pieces(layout, parts.sharding.shard_of(layout))
        else:
            yield from cut_whole_parameters(layout)
