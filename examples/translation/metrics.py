"""From token ids to BLEU: decoding, and the metric module that this example ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from data import to_comma_below
from errors import UserError, missing_extra
from transformers import EvalPrediction, PreTrainedTokenizerBase

METRIC_DIR = Path(__file__).resolve().parent / "bleu_metric"
IGNORED_LABEL = -100
"""The label that the loss passes over, and the value with which the Trainer pads what it gathers."""


def load_bleu() -> Any:
    """The shipped BLEU metric, through ``evaluate``; a local folder, so no network is asked.

    Raises:
        UserError: ``evaluate`` or ``sacrebleu`` is not installed.
    """
    try:
        import evaluate
        import sacrebleu  # noqa: F401  (named here so that the message names it)
    except ImportError as error:
        raise missing_extra(error.name or "evaluate", "BLEU (--predict_with_generate)") from error
    try:
        # In memory: ranks that score at the same time must not share a cache file.
        return evaluate.load(str(METRIC_DIR), keep_in_memory=True)
    except OSError as error:
        raise UserError(f"the BLEU metric in {METRIC_DIR} cannot be loaded: {error}") from error


def decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, *, normalize_diacritics: bool = False) -> list[str]:
    """Text of each row of token ids, padding and special tokens dropped."""
    ids = np.where(ids == IGNORED_LABEL, tokenizer.pad_token_id, ids)
    texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return [to_comma_below(text) for text in texts] if normalize_diacritics else texts


def scorer(
    tokenizer: PreTrainedTokenizerBase, *, normalize_diacritics: bool = False
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A ``compute_metrics`` for the Trainer: ``bleu``, ``chrf`` and ``gen_len``, the mean length in tokens.

    Loads the metric now rather than at the first score, so that a missing package is reported before hours of work.
    """
    metric = load_bleu()

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        generated = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        translations = decode(generated, tokenizer, normalize_diacritics=normalize_diacritics)
        references = decode(prediction.label_ids, tokenizer, normalize_diacritics=normalize_diacritics)
        scores = metric.compute(predictions=translations, references=[[text] for text in references])
        is_token = (generated != IGNORED_LABEL) & (generated != tokenizer.pad_token_id)
        return {
            "bleu": round(float(scores["bleu"]), 4),
            "chrf": round(float(scores["chrf"]), 4),
            "gen_len": round(float(is_token.sum(axis=-1).mean()), 4),
        }

    return compute_metrics
