"""BLEU through ``evaluate``, against sacrebleu itself."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import sacrebleu
from corpus.tokenizer import build_tokenizer
from errors import UserError
from metrics import IGNORED_LABEL, decode, load_bleu, scorer
from transformers import EvalPrediction, PreTrainedTokenizerBase

TEXTS = ["Fata citește o carte nouă.", "Băiatul mănâncă mărul roșu.", "Copiii s-au jucat în grădină."]
OTHERS = ["Fata citește o carte.", "Băiatul mănâncă un măr roșu.", "Copiii s-au jucat în parc."]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(TEXTS + OTHERS)


def as_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, fill: int) -> np.ndarray:
    rows = [tokenizer(text)["input_ids"] for text in texts]
    padded = np.full((len(rows), max(map(len, rows))), fill)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def test_metric_equals_sacrebleu() -> None:
    scores = load_bleu().compute(predictions=OTHERS, references=[[text] for text in TEXTS])
    assert scores["bleu"] == sacrebleu.corpus_bleu(OTHERS, [TEXTS]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(OTHERS, [TEXTS]).score
    assert "tok:13a" in scores["signature"]


def test_metric_takes_several_references() -> None:
    scores = load_bleu().compute(predictions=TEXTS, references=[list(row) for row in zip(OTHERS, TEXTS)])
    assert scores["bleu"] == pytest.approx(100)


def test_decoding_drops_padding_of_both_kinds(tokenizer: PreTrainedTokenizerBase) -> None:
    assert decode(as_ids(TEXTS, tokenizer, IGNORED_LABEL), tokenizer) == TEXTS
    assert decode(as_ids(TEXTS, tokenizer, 0), tokenizer) == TEXTS


def test_scorer_scores_what_the_trainer_hands_it(tokenizer: PreTrainedTokenizerBase) -> None:
    compute_metrics = scorer(tokenizer)
    generated, labels = as_ids(OTHERS, tokenizer, 0), as_ids(TEXTS, tokenizer, IGNORED_LABEL)
    scores = compute_metrics(EvalPrediction(predictions=generated, label_ids=labels))
    assert scores["bleu"] == round(sacrebleu.corpus_bleu(OTHERS, [TEXTS]).score, 4)
    assert scores["gen_len"] == pytest.approx(np.mean([len(tokenizer(t)["input_ids"]) for t in OTHERS]), abs=1e-4)
    assert compute_metrics(EvalPrediction(predictions=labels, label_ids=labels))["bleu"] == pytest.approx(100)


def test_cedillas_cost_points_unless_normalised() -> None:
    """As on the real text, whose references have the comma below."""
    cedilla = [text.replace("ș", "ş").replace("ț", "ţ") for text in TEXTS]
    tokenizer = build_tokenizer(TEXTS + cedilla)
    prediction = EvalPrediction(predictions=as_ids(cedilla, tokenizer, 0), label_ids=as_ids(TEXTS, tokenizer, 0))
    assert scorer(tokenizer)(prediction)["bleu"] < 90
    assert scorer(tokenizer, normalize_diacritics=True)(prediction)["bleu"] == pytest.approx(100)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import_for_real = builtins.__import__

    def import_without_evaluate(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "evaluate":
            raise ModuleNotFoundError("No module named 'evaluate'", name="evaluate")
        return import_for_real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", import_without_evaluate)
    with pytest.raises(UserError, match=r"'evaluate' is not installed(.|\n)*hf-zero-plugin\[examples\]"):
        load_bleu()
