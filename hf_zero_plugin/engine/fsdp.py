"""Stage 3: what ``torch.distributed.fsdp.fully_shard`` is told. All knowledge of FSDP2's insides is in this file.

A model is cut into units, one ``fully_shard`` each, and the root takes what is left::

    root            embeddings, final norm, head              gathered from the first forward to the last backward
      unit 0        block 0                                   gathered while it runs
      unit 1        block 1                                   gathered while it runs
    whole           parameters of up to stage3_param_persistence_threshold elements, and scalars: not FSDP2's

Parameters that stay whole are ignored by FSDP2 and go the way of stage 1 (flat buckets, one reduce-scatter): a norm
or a bias costs a copy-in, a copy-out and, when offloaded, a transfer of its own at every use, and saves nothing.

Units are given to FSDP2 with parameters on the meta device, already of the type to compute in. The engine then puts
its own storage under the shards, slices of flat buckets, so that optimizer steps write where FSDP2 gathers from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from hf_zero_plugin.config.settings import EngineSettings, Stage3Settings
from hf_zero_plugin.errors import HfZeroError

__all__ = [
    "LEAF_MARK",
    "ShardedParam",
    "describe_gathered",
    "drop_pending",
    "find_units",
    "fsdp_modules",
    "groups_of",
    "is_sharded",
    "make_mesh",
    "put_storage",
    "reshard_all",
    "settle_root",
    "shard_units",
    "sharded_params",
]

_DEFAULTS = Stage3Settings()

LEAF_MARK = "_zero_leaf_module"
"""Set by set_z3_leaf_modules on modules that must be gathered as a whole."""


class ShardedParam(NamedTuple):
    """One parameter in FSDP2's hands."""

    name: str
    """Its first name in the model."""
    handle: Any
    """FSDP2's ``FSDPParam``."""
    group: Any
    """FSDP2's ``FSDPParamGroup``: what is gathered together."""

    @property
    def param(self) -> nn.Parameter:
        """The sharded parameter, a DTensor, as the module shows it between uses."""
        return self.handle.sharded_param

    @property
    def padded(self) -> Tensor:
        """This rank's rows, flat, padded to the size of rank 0's."""
        return self.handle._sharded_param_data


def make_mesh(device: torch.device, group: dist.ProcessGroup | None) -> DeviceMesh:
    """All ranks in a row. Without a process group this process gets one of its own."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if group is not None:
        return DeviceMesh.from_group(group, device.type)
    return init_device_mesh(device.type, (dist.get_world_size(),))


def _outermost(model: nn.Module, wanted: set[int]) -> list[nn.Module]:
    found: list[nn.Module] = []
    seen: set[int] = set()

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if id(child) in seen:
                continue
            seen.add(id(child))
            if id(child) in wanted:
                found.append(child)
            else:
                walk(child)

    walk(model)
    return found


def find_units(model: nn.Module, settings: Stage3Settings = _DEFAULTS) -> list[nn.Module]:
    """Modules to be gathered one at a time, in the order in which the model registers them.

    They are what the model itself calls indivisible (``_no_split_modules``), or else the members of its
    ``nn.ModuleList``s, and always the leaf modules. Outermost ones win; one that nobody calls (a list of modules), or
    whose parameters are also used outside of it, is left to the root with all that is in it.
    """
    leaves = {id(module) for name, module in model.named_modules() if _is_leaf(name, module, settings)}
    classes = {name for m in model.modules() for name in (getattr(m, "_no_split_modules", None) or ())}
    blocks = {id(m) for m in model.modules() if type(m).__name__ in classes}
    if not blocks:
        blocks = {
            id(child)
            for parent in model.modules()
            if isinstance(parent, nn.ModuleList) and len(parent) > 1
            for child in parent
            if type(child).forward is not nn.Module.forward
        }
    units = [
        unit
        for unit in _outermost(model, blocks | leaves)
        if unit is not model and type(unit).forward is not nn.Module.forward and any(True for _ in unit.parameters())
    ]
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)

    def is_closed(unit: nn.Module) -> bool:
        inside = Counter(id(p) for module in unit.modules() for p in module._parameters.values() if p is not None)
        return all(uses[key] == count for key, count in inside.items())

    return [unit for unit in units if is_closed(unit)]


def _is_leaf(name: str, module: nn.Module, settings: Stage3Settings) -> bool:
    suffixes = settings.leaf_module_name_suffixes
    return (
        getattr(module, LEAF_MARK, False)
        or type(module).__name__ in settings.leaf_module_classes
        or name in settings.leaf_module_names
        or (bool(suffixes) and name.endswith(suffixes))
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds the model already: an engine before this one has handed it over."""
    return isinstance(model, FSDPModule)


def shard_units(
    model: nn.Module,
    units: Sequence[nn.Module],
    whole: set[nn.Parameter],
    settings: EngineSettings,
    mesh: DeviceMesh,
    reduce_dtype: torch.dtype | None,
) -> None:
    """Hand the units and the root to FSDP2. Parameters are on the meta device, but for ``whole`` ones."""
    mixed = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    policy = OffloadPolicy()
    if settings.offload_param.device == "cpu":
        policy = CPUOffloadPolicy(pin_memory=settings.offload_param.pin_memory and mesh.device_type == "cuda")
    sizes = [sum(p.numel() for p in unit.parameters()) for unit in units]
    kept = _num_kept(sizes, sum(p.numel() for p in model.parameters()), settings.stage3)
    for index, unit in enumerate(units):
        fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=index < len(units) - kept,
            mp_policy=mixed,
            offload_policy=policy,
            ignored_params=whole,
        )
    fully_shard(model, mesh=mesh, mp_policy=mixed, offload_policy=policy, ignored_params=whole)
    # One rank fetches nothing by itself before it is asked to.
    at_least = 1 if mesh.size() == 1 else 0
    _plan_prefetch(model, units, sizes, settings.stage3.prefetch_bucket_size, at_least)
    if mesh.size() > 1 and hasattr(model, "set_reduce_scatter_unused_params"):
        # Ranks that take different branches must still reduce the same parameters.
        for module in fsdp_modules(model):
            module.set_reduce_scatter_unused_params(True)  # type: ignore[attr-defined]


def settle_root(model: nn.Module) -> None:
    """Make ``model`` the root now: by default the first module that runs becomes it, and a submodule may well be."""
    model._get_fsdp_state()._lazy_init()  # type: ignore[operator]


def _num_kept(sizes: Sequence[int], total: int, settings: Stage3Settings) -> int:
    """How many of the last units stay gathered between forward and backward: backward needs those first.

    A unit is used again after the forward and the backward pass of all units behind it.
    """
    live = total - sum(sizes)
    behind = kept = 0
    for size in reversed(sizes):
        live += size
        if live > settings.max_live_parameters or 2 * behind > settings.max_reuse_distance:
            break
        behind += size
        kept += 1
    return kept


def _plan_prefetch(
    model: nn.Module, units: Sequence[nn.Module], sizes: Sequence[int], budget: int, at_least: int
) -> None:
    """Gather ahead as many units as fit into ``budget`` elements, and one that does not fit, but none if it is 0.

    FSDP2 by itself gathers one ahead in backward; with several ranks it overlaps one in forward, if it runs ahead of
    the device.
    """
    if budget == 0:
        for module in [model, *units]:
            # Itself, which is there: FSDP2 takes an empty list for its own choice.
            module.set_modules_to_backward_prefetch([module])  # type: ignore[operator]
        return
    if at_least and units:
        model.set_modules_to_forward_prefetch([units[0]])  # type: ignore[operator]
    for index, unit in enumerate(units):
        ahead = _fitting(range(index + 1, len(units)), sizes, budget) or [*range(index + 1, len(units))][:at_least]
        behind = _fitting(range(index - 1, -1, -1), sizes, budget)
        if ahead:
            unit.set_modules_to_forward_prefetch([units[i] for i in ahead])  # type: ignore[operator]
        if len(behind) > 1:
            unit.set_modules_to_backward_prefetch([units[i] for i in behind])  # type: ignore[operator]


def _fitting(order: Iterable[int], sizes: Sequence[int], budget: int) -> list[int]:
    chosen: list[int] = []
    for index in order:
        budget -= sizes[index]
        if budget < 0:
            break
        chosen.append(index)
    return chosen


def fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


def groups_of(module: FSDPModule) -> list[Any]:
    """FSDP2's parameter groups of one module; older versions have one at most, under another name."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return list(groups)


def sharded_params(model: nn.Module) -> list[ShardedParam]:
    """All parameters in FSDP2's hands, in the order of ``model.named_parameters()``."""
    place: dict[tuple[int, str], tuple[Any, Any]] = {}
    for module in fsdp_modules(model):
        for group in groups_of(module):
            for handle in group.fsdp_params:
                info = handle._module_info
                for owner, name in [
                    (info.module, info.param_name),
                    *zip(info.shared_modules, info.shared_param_names),
                ]:
                    place[id(owner), name] = (handle, group)
    found: dict[int, ShardedParam] = {}
    for prefix, module in model.named_modules():
        for name in module._parameters:
            if (id(module), name) in place:
                handle, group = place[id(module), name]
                found.setdefault(id(handle), ShardedParam(f"{prefix}.{name}" if prefix else name, handle, group))
    return list(found.values())


@torch.no_grad()
def put_storage(sharded: ShardedParam, padded: Tensor) -> None:
    """Make ``padded``, flat, the storage of a shard: what it holds is what will be gathered.

    Raises:
        HfZeroError: this version of torch does not take the storage over.
    """
    handle, old = sharded.handle, sharded.param
    assert padded.numel() == handle.padded_sharded_param_size.numel(), "as large as rank 0's shard"
    numel = handle.sharded_size.numel()
    # The class's own method: an engine that was not destroyed may have put another in its place (kept_grads.py).
    local = padded[:numel].view(handle.sharded_size)
    fresh = nn.Parameter(type(handle).to_sharded_dtensor(handle, local), old.requires_grad)
    for key, value in vars(old).items():
        setattr(fresh, key, value)
    handle._sharded_param_data = padded
    handle._setattr_on_modules(fresh)
    # FSDP2's own way to notice a replaced parameter; equal storage tells it that there is nothing to pad or to copy.
    handle.reset_sharded_param()
    if handle.sharded_param is not fresh or handle._sharded_param_data.data_ptr() != padded.data_ptr():
        raise HfZeroError(
            f"stage 3: fully_shard of torch {torch.__version__} did not take over the storage of {sharded.name!r}. "
            "Use a version of torch that hf-zero doctor lists as tested, or ZeRO stage 2."
        )


def describe_gathered(sharded: ShardedParam, attributes: dict[str, Any]) -> None:
    """Put attributes on the whole parameter that modules see while they run; FSDP2 makes it at the first gather."""
    handle = sharded.handle
    make = type(handle).init_unsharded_param

    def init_unsharded_param() -> None:
        make(handle)
        vars(handle._unsharded_param).update(attributes)

    handle.init_unsharded_param = init_unsharded_param


def reshard_all(model: nn.Module) -> None:
    """Free gathered copies, so that the next use gathers what the shards hold then."""
    for module in fsdp_modules(model):
        module.reshard()
        for group in groups_of(module):
            drop_pending(group)


def drop_pending(group: Any) -> None:
    """Forget what was gathered ahead and has not been used: it is what the shards held then."""
    result, group._all_gather_result = group._all_gather_result, None
    if result is None:
        return
    if isinstance(result.all_gather_work, dist.Work):
        result.all_gather_work.wait()
    if result.all_gather_event is not None and group.device.type == "cuda":
        torch.cuda.current_stream(group.device).wait_event(result.all_gather_event)
    for handle in group.fsdp_params:
        for room in handle.all_gather_outputs if group.is_sharded else []:
            room.untyped_storage().resize_(0)
