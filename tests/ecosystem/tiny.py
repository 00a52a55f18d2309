"""What these scenes train: a tiny decoder, a tokenizer of 65 words, and the configurations of the checkout.

Sizes do not divide by two where they need not, so that two ranks get parts of different size.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

__all__ = ["config_file", "decoder", "rows", "sentences", "tokenizer"]

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WORDS = [f"w{number}" for number in range(61)]


def config_file(name: str, **zero: Any) -> dict[str, Any]:
    """A configuration of the checkout with changes in ``zero_optimization``.

    Without its schedule: the Trainer's own goes with the stock Trainer too.
    """
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    config["zero_optimization"].update(zero)
    config.pop("scheduler", None)
    return config


def decoder(**options: Any) -> Any:
    """A Llama of two layers, its embeddings tied to its head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "vocab_size": 65,
        "hidden_size": 16,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **options}))


def rows(number: int = 32, length: int = 9) -> list[dict[str, Any]]:
    """Token ids, all of one length, so that a batch of four weighs as much as two batches of two."""
    import torch

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 64, (number, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


def sentences(number: int, *, seed: int, words: int = 6) -> list[str]:
    """Texts that all have ``words`` words."""
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=words)) for _ in range(number)]


def tokenizer() -> Any:
    """One token a word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
