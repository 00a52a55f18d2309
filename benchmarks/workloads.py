"""Models of true size with random weights, and batches of random tokens for them.

Names: the fixed ones in ``MODELS``, or ``decoder-4096x32``: a llama of that width and number of layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

DISTINCT_BATCHES = 5
DEFAULT_DECODER_LENGTH = 1024

_LLAMA = {"kind": "llama", "vocab_size": 32000}
MODELS: dict[str, dict[str, Any]] = {
    "t5-tiny": {"kind": "t5", "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4},
    "t5-small": {"kind": "t5", "d_model": 512, "d_ff": 2048, "d_kv": 64, "num_layers": 6, "num_heads": 8},
    "t5-base": {"kind": "t5", "d_model": 768, "d_ff": 3072, "d_kv": 64, "num_layers": 12, "num_heads": 12},
    "decoder-3b": {
        **_LLAMA,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
    },
    "decoder-tiny": {
        **_LLAMA,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    },
}


def spec_of(name: str) -> dict[str, Any]:
    """What a model is made from.

    Raises:
        KeyError: no such model.
    """
    sized = re.fullmatch(r"decoder-(\d+)x(\d+)", name)
    if sized is None:
        return dict(MODELS[name])
    width, layers = int(sized[1]), int(sized[2])
    heads = max(4, width // 128)
    return {
        **_LLAMA,
        "hidden_size": width,
        "intermediate_size": -(-width * 8 // 3 // 256) * 256,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(2, heads // 4),
    }


def is_decoder(name: str) -> bool:
    return spec_of(name)["kind"] == "llama"


def _config(name: str, dropout: float | None) -> Any:
    spec = spec_of(name)
    if spec.pop("kind") == "t5":
        from transformers import T5Config

        if dropout is not None:
            spec["dropout_rate"] = dropout
        return T5Config(vocab_size=32128, decoder_start_token_id=0, **spec)
    from transformers import LlamaConfig

    return LlamaConfig(max_position_embeddings=8192, **spec)


def build_model(name: str, device: str, dropout: float | None = None, dtype: Any = None) -> Any:
    """A whole model, in fp32 unless ``dtype`` says otherwise, made where making it is fast."""
    import torch
    from transformers import LlamaForCausalLM, T5ForConditionalGeneration

    make = LlamaForCausalLM if is_decoder(name) else T5ForConditionalGeneration
    torch.manual_seed(0)  # the same weights on every rank, and in every process of a comparison
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device):
            return make(_config(name, dropout))
    finally:
        torch.set_default_dtype(before)


def build_sharded_model(name: str, dtype: Any, dropout: float | None = None) -> Any:
    """A model for stage 3, built under the engine's ``zero.Init`` (TrainingArguments must exist and stay alive).

    transformers leaves the weights of such a model unset. They are filled in one at a time through
    ``GatheredParameters``, which both engines have: normal weights as large as a trained model's, norms at one, T5's
    embedding as large as T5 itself makes it (its loss would hardly move in a few steps otherwise).
    """
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    make = AutoModelForCausalLM if is_decoder(name) else AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    model = make.from_config(_config(name, dropout), dtype=dtype)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    with torch.no_grad():
        for label, param in model.named_parameters():
            with deepspeed.zero.GatheredParameters(param, modifier_rank=0):
                if rank == 0:
                    is_norm, is_t5_embedding = param.ndim == 1 and label.endswith("weight"), label == "shared.weight"
                    fill_cheaply(param, 1.0 if is_norm else None, 1.0 if is_t5_embedding else 0.02)
    return model


def fill_cheaply(param: Any, constant: float | None, deviation: float = 0.02) -> None:
    """A constant, or normal values. On the host, drawing billions of them would take minutes: a
    block of a million is drawn once for each tensor and repeated at the speed of memory."""
    import torch

    if constant is not None or param.ndim < 2:
        param.fill_(constant if constant is not None else 0.0)
    elif param.device.type != "cpu":
        param.normal_(0.0, deviation)
    else:
        flat = param.view(-1)
        block = torch.empty(min(2**20, flat.numel()), dtype=torch.float32).normal_(0.0, deviation).to(param.dtype)
        whole = flat.numel() // block.numel()
        flat[: whole * block.numel()].view(whole, -1).copy_(block.expand(whole, -1))
        rest = flat[whole * block.numel() :]
        rest.copy_(block[: rest.numel()])


class TokenCount:
    """Tokens of every batch that was collated: real ones, and with padding. Source and target both count."""

    def __init__(self) -> None:
        self.real: list[int] = []
        self.padded: list[int] = []

    def per_batch(self, first: int, last: int) -> tuple[float, float]:
        """Means over batches [first, last)."""
        real, padded = self.real[first:last], self.padded[first:last]
        return sum(real) / max(1, len(real)), sum(padded) / max(1, len(padded))


def make_data(name: str, batch: int, steps: int, length: int | None) -> tuple[Any, Callable[[Any], Any], TokenCount]:
    """``steps`` global batches of ``batch`` rows, a collator, and what it counts.

    T5: sentence lengths log-normal around 35 tokens, as WMT16's are, or all of ``length``. Decoders: ``length`` tokens.
    """
    if is_decoder(name):
        return _decoder_rows(name, batch * steps, length or DEFAULT_DECODER_LENGTH)
    return _sentences(batch, steps, length)


def _decoder_rows(name: str, num_rows: int, length: int) -> tuple[Any, Callable[[Any], Any], TokenCount]:
    import numpy as np
    import torch

    rows = np.random.default_rng(0).integers(3, spec_of(name)["vocab_size"], (64, length))
    tokens = TokenCount()

    def collate(batch: list[int]) -> dict[str, Any]:
        ids = torch.from_numpy(np.stack([rows[index % len(rows)] for index in batch]))
        tokens.real.append(ids.numel())
        tokens.padded.append(ids.numel())
        return {"input_ids": ids, "labels": ids.clone()}

    return _indices(num_rows), collate, tokens


def _indices(num_rows: int) -> Any:
    """The data is made in the collator: an item is its own number."""
    from torch.utils.data import Dataset

    class Indices(Dataset):
        def __len__(self) -> int:
            return num_rows

        def __getitem__(self, index: int) -> int:
            return index

    return Indices()


def _sentences(batch: int, steps: int, length: int | None) -> tuple[Any, Callable[[Any], Any], TokenCount]:
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    # A handful of batches in turn: a matrix shape seen for the first time costs the libraries about as much host
    # time as the step itself, and in a real epoch shapes come back.
    distinct = batch * min(steps, DISTINCT_BATCHES)
    lengths = np.clip(rng.lognormal(3.4, 0.55, (distinct, 2)), 4, 128).astype(int)
    if length:
        lengths[:] = length
    pool = rng.integers(3, 32000, 4096)
    tokens = TokenCount()

    def sentence(index: int) -> tuple[list[int], list[int]]:
        source, target = lengths[index % distinct]
        start = (index * 37) % 3800
        return pool[start : start + source].tolist(), pool[start : start + target].tolist()

    def pad(rows: list[list[int]], value: int) -> Any:
        width = -(-max(len(row) for row in rows) // 8) * 8
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])

    def collate(batch_indices: list[int]) -> dict[str, Any]:
        pairs = [sentence(index) for index in batch_indices]
        ids, labels = pad([source for source, _ in pairs], 0), pad([target for _, target in pairs], -100)
        mask = (ids != 0).long()
        tokens.real.append(int(mask.sum() + (labels != -100).sum()))
        tokens.padded.append(ids.numel() + labels.numel())
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return _indices(batch * steps), collate, tokens


def is_large(name: str) -> bool:
    """About a billion parameters or more: two engines' copies of it do not fit into host memory at once."""
    spec = spec_of(name)
    return spec["kind"] == "llama" and spec["hidden_size"] ** 2 * spec["num_hidden_layers"] * 11 > 10**9
