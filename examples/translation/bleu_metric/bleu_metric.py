"""BLEU and chrF over sacrebleu, as a metric module that ``evaluate.load(<this folder>)`` reads without a network."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import sacrebleu

_CITATION = "Matt Post. A Call for Clarity in Reporting BLEU Scores. WMT 2018."
_DESCRIPTION = "Corpus BLEU (13a tokens) and chrF2 of translations, each on a scale of 0 to 100."
_KWARGS = """
Args:
    predictions: translations, one string each.
    references: for each translation the list of its references; every list has the same length.
Returns:
    bleu, chrf: floats from 0 to 100. signature: how sacrebleu counted.
"""


class BleuMetric(evaluate.Metric):
    """One corpus-level score for all sentences together, not a mean over sentences."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        # sacrebleu wants streams: the first reference of every sentence, then the second, ...
        streams = [list(stream) for stream in zip(*references, strict=True)]
        bleu = sacrebleu.metrics.BLEU()
        chrf = sacrebleu.metrics.CHRF()
        return {
            "bleu": bleu.corpus_score(predictions, streams).score,
            "chrf": chrf.corpus_score(predictions, streams).score,
            "signature": str(bleu.get_signature()),
        }
