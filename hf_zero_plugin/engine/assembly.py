"""Putting an engine together: which parts a configuration needs, and how they are wired.

::

    parts.py              what is put together
    initial_values.py     the model's tensors on their way into buckets and onto the device
    state_homes.py        where masters and optimizer states live
    sharded_assembly.py   the same for stage 3
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from hf_zero_plugin.config.settings import EngineSettings
from hf_zero_plugin.engine.buckets import ParamSpec, Piece, plan_buckets
from hf_zero_plugin.engine.collectives import all_gather_flat
from hf_zero_plugin.engine.flat import FlatWeights
from hf_zero_plugin.engine.gradients import GradientStore, ReduceOptions
from hf_zero_plugin.engine.initial_values import adopt_bucket, broadcast_rest, place_rest
from hf_zero_plugin.engine.loose_grads import LooseGrads
from hf_zero_plugin.engine.low_precision import DTYPES, params_of_safe_modules
from hf_zero_plugin.engine.master_weights import Context, Home, MasterWeights
from hf_zero_plugin.engine.offload_host import HostHome
from hf_zero_plugin.engine.offload_stream import StreamedHome
from hf_zero_plugin.engine.optimizers import UpdateRule, rule_for, rule_from_config
from hf_zero_plugin.engine.parts import Assembly
from hf_zero_plugin.engine.readiness import Doors
from hf_zero_plugin.engine.resident_grads import ResidentGrads
from hf_zero_plugin.engine.sharding import sharding_for
from hf_zero_plugin.engine.state_homes import make_homes, state_types
from hf_zero_plugin.engine.transient_grads import TransientGrads
from hf_zero_plugin.engine.zero_optimizer import ZeroOptimizer
from hf_zero_plugin.errors import ConfigError

__all__ = [
    "Chosen",
    "accumulates_in_fp32",
    "assemble",
    "choose_optimizer",
    "finish_bucket",
    "prefetch_states",
    "sums_in_fp32",
]

logger = logging.getLogger("hf_zero_plugin")

BUCKET_NUMEL = 12 * 2**20
"""Elements per bucket unless reduce_bucket_size asks for less: readiness is per bucket, so the forward pass starts
after one bucket, and a bucket's calls are few enough not to matter."""

MIN_BUCKET_NUMEL = 2 * 2**20
"""Smaller buckets than this are not made, whatever the configuration says ("auto" means hidden size squared, well below
it): each costs a dozen calls a step, and saves 4 MB of buffer."""


class Chosen(NamedTuple):
    """What updates the weights, and the optimizer object that shows its param groups."""

    rule: UpdateRule
    optimizer: ZeroOptimizer
    client: torch.optim.Optimizer | None
    """The user's own object, if no rule of ours does what it does: then it steps itself."""


def assemble(
    module: nn.Module,
    settings: EngineSettings,
    device: torch.device,
    chosen: Chosen | None,
    rank: int,
    world_size: int,
    group: dist.ProcessGroup | None,
) -> Assembly:
    """Build all parts; the module ends up on ``device`` with its trainable weights in flat buckets.

    ``chosen`` is None for evaluation only.
    """
    parts = Assembly(module, device, sharding_for(settings.stage, rank=rank, world_size=world_size))
    compute = DTYPES[settings.precision] if settings.precision != "fp32" else None
    if chosen is None:
        place_rest(module, device, compute, skip=set())
        return parts
    parts.optimizer = chosen.optimizer
    parts.params, specs = _specs(module, chosen.optimizer.param_groups, compute, settings)
    place_rest(module, device, compute, skip={id(param) for param in parts.params})
    asked = min(settings.reduce_bucket_size, settings.allgather_bucket_size, settings.sub_group_size)
    numel = min(BUCKET_NUMEL, max(asked, MIN_BUCKET_NUMEL))
    parts.layouts = plan_buckets(specs, bucket_numel=numel, num_shards=parts.sharding.num_shards)
    parts.weights = FlatWeights(parts.layouts, parts.params, device)
    if world_size > 1:
        broadcast_rest(module, {id(param) for param in parts.params}, group)
    _wire(parts, settings, chosen.rule, chosen.client, group)
    return parts


def choose_optimizer(
    settings: EngineSettings, param_groups: list[dict[str, Any]], client: torch.optim.Optimizer | None
) -> Chosen:
    if client is None:
        if settings.optimizer is None:
            raise ConfigError(
                "$.optimizer: neither the configuration nor the caller names an optimizer. "
                'Add an "optimizer" section, or pass an optimizer.'
            )
        rule = rule_from_config(settings.optimizer)
        groups = [{**rule.defaults, **group} for group in param_groups]
        return Chosen(rule, ZeroOptimizer(groups, rule.defaults), None)
    found = rule_for(client)
    if found is not None and client.state:
        logger.warning(
            "optimizer %s has taken steps already; its states start afresh here. Make the optimizer new, or load a "
            "checkpoint of this engine.",
            type(client).__name__,
        )
    optimizer = ZeroOptimizer(
        [{**group, "params": list(group["params"])} for group in client.param_groups], client.defaults, client=client
    )
    return Chosen(found or UpdateRule(client.defaults), optimizer, client if found is None else None)


def _specs(
    module: nn.Module, groups: Sequence[dict[str, Any]], compute: torch.dtype | None, settings: EngineSettings
) -> tuple[list[nn.Parameter], list[ParamSpec]]:
    narrow = params_of_safe_modules(module, settings.lower_precision_safe_modules)
    group_of = {id(param): index for index, group in enumerate(groups) for param in group["params"]}
    params: list[nn.Parameter] = []
    specs: list[ParamSpec] = []
    for name, param in module.named_parameters():
        if param.requires_grad and id(param) in group_of:
            dtype = compute if compute is not None and param.is_floating_point() else param.dtype
            wire = DTYPES[settings.autocast] if settings.autocast is not None and id(param) in narrow else None
            group, shape = group_of[id(param)], tuple(param.shape)
            specs.append(ParamSpec(len(params), name, shape, param.numel(), dtype, group, wire))
            params.append(param)
    if not params:
        raise ConfigError(
            "no parameter of the model is trainable and known to the optimizer: unfreeze something "
            "(param.requires_grad_(True)) before the engine is made."
        )
    return params, specs


def _wire(
    parts: Assembly,
    settings: EngineSettings,
    rule: UpdateRule,
    client: torch.optim.Optimizer | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Adopt the weights bucket by bucket and connect gradients, masters and doors."""
    sharding, weights = parts.sharding, parts.weights
    assert weights is not None and parts.optimizer is not None
    for layout in parts.layouts:
        weights.allocate(layout, layout.dtype)  # type: ignore[arg-type]
    parts.grads = make_grads(parts, settings, group)
    context = Context(
        rule=rule,
        weights=weights.flats,
        grads=parts.grads,
        finish_bucket=lambda bucket, home: finish_bucket(parts, bucket, home),
        device=parts.device,
        is_alone=sharding.world_size == 1,
        groups=parts.optimizer.param_groups,
        types=state_types(settings, rule, client),
        sums_in_fp32=sums_in_fp32(settings),
    )
    homes = make_homes(parts, settings, context, client, parts.layouts)
    parts.masters = MasterWeights(homes, parts.grads, len(parts.layouts))
    if sharding.gathers_weights and any(isinstance(home, HostHome) for home in parts.masters.homes):
        # The worker thread gathers while the main thread may be in another collective: keep them apart.
        parts.gather_group = dist.new_group(dist.get_process_group_ranks(group) if group is not None else None)
    else:
        parts.gather_group = group

    # Bucket by bucket: the fp32 values of no more than one bucket are on the device on their way to the host.
    pieces_of: dict[int, list[tuple[Home, int, Piece]]] = {}
    for home, index, piece in parts.masters.pieces():
        pieces_of.setdefault(piece.bucket, []).append((home, index, piece))
    for layout in parts.layouts:
        exact = adopt_bucket(weights, layout, sharding, group)
        for home, index, piece in pieces_of.get(layout.index, ()):
            home.set_master(index, exact(piece))
    prefetch_states(parts)
    parts.doors = Doors(parts.module, parts.layouts, parts.params)
    parts.doors.guard(parts.masters)


def prefetch_states(parts: Assembly) -> None:
    if parts.masters is not None and any(isinstance(home, StreamedHome) for home in parts.masters.homes):
        parts.masters.prefetch_after(parts.layouts, parts.params)


def make_grads(parts: Assembly, settings: EngineSettings, group: dist.ProcessGroup | None) -> GradientStore:
    assert parts.weights is not None
    wire = settings.communication_dtype
    options = ReduceOptions(
        parts.sharding.world_size,
        op=settings.gradient_allreduce_op,
        prescale=settings.prescale_gradients,
        predivide_factor=settings.gradient_predivide_factor,
        dtype=DTYPES[wire] if wire is not None else None,
    )
    is_half = all(flat.dtype != torch.float32 for flat in parts.weights.flats)
    store: type[GradientStore] = TransientGrads if parts.sharding.shards_grads else ResidentGrads
    if parts.sharding.world_size == 1 and is_half:
        store = LooseGrads
    made = store(  # type: ignore[call-arg]
        parts.layouts,
        parts.params,
        parts.sharding,
        options,
        group=group,
        overlap=settings.overlap_comm,
        flats=parts.weights.flats,
        accumulate_fp32=accumulates_in_fp32(settings),
    )
    if settings.gradient_accumulation_steps > 1:
        made.expect_sums()
    return made


def accumulates_in_fp32(settings: EngineSettings) -> bool:
    """Whether sums of micro-steps need buffers wider than the weights.

    bf16 keeps 8 bits: sums lose small gradients, so they are fp32 unless the user has told otherwise.
    """
    if settings.precision == "fp32":
        return False
    default = "fp32" if settings.precision == "bf16" and settings.master_dtype == "fp32" else settings.precision
    return (settings.grad_accum_dtype or default) == "fp32"


def sums_in_fp32(settings: EngineSettings) -> bool:
    """Whether there are sums of micro-steps, and buffers wider than the weights for them."""
    return accumulates_in_fp32(settings) and settings.gradient_accumulation_steps > 1


def finish_bucket(parts: Assembly, bucket: int, home: object) -> None:
    assert parts.masters is not None and parts.grads is not None and parts.weights is not None
    if parts.masters.finisher[bucket] is not home:
        return
    if parts.sharding.world_size > 1:
        parts.grads.clear_shard(bucket)
    if parts.sharding.gathers_weights:
        flat = parts.weights.flats[bucket]
        low, high = parts.layouts[bucket].shard_range(parts.sharding.shard)
        all_gather_flat(flat, flat[low:high].clone(), parts.gather_group)
