"""``zero.Init``: building a model that only rank 0 has the memory for.

Inside ``Init`` rank 0 builds the model as always, in host memory. On every other rank a parameter becomes a meta
tensor, shape and type without values, at the moment it is registered; buffers stay real everywhere. The values reach
the other ranks when the engine is made, as shards, one parameter at a time.

Between those two moments ``GatheredParameters`` sees parameters that are absent on some ranks:

    modifier_rank=0      nothing to do: rank 0 has them, and its changes are what counts later
    anything else        the values are lent to the ranks that lack them, for as long as the context lasts

Random numbers in half precision are drawn one at a time by a CPU, 6 ns each and minutes for tens of billions, so large
tensors of such types are drawn on the GPU, if there is one, and brought back: inside ``Init``, and inside
``GatheredParameters`` of a model that has no engine yet, where transformers draws a model's first values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_zero_plugin.integration.accelerator import current_device
from hf_zero_plugin.integration.comm import init_distributed

__all__ = ["Init", "fast_draws", "lent"]

logger = logging.getLogger("hf_zero_plugin")

_depth = 0
_any_absent = False
"""Whether an ``Init`` has run with several ranks; the same on every rank, unlike the parameters themselves."""
_register: Callable[..., None] = nn.Module.register_parameter


DRAWN_ELSEWHERE_NUMEL = 2**20
"""Half-precision tensors of this size or more are drawn on the GPU."""

_DRAWS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)


class _DrawOnGPU(TorchDispatchMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _DRAWS or kwargs.get("generator") is not None or not _is_slow_to_draw(args[0]):
            return func(*args, **kwargs)
        target: Tensor = args[0]
        try:
            drawn = func(torch.empty_like(target, device=self._device), *args[1:], **kwargs)
        except torch.OutOfMemoryError:
            return func(*args, **kwargs)
        return target.copy_(drawn)


def _is_slow_to_draw(tensor: Tensor) -> bool:
    is_half = tensor.dtype in (torch.float16, torch.bfloat16)
    return is_half and tensor.device.type == "cpu" and tensor.numel() >= DRAWN_ELSEWHERE_NUMEL


def fast_draws() -> AbstractContextManager[object]:
    """Context in which large half-precision tensors are drawn on the GPU; empty where there is none."""
    device = _drawing_device()
    return _DrawOnGPU(device) if device is not None else nullcontext()


def _drawing_device() -> torch.device | None:
    device = current_device()
    return device if device.type == "cuda" else None


class Init:
    """Context in which parameters get memory on rank 0 only.

    Args:
        module: a model built before: its parameters are given up at once on ranks other than 0.
        enabled: false makes the context empty.
        config_dict_or_path: accepted, as everything else that DeepSpeed's ``Init`` takes; nothing of it is needed.
    """

    def __init__(self, module: nn.Module | None = None, *, enabled: bool = True, **ignored: Any) -> None:
        self.enabled = enabled
        self._drawing = ExitStack()
        if module is not None and enabled:
            init_distributed()
            _note()
            if dist.get_rank() != 0:
                for owner in module.modules():
                    for name, param in owner._parameters.items():
                        owner._parameters[name] = _absent(param)

    def __enter__(self) -> Init:
        global _depth
        if self.enabled:
            init_distributed()
            _note()
            _depth += 1
            if _depth == 1 and dist.get_rank() != 0:
                nn.Module.register_parameter = _register_absent  # type: ignore[method-assign]
            if _depth == 1:
                self._drawing.enter_context(fast_draws())
        return self

    def __exit__(self, *exc_info: Any) -> None:
        global _depth
        self._drawing.__exit__(*exc_info)
        if self.enabled:
            _depth -= 1
            if _depth == 0:
                nn.Module.register_parameter = _register  # type: ignore[method-assign]


def _note() -> None:
    global _any_absent
    _any_absent = _any_absent or dist.get_world_size() > 1


def _register_absent(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    _register(self, name, _absent(param))


def _absent(param: nn.Parameter | None) -> nn.Parameter | None:
    if param is None or param.is_meta:
        return param
    fresh = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
    vars(fresh).update(vars(param))
    return fresh


@contextmanager
def lent(params: Sequence[nn.Parameter], modifier_rank: int | None) -> Iterator[None]:
    """Collective, unless ``modifier_rank`` is 0. ``params`` belong to no engine yet; ranks name them in one order."""
    if modifier_rank == 0 or not _any_absent or not params:
        yield
        return
    absent_by_rank: list[list[bool]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(absent_by_rank, [param.is_meta for param in params])
    is_absent = [any(flags) for flags in zip(*absent_by_rank)]
    wanted = [param for param, absent in zip(params, is_absent) if absent]
    borrowed = [param for param in wanted if param.is_meta]
    for param in wanted:
        values = _broadcast(param, 0)
        if param.is_meta:
            _swap(param, nn.Parameter(values.cpu(), requires_grad=param.requires_grad))
    try:
        yield
        if modifier_rank is not None:
            with torch.no_grad():
                for param in wanted:
                    param.copy_(_broadcast(param, modifier_rank))
    finally:
        for param in borrowed:
            _swap(param, nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad))


def _broadcast(param: nn.Parameter, source: int) -> torch.Tensor:
    device = current_device()
    is_source = dist.get_rank() == source
    values = param.detach().to(device).contiguous() if is_source else torch.empty_like(param, device=device)
    values = values.detach()
    dist.broadcast(values, src=source)
    return values


def _swap(param: nn.Parameter, other: nn.Parameter) -> None:
    """Give ``param`` the other's memory; the object that everybody holds, and its attributes, stay."""
    attributes = dict(vars(param))
    torch.utils.swap_tensors(param, other)
    vars(param).clear()
    vars(param).update(attributes)
