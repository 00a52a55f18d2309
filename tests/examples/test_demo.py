"""demo.py: what it prepares, the command it runs, the tables it shows, and a short run of the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from demo import memory_table, parse_options, prepare, some_translations, training_command
from rich.console import Console

from tests.examples.conftest import EXAMPLE


def shown(table: object) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_preparation_is_the_same_each_time(tmp_path: Path) -> None:
    first, second = prepare(tmp_path / "a", 200), prepare(tmp_path / "b", 200)
    assert first.train.read_bytes() == second.train.read_bytes()
    name = "tokenizer.json"
    assert (first.tokenizer / name).read_bytes() == (second.tokenizer / name).read_bytes()


def test_plain_differs_from_ours_only_in_launcher_config_and_its_schedule(tmp_path: Path) -> None:
    files = prepare(tmp_path, 10)
    ours = training_command(files, tmp_path, parse_options([]))
    plain = training_command(files, tmp_path, parse_options(["--plain", "--max_steps", "1"]))
    script = ours.index("examples/translation/run_translation.py")
    assert ours[script + 1 : script + 3] == ["--deepspeed", "configs/zero2_offload.json"]
    assert plain[2:4] == ["--lr_scheduler_type", "constant_with_warmup"]
    assert [*ours[script + 3 :], "--max_steps", "1"] == plain[4:]


def test_memory_is_shown_by_kind_and_place() -> None:
    mib = 2**20
    text = shown(
        memory_table({"host": {"moments": 8 * mib, "master weights": 4 * mib}, "device": {"weights": 2 * mib}})
    )
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    assert list(rows) == ["weights", "master weights", "moments", "all"]
    assert "8.0" in rows["moments"]
    assert "12.0" in rows["all"]
    assert "not available" in shown(memory_table(None))


def test_examples_shown_are_pairs_of_the_same_line(tmp_path: Path) -> None:
    files = prepare(tmp_path, 10)
    rows = [json.loads(line)["translation"] for line in files.test.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "generated_predictions.txt").write_text("".join(f"{row['ro']}\n" for row in rows), encoding="utf-8")
    chosen = some_translations(tmp_path, files.test)
    assert len(chosen) == 3
    assert all(translated == reference for _, translated, reference in chosen)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--plain"]], ids=["engine", "stock"])
def test_a_short_demo_writes_every_result(tmp_path: Path, flags: list[str]) -> None:
    done = subprocess.run(
        [
            sys.executable, str(EXAMPLE / "demo.py"), *flags, "--out_dir", str(tmp_path), "--num_train_pairs", "320",
            "--num_train_epochs", "1", "--config_overrides", "d_model=32,num_layers=1",
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert {"before_bleu", "predict_bleu", "train_steps_per_second"} <= results.keys()
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 10
    assert (tmp_path / "model.safetensors").is_file()
    assert "BLEU after" in done.stdout
    assert "10/10" in done.stderr, "the progress bar"
    if flags:
        assert "not available" in done.stdout
    else:
        memory = json.loads((tmp_path / "memory.json").read_text())
        # The optimizer is offloaded: its master weights and moments are on the host alone.
        assert memory["host"]["moments"] == 2 * memory["host"]["master weights"] > 0
        assert not memory["device"].get("moments")
