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
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_zero_plugin.config.settings import EngineSettings, Stage3Settings
from hf_zero_plugin.engine.assembly import BUCKET_NUMEL, Chosen
from hf_zero_plugin.engine.buckets import (
    ParamSpec,
    plan_buckets,
)
from hf_zero_plugin.engine.fsdp import (
    find_units,
    fsdp_modules,
    is_sharded,
    make_mesh,
    put_storage,
    reshard_all,
    settle_root,
    shard_units,
    sharded_params,
)
from hf_zero_plugin.engine.low_precision import DTYPES
from hf_zero_plugin.engine.parts import Assembly
from hf_zero_plugin.engine.root_access import open_root
from hf_zero_plugin.engine.sharded_values import (
    Fill,
    drop_values,
    make_real,
    make_storage,
    name_sharded,
    place_the_rest,
    swap_for_meta,
)
from hf_zero_plugin.engine.sharded_wiring import Plan, connect_training, refuse_impossible_states
from hf_zero_plugin.engine.sharding import sharding_for
from hf_zero_plugin.engine.shards import Shards, span_of, watch_evaluation
from hf_zero_plugin.engine.spent import taking_apart
from hf_zero_plugin.engine.unit_transfers import UnitTransfers
from hf_zero_plugin.errors import ConfigError

__all__ = ["assemble_sharded"]


def assemble_sharded(
    module: nn.Module,
    settings: EngineSettings,
    device: torch.device,
    chosen: Chosen | None,
    rank: int,
    world_size: int,
    group: dist.ProcessGroup | None,
) -> Assembly:
    """Build all parts of a stage 3 engine; the module is sharded in place, and stays so when the engine ends."""
    mesh = make_mesh(device, group)
    reshard_all(module)
    parts = Assembly(module, device, sharding_for(settings.stage, rank=rank, world_size=world_size))
    compute = DTYPES[settings.precision] if settings.precision != "fp32" else None
    parts.optimizer = chosen.optimizer if chosen is not None else None
    groups = parts.optimizer.param_groups if parts.optimizer is not None else []
    if chosen is not None:
        refuse_impossible_states(settings, chosen, parts.sharding)
    name_sharded(groups, module)
    cut = _names_to_cut(module, settings.stage3)
    units = _units(module, settings)
    plan = _plan(module, groups, cut, units, compute, parts, settings)
    originals = {name: param for name, param in module.named_parameters() if name in cut}
    replaced = make_real(module, cut)
    trained_whole = {name for layout in plan.whole for name in (slot.spec.name for slot in layout.slots)}
    place_the_rest(module, device, compute, cut | trained_whole, group)
    home = torch.device("cpu") if settings.offload_param.device == "cpu" else device
    flats = make_storage(module, [*plan.sharded, *plan.frozen], home, settings)
    with taking_apart(module):
        if not is_sharded(module):
            swap_for_meta(module, originals, compute)
            whole = {param for name, param in module.named_parameters() if name not in cut}
            wire = settings.communication_dtype
            shard_units(module, units, whole, settings, mesh, DTYPES[wire] if wire is not None else None)
            watch_evaluation(module)
            open_root(module)
            sources: dict[str, Tensor] = dict(originals)
        else:
            sources = {item.name: item.padded for item in sharded_params(module)}

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

        fill = Fill(parts, group, rank, world_size)
        # In the model's order: ranks whose parts differ in size have other layouts. Those whose values lose nothing go
        # first, and free their memory before that of the states is taken.
        order = [(item.name, *places[item.name]) for item in parts.shards.params]
        wide = {name for name, layout, *_ in order if sources[name].dtype != layout.dtype}
        for name, layout, slot, _ in order:
            if name not in wide:
                fill(sources.pop(name), flat_of[id(layout)], slot)
    # If weights and masters have one type, the model is whole again already.
    with nullcontext() if not wide and _keeps_whole(module, plan) else taking_apart(module):
        if chosen is not None:
            connect_training(parts, settings, plan, flats[: len(plan.sharded)], home, chosen, group)
        elif world_size == 1:
            parts.shards.transfers = UnitTransfers(parts.shards)
        pieces = fill.pieces_by_bucket()
        for name, layout, slot, is_trained in order:
            if name in wide:
                mine = pieces.get(layout.index, []) if is_trained else []
                fill(sources.pop(name), flat_of[id(layout)], slot, mine)
        drop_values(originals.values())
    return parts


def _keeps_whole(module: nn.Module, plan: Plan) -> bool:
    """Whether parameters that are not sharded have the type in which they will be trained."""
    named = dict(module.named_parameters())
    return all(named[slot.spec.name].dtype == layout.dtype for layout in plan.whole for slot in layout.slots)


def _names_to_cut(module: nn.Module, settings: Stage3Settings) -> set[str]:
    """Parameters for FSDP2. Small ones stay whole, up to a limit for all of them; so do those that it cannot cut."""
    if is_sharded(module):
        return {item.name for item in sharded_params(module)}
    cut: set[str] = set()
    room = settings.model_persistence_threshold
    for name, param in module.named_parameters():
        numel = param.numel()
        if param.ndim == 0 or not param.is_floating_point():
            continue
        if numel > settings.param_persistence_threshold or numel > room:
            cut.add(name)
        else:
            room -= numel
    return cut


def _units(module: nn.Module, settings: EngineSettings) -> list[nn.Module]:
    if is_sharded(module):
        return [unit for unit in fsdp_modules(module) if unit is not module]  # type: ignore[misc]
    return find_units(module, settings.stage3)


def _root_first(specs: Sequence[ParamSpec], module: nn.Module, units: Sequence[nn.Module]) -> list[ParamSpec]:
    """In the order in which a forward pass gathers: the root is gathered whole before the first unit runs.

    A head is registered last. If its bucket were updated last, too, every forward pass would wait for all of the step.
    """
    inside = {id(param) for unit in units for param in unit.parameters()}
    named = dict(module.named_parameters())
    return sorted(specs, key=lambda spec: id(named[spec.name]) in inside)


def _plan(
    module: nn.Module,
    groups: Sequence[dict[str, Any]],
    cut: set[str],
    units: Sequence[nn.Module],
    compute: torch.dtype | None,
    parts: Assembly,
    settings: EngineSettings,
) -> Plan:
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
        for layout in plan_buckets(_root_first(sharded, module, units), bucket_numel=numel, num_shards=1)
    ]
    return Plan(
        whole_layouts,
        sharded_layouts,
        plan_buckets(frozen, bucket_numel=numel, num_shards=1),
        [spec.name for spec in [*whole, *sharded]],
        [spec.name for spec in frozen],
    )
