"""Sentence pairs -> token ids -> the batches that stand for an epoch.

Measuring every step of an epoch at batch 1 takes most of an hour a cell, so a cell may train on a sample of the epoch's
batches. Two things must still be those of the epoch. Peak memory: the first batch is the epoch's largest. Step time:
the others lie at even distances in the order of size, and come in turn, so that each shape is seen in the warm-up (a
matrix shape that is new costs the host about as much as the step itself, and in a real epoch shapes come back).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from data import SHAPE_OF_A_LINE, Pair, PairCollator, TokenisedPairs, iter_json_lines, to_comma_below, tokenise
from errors import UserError
from metrics import IGNORED_LABEL
from torch.utils.data import Dataset

PREFIX = "translate English to Romanian: "
MULTIPLE_OF = 8
"""Lengths are padded to a multiple of this: few shapes, and half-precision matrix units want it."""
NUM_DISTINCT = 5


class Schedule(NamedTuple):
    """The order in which an experiment takes the samples, and how many steps the whole epoch has."""

    rows: list[int]
    epoch_steps: int


class Chosen(Dataset[dict[str, list[int]]]):
    """``pairs`` in the order of ``rows``; a row may come more than once."""

    def __init__(self, pairs: TokenisedPairs, rows: list[int]) -> None:
        self._pairs, self._rows = pairs, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self._pairs[self._rows[index]]


def read_pairs(path: Path, max_pairs: int | None = None, *, comma_below: bool = False) -> list[Pair]:
    """Usable pairs of a file of JSON lines, in order.

    Raises:
        UserError: a line is damaged or lacks a language, or no pair is usable.
    """
    pairs: list[Pair] = []
    for number, row in enumerate(iter_json_lines(path), start=1):
        if max_pairs is not None and len(pairs) >= max_pairs:
            break
        texts = [row.get(language) for language in ("en", "ro")]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{path}, pair {number}: needs text in 'en' and 'ro', has {', '.join(row) or 'nothing'}. "
                f"Every line must look like {SHAPE_OF_A_LINE}."
            )
        source, target = (str(text).strip() for text in texts)
        if source and target:
            pairs.append(Pair(source, to_comma_below(target) if comma_below else target))
    if not pairs:
        raise UserError(f"{path}: no usable pair in it. Every line must look like {SHAPE_OF_A_LINE}.")
    return pairs


def load_tokenizer(folder: str) -> Any:
    """Raises UserError: the folder holds none that transformers can load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers, tokenizers and json each have their own
        reason = str(error).strip().splitlines() or ["no further message"]
        raise UserError(f"--tokenizer {folder}: cannot be loaded: {type(error).__name__}: {reason[0]}") from error


def check_vocabulary(tokenizer: Any, preset: dict[str, Any], name: str) -> None:
    """Raises UserError: the model has no row for some tokens."""
    if len(tokenizer) > preset["vocab_size"]:
        raise UserError(
            f"--tokenizer has {len(tokenizer):,} tokens, {name} knows {preset['vocab_size']:,}. "
            "Take another tokenizer or another model."
        )


def tokenised(pairs: list[Pair], tokenizer: Any, max_length: int) -> TokenisedPairs:
    return tokenise(pairs, tokenizer, prefix=PREFIX, max_source_length=max_length, max_target_length=max_length)


def collator(tokenizer: Any) -> PairCollator:
    return PairCollator(pad_id=tokenizer.pad_token_id, label_pad_id=IGNORED_LABEL, multiple_of=MULTIPLE_OF)


def whole_epoch(pairs: TokenisedPairs, step_rows: int, seed: int) -> Schedule:
    """Every sample once, shuffled; ``step_rows`` samples a step."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    return Schedule(order.tolist(), -(-len(pairs) // step_rows))


def sampled_epoch(pairs: TokenisedPairs, step_rows: int, num_steps: int, seed: int) -> Schedule:
    """``num_steps`` steps: the epoch's largest batch, then NUM_DISTINCT batches of evenly spaced sizes in turn."""
    epoch = whole_epoch(pairs, step_rows, seed)
    lengths = np.array([[len(pairs[row]["input_ids"]), len(pairs[row]["labels"])] for row in range(len(pairs))])
    num_batches = max(1, len(epoch.rows) // step_rows)
    batches = [epoch.rows[start * step_rows : (start + 1) * step_rows] for start in range(num_batches)]
    while len(batches[0]) < step_rows:  # fewer samples than one step takes
        batches[0] = (batches[0] + epoch.rows)[:step_rows]
    padded = [-(-lengths[rows].max(axis=0) // MULTIPLE_OF) * MULTIPLE_OF for rows in batches]
    by_size = sorted(range(num_batches), key=lambda index: (int(padded[index].sum()), index))
    places = [int((number + 0.5) * num_batches / NUM_DISTINCT) for number in range(NUM_DISTINCT)]
    distinct = [by_size[place] for place in places]
    sequence = [by_size[-1], *(distinct[number % NUM_DISTINCT] for number in range(num_steps - 1))]
    return Schedule([row for index in sequence for row in batches[index]], epoch.epoch_steps)
