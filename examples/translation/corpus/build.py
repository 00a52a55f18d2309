"""Draw distinct pairs and split them: ``python -m corpus.build OUT_DIR`` writes the three JSON-lines files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

from corpus.draw import Both, Draw
from corpus.sentences import KINDS

SEED = 16
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 16000, 160, 160
MAX_WORDS = 9
"""Longer English sentences are passed over: every batch is padded to its longest row, and the demo has two cores."""


class Corpus(NamedTuple):
    train: list[Both]
    validation: list[Both]
    test: list[Both]


def draw_pairs(num_pairs: int, seed: int = SEED) -> list[Both]:
    """``num_pairs`` pairs in the order drawn; no English and no Romanian sentence occurs twice.

    So every split of them shares no sentence, in either language.
    """
    draw = Draw(seed)
    english: set[str] = set()
    romanian: set[str] = set()
    pairs: list[Both] = []
    while len(pairs) < num_pairs:
        pair = draw.weighted(KINDS)(draw)
        if pair is None or len(pair.en.split()) > MAX_WORDS or pair.en in english or pair.ro in romanian:
            continue
        english.add(pair.en)
        romanian.add(pair.ro)
        pairs.append(pair)
    return pairs


def build_corpus(
    num_train: int = NUM_TRAIN,
    num_validation: int = NUM_VALIDATION,
    num_test: int = NUM_TEST,
    seed: int = SEED,
) -> Corpus:
    """The same three splits for the same arguments, on every machine."""
    pairs = draw_pairs(num_train + num_validation + num_test, seed)
    held_out = num_validation + num_test
    return Corpus(pairs[held_out:], pairs[:num_validation], pairs[num_validation:held_out])


def write_corpus(corpus: Corpus, directory: Path) -> dict[str, Path]:
    """Write train.json, validation.json and test.json as run_translation.py reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for split, pairs in corpus._asdict().items():
        paths[split] = directory / f"{split}.json"
        lines = (json.dumps({"translation": {"en": en, "ro": ro}}, ensure_ascii=False) + "\n" for en, ro in pairs)
        paths[split].write_text("".join(lines), encoding="utf-8")
    return paths


if __name__ == "__main__":
    for name, path in write_corpus(build_corpus(), Path(sys.argv[1])).items():
        print(f"{name}: {path}")
