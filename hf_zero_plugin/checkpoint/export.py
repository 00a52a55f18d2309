"""``hf-zero export``: a training checkpoint -> one set of fp32 (or half) safetensors that ``from_pretrained`` reads."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_zero_plugin.checkpoint.format import MODULE_FILE, STATE_FILE, ShardReader, newest_tag, reading
from hf_zero_plugin.checkpoint.stream import stream_safetensors
from hf_zero_plugin.errors import CheckpointError

__all__ = ["add_parser", "export", "run", "save_weights"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_INDEX = "model.safetensors.index.json"
_COMPANIONS = (
    *("config.json", "generation_config.json", "configuration_*.py", "modeling_*.py", "tokenization_*.py"),
    *("*tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("*processor_config.json", "chat_template*"),
)
"""What ``save_pretrained`` writes beside weights, as patterns of file names."""
MAX_FILE_BYTES = 5 * 10**9


def save_weights(
    state: dict[str, Tensor],
    directory: str | Path,
    filename: str = "model.safetensors",
    *,
    values: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Write one safetensors file, tensor by tensor; those that share memory are written once, under their first name.

    ``values`` gives the values of a tensor that has none yet (on the meta device).
    """
    seen: set[tuple[int, torch.Size]] = set()
    unique: dict[str, Tensor] = {}
    for name, tensor in state.items():
        identity = (id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape)
        if identity not in seen:
            seen.add(identity)
            unique[name] = tensor
    Path(directory).mkdir(parents=True, exist_ok=True)
    stream_safetensors(unique, Path(directory) / filename, {"format": "pt"}, values=values)


def _find(checkpoint: Path, tag: str | None) -> Path:
    if (checkpoint / MODULE_FILE).is_file():
        return checkpoint
    tag = tag or newest_tag(checkpoint)
    if tag is None or not (checkpoint / tag / MODULE_FILE).is_file():
        raise CheckpointError(
            f"{checkpoint}: no checkpoint of this engine here (looked for global_step*/{MODULE_FILE}). "
            "Give the checkpoint-N folder that the Trainer wrote."
        )
    return checkpoint / tag


def _weights(reader: ShardReader, directory: Path) -> Iterator[tuple[str, Tensor]]:
    with reading(directory / STATE_FILE) as file:
        state = json.loads(file.read_text())
    shapes = state.get("shapes", {})
    for name in sorted(reader.params):
        flat = reader.read(name, "master", 0, reader.numel(name))
        assert flat is not None
        yield name, flat.view(shapes.get(name, [-1]))
    with reading(directory / MODULE_FILE) as file:
        untrained = load_file(file)
    transient = set(state.get("transient", ()))
    yield from ((name, tensor) for name, tensor in untrained.items() if name not in transient)


def _in_files(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    batch: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if batch and size + num_bytes > limit:
            yield batch
            batch, size = {}, 0
        batch[name] = tensor
        size += num_bytes
    yield batch


def export(checkpoint: Path, output: Path, *, tag: str | None = None, dtype: str = "fp32") -> list[Path]:
    """Write the weights of a checkpoint, read slice by slice: at most one file is in memory.

    What the Trainer has saved beside the checkpoint (config.json, the tokenizer) is copied, so that the output loads.

    Args:
        checkpoint: a checkpoint-N folder, or a global_stepN folder in it.
        output: folder to write ``model.safetensors`` to, or ``model-0000i-of-0000n.safetensors`` and their index;
            may be the checkpoint-N folder itself.
        dtype: "fp32" (the master weights as they are), "fp16" or "bf16".

    Returns:
        The files written.

    Raises:
        CheckpointError: there is no checkpoint, or it is incomplete.
    """
    directory = _find(checkpoint, tag)
    reader = ShardReader(directory)
    output.mkdir(parents=True, exist_ok=True)
    wanted = _DTYPES[dtype]
    cast = ((n, t.to(wanted) if t.is_floating_point() else t) for n, t in _weights(reader, directory))
    temporary: list[tuple[Path, list[str], int]] = []
    for number, batch in enumerate(_in_files(cast, MAX_FILE_BYTES), start=1):
        path = output / f"model-{number:05d}.tmp"
        save_file({n: t.contiguous() for n, t in batch.items()}, path, metadata={"format": "pt"})
        temporary.append((path, list(batch), sum(t.numel() * t.element_size() for t in batch.values())))
    _copy_companions(directory.parent, output)
    return _name_files(output, temporary)


def _copy_companions(source: Path, output: Path) -> None:
    """The model's configuration and tokenizer, which ``from_pretrained`` asks for; files that are there stay."""
    for file in (file for pattern in _COMPANIONS for file in source.glob(pattern)):
        if file.is_file() and not (output / file.name).exists():
            shutil.copyfile(file, output / file.name)


def _name_files(output: Path, temporary: list[tuple[Path, list[str], int]]) -> list[Path]:
    # An earlier set of another number of files must not be read in this one's place.
    for stale in [output / _INDEX, output / "model.safetensors", *output.glob("model-*-of-*.safetensors")]:
        stale.unlink(missing_ok=True)
    if len(temporary) == 1:
        return [temporary[0][0].rename(output / "model.safetensors")]
    files, weight_map = [], {}
    for number, (path, names, _) in enumerate(temporary, start=1):
        final = path.rename(output / f"model-{number:05d}-of-{len(temporary):05d}.safetensors")
        files.append(final)
        weight_map.update(dict.fromkeys(names, final.name))
    index = {"metadata": {"total_size": sum(size for *_, size in temporary)}, "weight_map": weight_map}
    (output / _INDEX).write_text(json.dumps(index, indent=1))
    return files


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("export", help="turn a training checkpoint into safetensors")
    parser.add_argument("checkpoint", type=Path, help="checkpoint-N folder that the Trainer wrote")
    parser.add_argument("output", type=Path, help="folder to write model.safetensors to, the same one if you like")
    parser.add_argument("--tag", help="global_stepN to take; default: the newest")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="fp32")


def run(args: argparse.Namespace) -> int:
    for path in export(args.checkpoint, args.output, tag=args.tag, dtype=args.dtype):
        print(path)
    return 0
