"""Units whose parameters are all gathered already run on those: without collectives, so on one rank alone as well.

::

    with GatheredParameters(model.parameters()):
        if rank == 0:
            model.generate(...)         FSDP2 would gather again, and wait for the other ranks

FSDP2 keeps its hooks and its copies of weights; they are filled from what is gathered, and dropped when a unit has run:
the model must not show them to somebody who then changes them. Afterwards every rank must know the same again: nothing
is left gathered, and FSDP2 forgets the order in which units ran, from which it guesses what to fetch next. Like
``fsdp.py`` this file knows its insides.

An engine may end inside such a context. What it had put in the place of ``unshard`` lies beneath by then, and is taken
off there: the context goes on, and afterwards FSDP2's own method is back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from hf_zero_plugin.engine.fsdp import drop_pending, fsdp_modules, groups_of
from hf_zero_plugin.engine.fsdp_rooms import fill_room, room_for_whole

__all__ = ["running_on", "take_off"]

_MARK = "_zero_runs_on"
"""On a group in the hands of a context; holds the ``unshard`` that lies beneath, or nothing if that is FSDP2's own."""


@contextmanager
def running_on(model: nn.Module, whole_of: Callable[[Any], Tensor | None]) -> Iterator[None]:
    """Inside, units of which every parameter is there run on that.

    Args:
        whole_of: FSDP2's handle of a parameter -> the whole parameter, or None if nobody has gathered it.
    """
    everything = [group for module in fsdp_modules(model) for group in groups_of(module)]
    groups = [group for group in everything if _may_run(group) and all(map(_is_there(whole_of), group.fsdp_params))]
    if not groups:
        yield
        return
    order = groups[0].comm_ctx.post_forward_order
    num_run = len(order)
    for group in groups:
        drop_pending(group)
        beneath = {name: method for name, method in vars(group).items() if name == "unshard"}
        vars(group).update({"unshard": _filler(group, whole_of), _MARK: beneath})
    handles = [module.register_forward_hook(_dropper(group)) for group in groups for module in group.modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        del order[num_run:]
        for group in everything:
            group._post_forward_indices[:] = [index for index in group._post_forward_indices if index < num_run]
        for group in groups:
            del vars(group)["unshard"]
            vars(group).update(vars(group).pop(_MARK))
            group._to_sharded()


def take_off(group: Any, names: Iterable[str]) -> None:
    """Give methods of ``group`` back to FSDP2 that an engine has put others in the place of."""
    for name in names:
        is_covered = name == "unshard" and _MARK in vars(group)
        (vars(group)[_MARK] if is_covered else vars(group)).pop(name, None)


def _may_run(group: Any) -> bool:
    """Not in the middle of a pass, nor in the hands of a context around this one."""
    return group._training_state == TrainingState.IDLE and _MARK not in vars(group)


def _is_there(whole_of: Callable[[Any], Tensor | None]) -> Callable[[Any], bool]:
    return lambda handle: whole_of(handle) is not None


def _filler(group: Any, whole_of: Callable[[Any], Tensor | None]) -> Callable[..., None]:
    def unshard(async_op: bool = False) -> None:
        if group.is_unsharded:
            return
        for handle in group.fsdp_params:
            whole = whole_of(handle)
            assert whole is not None
            fill_room(room_for_whole(handle, handle.mesh_info.shard_mesh_size, group.device), whole)
            handle.init_unsharded_param()
        group._to_unsharded()

    return unshard


def _dropper(group: Any) -> Callable[..., None]:
    def drop(*_: Any) -> None:
        if torch._C._current_graph_task_id() == -1:  # a backward pass that runs a unit again goes on with it
            group._to_sharded()

    return drop
