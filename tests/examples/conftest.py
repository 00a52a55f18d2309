"""The example's modules are found as its scripts find them: in their own folder, first on the path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "translation"
sys.path.insert(0, str(EXAMPLE))

TINY = "d_model=16,d_ff=32,d_kv=8,num_layers=1,num_heads=2"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


class Workspace:
    """A folder with a small corpus and its tokenizer, and the arguments that train a tiny T5 on them."""

    def __init__(self, folder: Path) -> None:
        from corpus.build import build_corpus, write_corpus
        from corpus.tokenizer import save_tokenizer

        corpus = build_corpus(num_train=64, num_validation=8, num_test=8)
        self.folder = folder
        self.files = write_corpus(corpus, folder / "data")
        self.tokenizer = folder / "tokenizer"
        save_tokenizer([text for pair in corpus.train for text in pair], self.tokenizer)

    def arguments(self, output_dir: Path) -> list[str]:
        return [
            "--config_name", "preset:t5-demo", "--config_overrides", TINY, "--tokenizer_name", str(self.tokenizer),
            "--source_lang", "en", "--target_lang", "ro", "--output_dir", str(output_dir),
            "--train_file", str(self.files["train"]), "--validation_file", str(self.files["validation"]),
            "--test_file", str(self.files["test"]), "--max_source_length", "32", "--max_target_length", "16",
            "--per_device_train_batch_size", "16", "--disable_tqdm", "true", "--use_cpu",
        ]  # fmt: skip


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("translation"))


@pytest.fixture
def run_script() -> Run:
    """Run run_translation.py as a user does: its own process, no launcher, no network."""

    def run(
        arguments: Sequence[str], launcher: Sequence[str] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *launcher, str(EXAMPLE / "run_translation.py"), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    """JSON lines; a string is written as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def pair(en: object, ro: object) -> dict[str, dict[str, object]]:
    return {"translation": {"en": en, "ro": ro}}
