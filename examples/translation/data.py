"""Sentence pairs: read from JSON lines or the hub, cleaned, tokenised, batched.

JSON lines need nothing but torch and a tokenizer; only --dataset_name imports ``datasets``.

Shape letters: B = rows of a batch, S = source tokens, T = target tokens.
"""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from arguments import DataArguments, ModelArguments, field_of
from errors import UserError, missing_extra
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("translation")

SHAPE_OF_A_LINE = '{"translation": {"en": "...", "ro": "..."}}'
_COMMA_BELOW = str.maketrans("ŞşŢţ", "ȘșȚț")
_ROWS_PER_TOKENIZER_CALL = 1000


class Pair(NamedTuple):
    source: str
    target: str


@dataclass
class ReadReport:
    """What became of the rows of one split."""

    num_used: int = 0
    num_without_language: int = 0
    num_empty: int = 0

    @property
    def num_skipped(self) -> int:
        return self.num_without_language + self.num_empty


def to_comma_below(text: str) -> str:
    """Composed (NFC) text in which s and t with cedilla, a legacy of old fonts, have the comma below."""
    return unicodedata.normalize("NFC", text).translate(_COMMA_BELOW)


def iter_json_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The ``translation`` object of each line; blank lines are passed over.

    Raises:
        UserError: a line is not JSON, not UTF-8, or has another shape; the message has its number.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}). Convert the file.") from error
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}, column {error.colno}: not JSON ({error.msg}). "
                    f"Every line must be one object such as {SHAPE_OF_A_LINE}."
                ) from error
            if not isinstance(row, dict) or not isinstance(row.get("translation"), dict):
                raise UserError(
                    f"{path}, line {number}: no object 'translation'. Every line must look like {SHAPE_OF_A_LINE}."
                )
            yield row["translation"]


def iter_hub_rows(split: str, data: DataArguments, model: ModelArguments) -> Iterator[dict[str, Any]]:
    """The ``translation`` column of one split of --dataset_name.

    Raises:
        UserError: ``datasets`` is missing, the hub cannot be reached, or it has no such dataset or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "--dataset_name") from error
    name = f"{data.dataset_name}" + (f" ({data.dataset_config_name})" if data.dataset_config_name else "")
    try:
        table = datasets.load_dataset(
            data.dataset_name, data.dataset_config_name, split=split, cache_dir=model.cache_dir, token=model.token
        )
    except Exception as error:  # datasets, huggingface_hub, requests and pyarrow each have their own
        reason = str(error).strip().splitlines()
        raise UserError(
            f"dataset {name}, split '{split}', cannot be loaded: {type(error).__name__}: "
            f"{reason[0] if reason else 'no further message'}\n"
            "Without a network, pass --train_file, --validation_file, --test_file (JSON lines), or download it "
            "once on a connected machine and set HF_HOME to that cache."
        ) from error
    if "translation" not in table.column_names:
        raise UserError(f"dataset {name} has no column 'translation', only {', '.join(table.column_names)}.")
    for row in table:
        yield row["translation"]


def read_pairs(
    rows: Iterable[dict[str, Any]],
    data: DataArguments,
    max_pairs: int | None,
    origin: str,
) -> list[Pair]:
    """Collect up to ``max_pairs`` usable pairs; rows that are empty or lack a language are counted and skipped.

    Raises:
        UserError: no row is usable.
    """
    source_key, target_key = field_of(str(data.source_lang)), field_of(str(data.target_lang))
    report = ReadReport()
    pairs: list[Pair] = []
    keys_seen: set[str] = set()
    for row in rows:
        if max_pairs is not None and len(pairs) >= max_pairs:
            break
        keys_seen.update(row)
        texts = [row.get(key) for key in (source_key, target_key)]
        if not all(isinstance(text, str) for text in texts):
            report.num_without_language += 1
            continue
        source, target = (_clean(str(text), key, data) for text, key in zip(texts, (source_key, target_key)))
        if not source or not target:
            report.num_empty += 1
            continue
        pairs.append(Pair(source, target))
    report.num_used = len(pairs)
    _say_what_was_skipped(report, origin, source_key, target_key)
    if not pairs:
        raise UserError(
            f"{origin}: no usable row for {source_key} -> {target_key}: {report.num_without_language} lack a language, "
            f"{report.num_empty} are empty. Languages seen: {', '.join(sorted(keys_seen)) or 'none'}. "
            "Check --source_lang and --target_lang."
        )
    return pairs


def _clean(text: str, key: str, data: DataArguments) -> str:
    if data.normalize_diacritics and key == "ro":
        text = to_comma_below(text)
    return text.strip()


def _say_what_was_skipped(report: ReadReport, origin: str, source_key: str, target_key: str) -> None:
    if report.num_skipped:
        logger.warning(
            "%s: %d pairs used, %d rows skipped (%d lack '%s' or '%s', %d are empty).",
            origin, report.num_used, report.num_skipped,
            report.num_without_language, source_key, target_key, report.num_empty,
        )  # fmt: skip
    else:
        logger.info("%s: %d pairs used, none skipped.", origin, report.num_used)


class TokenisedPairs(Dataset[dict[str, list[int]]]):
    """Token ids of all pairs, end to end in two flat arrays: 600,000 pairs stay near 200 MiB."""

    def __init__(self, inputs: list[np.ndarray], labels: list[np.ndarray]) -> None:
        self._inputs, self._input_ends = _lay_end_to_end(inputs)
        self._labels, self._label_ends = _lay_end_to_end(labels)

    def __len__(self) -> int:
        return len(self._input_ends) - 1

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {
            "input_ids": self._inputs[self._input_ends[index] : self._input_ends[index + 1]].tolist(),
            "labels": self._labels[self._label_ends[index] : self._label_ends[index + 1]].tolist(),
        }

    def count_label(self, token_id: int) -> int:
        return int((self._labels == token_id).sum())


def _lay_end_to_end(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    ends = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=ends[1:])
    return np.concatenate(rows), ends


def tokenise(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: str,
    max_source_length: int,
    max_target_length: int,
) -> TokenisedPairs:
    """Token ids of every pair, cut to the limits (the end-of-sentence token included)."""
    inputs: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for start in range(0, len(pairs), _ROWS_PER_TOKENIZER_CALL):
        chunk = pairs[start : start + _ROWS_PER_TOKENIZER_CALL]
        sources = [prefix + pair.source for pair in chunk]
        targets = [pair.target for pair in chunk]
        source_ids = tokenizer(sources, max_length=max_source_length, truncation=True)["input_ids"]
        target_ids = tokenizer(text_target=targets, max_length=max_target_length, truncation=True)["input_ids"]
        inputs.extend(np.asarray(ids, dtype=np.int32) for ids in source_ids)
        labels.extend(np.asarray(ids, dtype=np.int32) for ids in target_ids)
    dataset = TokenisedPairs(inputs, labels)
    num_unknown = 0 if tokenizer.unk_token_id is None else dataset.count_label(tokenizer.unk_token_id)
    if num_unknown:
        logger.warning(
            "%d target tokens are unknown to the tokenizer: the model can neither read nor write that text.",
            num_unknown,
        )
    return dataset


@dataclass
class PairCollator:
    """Pads rows into one batch: ``input_ids``, ``attention_mask`` (B, S), ``labels`` (B, T), all int64."""

    pad_id: int
    label_pad_id: int
    source_length: int | None = None
    """Pad to this length; None pads to the longest row."""
    target_length: int | None = None
    multiple_of: int = 1
    """Round lengths up: half-precision matrix units want multiples of 8."""
    decoder_inputs_of: Callable[..., Tensor] | None = None
    """The model's shift of labels to decoder inputs, needed when the loss is not the model's own (smoothing)."""

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        input_ids_BS = self._pad([row["input_ids"] for row in rows], self.pad_id, self.source_length)
        labels_BT = self._pad([row["labels"] for row in rows], self.label_pad_id, self.target_length)
        lengths_B = torch.tensor([len(row["input_ids"]) for row in rows])
        attention_mask_BS = (torch.arange(input_ids_BS.shape[1]) < lengths_B[:, None]).long()
        batch = {"input_ids": input_ids_BS, "attention_mask": attention_mask_BS, "labels": labels_BT}
        if self.decoder_inputs_of is not None:
            batch["decoder_input_ids"] = self.decoder_inputs_of(labels=labels_BT)
        return batch

    def _pad(self, rows: list[list[int]], value: int, fixed_length: int | None) -> Tensor:
        length = fixed_length or max(len(row) for row in rows)
        length += -length % self.multiple_of
        padded = torch.full((len(rows), length), value, dtype=torch.long)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        return padded
