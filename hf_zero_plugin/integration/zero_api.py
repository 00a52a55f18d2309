"""The ``deepspeed.zero`` names: gathering parameters, building sharded models, marking leaf modules.

At stages 0 to 2 every rank holds whole parameters, so gathering means: wait for pending updates, let one rank change
what it wants, give the change to the others and to the master weights. At stage 3 ``engine/gathering.py`` makes
parameters whole first. Before an engine is made, ``sharded_init.py`` lends values to ranks that lack them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_zero_plugin.engine.fsdp import LEAF_MARK
from hf_zero_plugin.engine.gathering import find_sharded, gathered
from hf_zero_plugin.engine.registry import engines_of, engines_with
from hf_zero_plugin.engine.shards import ZeroParamStatus
from hf_zero_plugin.integration.sharded_init import Init, fast_draws, lent

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "clone_tensors_for_torch_save",
    "orig_torch_arange",
    "register_external_parameter",
    "set_z3_leaf_modules",
    "unregister_external_parameter",
    "zero_wrapper_for_fp_tensor_constructor",
]

orig_torch_arange = torch.arange


def zero_wrapper_for_fp_tensor_constructor(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Tensor constructors are not wrapped by this engine: returned as they are."""
    return fn


def _parameters(params: Any) -> list[nn.Parameter]:
    """Flatten a parameter, a module's parameters, or any iterable of them; None and duplicates are dropped."""
    if params is None:
        return []
    if isinstance(params, Tensor):
        params = [params]
    seen: dict[int, nn.Parameter] = {}
    for param in params:
        if param is not None:
            seen.setdefault(id(param), param)
    return list(seen.values())


class GatheredParameters:
    """Context in which parameters are whole, up to date and may be changed.

    Args:
        params: a parameter, an iterable of parameters, None items allowed.
        modifier_rank: the rank whose changes every rank takes over on exit; None means nobody changes anything.
        enabled: false makes the context empty.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | nn.Parameter | None,
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        self.params = _parameters(params) if enabled else []
        self.modifier_rank = modifier_rank

    def __enter__(self) -> None:
        holders = engines_with(self.params)
        for engine, _ in holders:
            engine.synchronize()
        sharded = {id(place.given) for place in find_sharded(self.params)}
        plain = [param for param in self.params if id(param) not in sharded]
        self._whole = [
            param
            for _, positions in holders
            for param in sorted((p for p in plain if id(p) in positions), key=lambda p: positions[id(p)])
        ]
        """In the hands of an engine, trained or not; in an order that all ranks share."""
        held = {id(param) for param in self._whole}
        free = [param for param in plain if id(param) not in held]
        with contextlib.ExitStack() as stack:
            if free:
                stack.enter_context(fast_draws())
            stack.enter_context(lent(free, self.modifier_rank))
            stack.enter_context(gathered(self.params, self.modifier_rank))
            self._stack = stack.pop_all()

    def __exit__(self, *exc_info: Any) -> None:
        # On an error the sharded parameters are put back as they were.
        self._stack.__exit__(*exc_info)
        if self.modifier_rank is None or exc_info[0] is not None:
            return
        if dist.is_initialized() and dist.get_world_size() > 1:
            for param in self._whole:
                dist.broadcast(param.data, src=self.modifier_rank)
        for engine in engines_of(self.params):
            engine.refresh_master_weights(self.params)


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Nothing to do: parameters are found by identity, whichever module uses them."""


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Nothing to do, as for ``register_external_parameter``."""


def set_z3_leaf_modules(model: nn.Module, leaf_module_classes: Iterable[type | str], **_: Any) -> list[nn.Module]:
    """Mark modules that stage 3 must shard as one unit; returns them."""
    wanted = tuple(cls if isinstance(cls, str) else cls.__name__ for cls in leaf_module_classes)
    found = [module for module in model.modules() if type(module).__name__ in wanted]
    for module in found:
        setattr(module, LEAF_MARK, True)
    return found


def clone_tensors_for_torch_save(item: Any, device: str | torch.device = "cpu") -> Any:
    """Copy every tensor of a nested structure, so that views of flat buckets are saved at their own size.

    Tensors that are one tensor in the input (tied weights) stay one in the output: savers look for that.
    """
    done: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}

    def clone(value: Any) -> Any:
        if isinstance(value, Tensor):
            key = (value.data_ptr(), value.shape, value.dtype)
            if key not in done or value.numel() == 0:
                done[key] = value.detach().clone().to(device)
            return done[key]
        if isinstance(value, dict):
            return type(value)((key, clone(part)) for key, part in value.items())
        if isinstance(value, list | tuple):
            return type(value)(clone(part) for part in value)
        return value

    return clone(item)
