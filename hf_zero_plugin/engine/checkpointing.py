"""Saving and loading one engine: between pieces of flat buckets and slices of named parameters."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from hf_zero_plugin.checkpoint.format import (
    CLIENT_FILE,
    FORMAT,
    LATEST,
    MODULE_FILE,
    STATE_FILE,
    ShardReader,
    Slice,
    newest_tag,
    reading,
    write_shard,
)
from hf_zero_plugin.engine.buckets import BucketLayout, Piece
from hf_zero_plugin.engine.untrained import load_untrained, write_untrained
from hf_zero_plugin.errors import CheckpointError

if TYPE_CHECKING:
    from hf_zero_plugin.engine.engine import ZeroEngine

__all__ = ["load_engine", "save_engine"]

logger = logging.getLogger("hf_zero_plugin")


def _slots_of(layout: BucketLayout, piece: Piece) -> Iterator[tuple[str, int, int, int]]:
    """Yield (parameter, first element in it, one past the last, offset in the piece) for a piece."""
    for slot in layout.slots:
        start, end = max(slot.start, piece.start), min(slot.end, piece.end)
        if start < end:
            first = slot.spec.offset - slot.start
            yield slot.spec.name, start + first, end + first, start - piece.start


def _my_slices(engine: ZeroEngine) -> Iterator[Slice]:
    assert engine.parts.masters is not None
    for home, index, piece in engine.parts.masters.pieces():
        tensors = home.tensors(index)
        for name, start, end, offset in _slots_of(engine.parts.layouts[piece.bucket], piece):
            for kind, tensor in tensors.items():
                # Elementwise states have the master's shape; a factor of (n,) of a matrix of (n, 1) is none of them.
                if tensor.shape == tensors["master"].shape:
                    yield Slice(name, kind, start, end, tensor.reshape(-1)[offset : offset + end - start])
                else:
                    yield Slice(name, kind, 0, -1, tensor)


def save_engine(
    engine: ZeroEngine,
    save_dir: str,
    tag: str | None,
    client_state: dict[str, Any],
    save_latest: bool,
    exclude_frozen: bool,
) -> bool:
    """Write into ``TAG.tmp`` and rename when every rank is done, so that a crash never leaves half a checkpoint.

    Raises:
        CheckpointError: another rank could not write. That rank raises what has happened to it.
    """
    tag = tag or f"global_step{engine.global_steps}"
    _check_tag(engine, tag)
    root = Path(save_dir)
    work = root / f"{tag}.tmp"
    with _together(engine):
        engine.synchronize()
        if _leads(engine):
            shutil.rmtree(work, ignore_errors=True)
    with _together(engine):
        work.mkdir(parents=True, exist_ok=True)
        _write_pieces(engine, work)
    with _together(engine):
        write_untrained(engine, work / MODULE_FILE, writes=_leads(engine), exclude_frozen=exclude_frozen)
        if _leads(engine):
            schedule = engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None
            torch.save({"client_state": client_state, "lr_scheduler": schedule}, work / CLIENT_FILE)
            (work / STATE_FILE).write_text(json.dumps(_state(engine), indent=1))
    with _together(engine):
        if _leads(engine):
            _put_in_place(root, tag, save_latest)
    return True


def _write_pieces(engine: ZeroEngine, work: Path) -> None:
    if engine.parts.masters is not None and engine.parts.sharding.shard == _writer(engine):
        shard, num_shards = engine.parts.sharding.shard, engine.parts.sharding.num_shards
        write_shard(work, shard, num_shards, _my_slices(engine))


def _put_in_place(root: Path, tag: str, save_latest: bool) -> None:
    shutil.rmtree(root / tag, ignore_errors=True)
    (root / f"{tag}.tmp").rename(root / tag)
    if save_latest:
        # Written aside and renamed: a machine that goes down now must not leave it empty.
        (root / f"{LATEST}.tmp").write_text(tag)
        (root / f"{LATEST}.tmp").rename(root / LATEST)


def _leads(engine: ZeroEngine) -> bool:
    """This rank writes what is common to all: rank 0, or one rank of every node that has storage of its own."""
    if engine.settings.use_node_local_storage:
        return int(os.environ.get("LOCAL_RANK", "0")) == 0
    return engine.global_rank == 0


def _writer(engine: ZeroEngine) -> int:
    """Ranks that hold equal copies (stage 0) leave the writing to rank 0."""
    sharding = engine.parts.sharding
    if sharding.num_shards > 1 or _leads(engine):
        return sharding.shard
    return -1


def _state(engine: ZeroEngine) -> dict[str, Any]:
    hyper = engine.optimizer.hyperparameters() if engine.optimizer is not None else []
    return {
        "format": FORMAT,
        "world_size": engine.world_size,
        "stage": engine.settings.stage,
        "precision": engine.settings.precision,
        "global_steps": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        "micro_steps": engine.micro_steps,
        "loss_scaler": engine.scaler.state_dict() if engine.scaler is not None else None,
        "shapes": {s.spec.name: list(s.spec.full_shape) for layout in engine.parts.layouts for s in layout.slots},
        "transient": _transient(engine.module),
        "rule": type(engine.parts.masters.homes[0].context.rule).__name__ if engine.parts.masters else None,
        "param_groups": [{k: v for k, v in group.items() if _is_plain(v)} for group in hyper],
    }


def _transient(module: torch.nn.Module) -> list[str]:
    """Names of buffers that are no part of a state dict: they resume with the rest, and are not exported."""
    return sorted(
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules()
        for name in owner._non_persistent_buffers_set
    )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple)


def _check_tag(engine: ZeroEngine, tag: str) -> None:
    mode = engine.settings.checkpoint_tag_validation
    if mode == "ignore" or engine.world_size == 1:
        return
    tags: list[str | None] = [None] * engine.world_size
    dist.all_gather_object(tags, tag, group=engine.group)
    if len(set(tags)) > 1:
        message = f"save_checkpoint: ranks disagree about the tag ({sorted(set(map(str, tags)))})"
        if mode == "fail":
            raise CheckpointError(f"{message}; pass the same tag on every rank ($.checkpoint.tag_validation is FAIL)")
        logger.warning(message)


@contextlib.contextmanager
def _together(engine: ZeroEngine) -> Iterator[None]:
    """Every rank does its part, and no rank goes on until all have: if one fails, nobody does."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if engine.world_size > 1:
        told: list[str | None] = [None] * engine.world_size
        text = f"{type(failure).__name__}: {failure}" if failure is not None else None
        dist.all_gather_object(told, text, group=engine.group)
        failed = [f"rank {rank} ({text})" for rank, text in enumerate(told) if text is not None]
        if failed and failure is None:
            raise CheckpointError(
                f"save_checkpoint: {', '.join(failed)} could not do its part, so nothing was saved. Checkpoints that "
                "were there before are as they were."
            )
    if failure is not None:
        raise failure


def load_engine(
    engine: ZeroEngine,
    load_dir: str,
    tag: str | None,
    *,
    strict: bool,
    optimizer_states: bool,
    scheduler_states: bool,
) -> tuple[str | None, dict[str, Any]]:
    root = Path(load_dir)
    tag = tag or newest_tag(root)
    if tag is None or not (root / tag / STATE_FILE).is_file():
        if tag is not None and any((root / tag).glob("*_model_states.pt")):
            raise CheckpointError(
                f"{root / tag}: this is a checkpoint in DeepSpeed's own layout, which this engine does not read yet. "
                "Start from the weights saved beside it (--model_name_or_path), without its optimizer states."
            )
        return None, {}
    directory = root / tag
    engine.synchronize()
    with reading(directory / STATE_FILE) as file:
        state = json.loads(file.read_text())
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{directory}: written in format {state['format']}, this version reads up to {FORMAT}. "
            "Upgrade hf-zero-plugin."
        )
    # Everything is opened and checked before anything is changed.
    with reading(directory / CLIENT_FILE) as file:
        client = torch.load(file, map_location="cpu", weights_only=False)
    with reading(directory / MODULE_FILE) as file:
        untrained = safe_open(file, framework="pt")
    reader = None
    if engine.parts.masters is not None:
        shapes = state.get("shapes", {})
        here_only = engine.settings.use_node_local_storage and engine.world_size == state["world_size"]
        declared = {name: math.prod(shape) for name, shape in shapes.items()} if here_only else None
        reader = ShardReader(directory, declared=declared)
    if reader is not None:
        _check_params(engine, reader, directory, strict, state.get("shapes", {}))
    load_untrained(engine, directory / MODULE_FILE, untrained)
    if reader is not None:
        _load_pieces(engine, reader, optimizer_states)
        reader.close()
        engine.parts.publish_masters()
    if optimizer_states:
        _restore_counts(engine, state)
    if scheduler_states and engine.lr_scheduler is not None and client["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(client["lr_scheduler"])
    return str(directory), client["client_state"]


def _check_params(
    engine: ZeroEngine, reader: ShardReader, directory: Path, strict: bool, shapes: dict[str, list[int]]
) -> None:
    mine = {slot.spec.name: slot.spec.full_numel for layout in engine.parts.layouts for slot in layout.slots}
    missing = sorted(set(mine) - reader.params)
    extra = sorted(reader.params - set(mine))
    if (missing or extra) and strict:
        raise CheckpointError(
            f"{directory}: the checkpoint is of another model: "
            f"{len(missing)} trainable parameters are not in it ({', '.join(missing[:3])}...), "
            f"{len(extra)} of it are not in the model ({', '.join(extra[:3])}...). "
            "Build the model as it was when the checkpoint was written."
        )
    for name in set(mine) & reader.params:
        if reader.numel(name) != mine[name]:
            raise CheckpointError(
                f"{directory}: parameter {name!r} has {reader.numel(name)} elements in the checkpoint and {mine[name]} "
                "in the model. Were embeddings resized after it was written?"
            )
        if name in shapes and list(engine.module.get_parameter(name).shape) != shapes[name]:
            raise CheckpointError(
                f"{directory}: parameter {name!r} has shape {shapes[name]} in the checkpoint and "
                f"{list(engine.module.get_parameter(name).shape)} in the model. Build the model as it was when the "
                "checkpoint was written."
            )


@torch.no_grad()
def _load_pieces(engine: ZeroEngine, reader: ShardReader, optimizer_states: bool) -> None:
    assert engine.parts.masters is not None
    for home, index, piece in engine.parts.masters.pieces():
        tensors = home.tensors(index)
        gathered: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for name, start, end, offset in _slots_of(engine.parts.layouts[piece.bucket], piece):
            kinds = reader.kinds(name) if optimizer_states else ["master"]
            for kind in kinds:
                values = reader.read(name, kind, start, end)
                if values is None:
                    continue
                if reader.is_whole(name, kind):
                    whole[kind] = values
                    continue
                if kind not in gathered:
                    base = tensors.get(kind)
                    gathered[kind] = (
                        torch.zeros(piece.numel, dtype=values.dtype)
                        if base is None or base.numel() != piece.numel
                        else base.detach().reshape(-1).float().cpu().clone()
                    )
                gathered[kind][offset : offset + end - start] = values
        shape = tensors["master"].shape
        home.load(index, {**whole, **{kind: flat.view(shape) for kind, flat in gathered.items()}})


def _restore_counts(engine: ZeroEngine, state: dict[str, Any]) -> None:
    engine.global_steps = state["global_steps"]
    engine.skipped_steps = state["skipped_steps"]
    engine.micro_steps = state["micro_steps"]
    if engine.scaler is not None and state["loss_scaler"] is not None:
        engine.scaler.load_state_dict(state["loss_scaler"])
    if engine.optimizer is not None:
        saved = [{**group, **_as_tuples(group)} for group in state["param_groups"]]
        if len(saved) == len(engine.optimizer.param_groups):
            engine.optimizer.load_state_dict({"param_groups": saved})


def _as_tuples(group: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) for key, value in group.items() if isinstance(value, list)}
