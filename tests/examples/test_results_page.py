"""Figures and RESULTS.md from a CSV; what the learning runs show, and that two engines learn the same."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import figures
import learning
import numpy as np
import pytest
import report
from errors import UserError
from measure.findings import Cells, largest_batch, memory, speed, verdict
from measure.findings_two import two_gpu_findings
from measure.learned import distance, learning_section
from measure.learning_figure import draw_learning
from measure.rows import FAILED, OK, OUT_OF_MEMORY, Row, read_rows, write_rows
from measure.spec import DATA_PARALLEL, DEEPSPEED, PLAIN, ZERO

from tests.examples.conftest import Workspace
from tests.examples.made_up import row as _row
from tests.examples.made_up import sweep as _sweep

# ------------------------------------------------------------------ figures and the page


def test_every_figure_is_drawn_for_which_there_are_rows(tmp_path: Path) -> None:
    one = {"gpu_memory", "cpu_utilisation", "epoch_time", "overview"}
    assert {path.stem for path in figures.draw_all(_sweep(), tmp_path)} == one
    both = [*_sweep(engines=(PLAIN, ZERO, DEEPSPEED)), *_sweep(num_gpus=2)]
    drawn = figures.draw_all(both, tmp_path / "two")
    assert {path.stem for path in drawn} == one | {"two_gpus_memory", "two_gpus_time", "one_and_two_gpus", "saved"}
    assert {path.suffix for path in drawn} == {".png", ".svg"}
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_same_rows_give_the_same_figure(tmp_path: Path) -> None:
    for name in ("a", "b"):
        figures.draw_all(_sweep(), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_figures_of_a_machine_without_gpu_leave_memory_out(tmp_path: Path) -> None:
    rows = [dataclasses.replace(row, gpu_allocated_gib=None) for row in _sweep() if row.status == OK]
    assert {path.stem for path in figures.draw_all(rows, tmp_path)} == {"cpu_utilisation", "epoch_time"}


def test_page_is_written_from_the_rows(tmp_path: Path) -> None:
    results = tmp_path / "results"
    limited = [
        _row("t5-base", engine, batch, gpu_memory_limit_gib=8.0, status=OK if batch <= fits else OUT_OF_MEMORY)
        for engine, fits in ((PLAIN, 4), (ZERO, 8))
        for batch in (4, 8, 16)
    ]
    write_rows(results / "sweep.csv", [*_sweep(), *limited])
    figures.draw_all(read_rows(results / "sweep.csv"), results / "figures")
    report.main(["--results", str(results), "--out", str(tmp_path / "RESULTS.md")])
    page = (tmp_path / "RESULTS.md").read_text()
    assert "{{" not in page
    assert "**Memory is lower with ZeRO: agrees.**" in page
    assert (
        "**t5-base reaches a batch twice as large: agrees.** Held to 8 GiB, the Trainer reaches batch 4, this one 8."
        in page
    )
    assert "(results/figures/gpu_memory.png)" in page
    assert "| 256 | out of memory |" in page
    assert "Is it learned" not in page, "no runs, no section"
    assert "Two GPUs were not measured" in page
    for target in re.findall(r"\]\(([^)]+)\)", page):
        assert (tmp_path / target).exists() or target == "results/sweep.json", f"{target} is linked and not there"


def test_page_elsewhere_finds_its_figures(tmp_path: Path) -> None:
    results = tmp_path / "results"
    write_rows(results / "sweep.csv", _sweep())
    figures.draw_all(read_rows(results / "sweep.csv"), results / "figures")
    (results / "learning.json").write_text(json.dumps({"runs": [_run(PLAIN, 4.0, 10.0), _run(ZERO, 4.0, 10.0)]}))
    report.main(["--results", str(results), "--out", str(tmp_path / "pages" / "R.md")])
    page = (tmp_path / "pages" / "R.md").read_text()
    assert "(../results/figures/overview.png)" in page
    assert "(../results/figures/learning.png)" in page
    (results / "learning.json").write_text('{"runs": [')
    with pytest.raises(UserError, match=r"learning.json, line 1, column .*: not JSON"):
        report.main(["--results", str(results), "--out", str(tmp_path / "R.md")])


def test_page_and_figures_say_that_there_was_no_gpu(tmp_path: Path) -> None:
    nothing = {"device": "cpu", "precision": "fp32", "num_cores": 2.0, "gpu_allocated_gib": None}
    nothing |= {"gpu_allocated_sum_gib": None, "gpu_reserved_gib": None}
    rows = [dataclasses.replace(row, **nothing) for row in _sweep() if row.status == OK]
    figure = figures.over_batch_size(rows, figures.TIME)
    assert figure is not None
    assert figure.get_suptitle().splitlines() == [
        "Time of one epoch, scaled from 30 steps, over batch size",
        "no GPU, fp32, 9,999 sentence pairs",
    ]
    assert "- No GPU: 1 process on a processor of 2 cores." in report.conditions(rows, tmp_path / "none")


def test_epochs_that_were_measured_whole_are_not_called_scaled() -> None:
    rows = [dataclasses.replace(row, is_full_epoch=True, epoch_seconds=9.0) for row in _sweep() if row.status == OK]
    figure = figures.over_batch_size(rows, figures.TIME)
    assert figure is not None
    assert figure.get_suptitle().startswith("Time of one epoch, over batch size")
    memory_figure = figures.over_batch_size(_sweep(), figures.MEMORY)
    assert memory_figure is not None
    assert "scaled" not in memory_figure.get_suptitle()


def test_what_cannot_be_drawn_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        figures.main(["--csv", str(tmp_path / "none.csv")])
    write_rows(tmp_path / "sweep.csv", [_row("t5-small", PLAIN, 1, status=FAILED)])
    with pytest.raises(UserError, match="no cell in it that could be drawn"):
        figures.main(["--csv", str(tmp_path / "sweep.csv"), "--out", str(tmp_path / "figures")])


def test_page_refuses_to_be_written_without_measurements(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing was measured yet"):
        report.main(["--results", str(tmp_path), "--out", str(tmp_path / "RESULTS.md")])
    write_rows(tmp_path / "sweep.csv", [_row("t5-small", PLAIN, 1)])
    with pytest.raises(UserError, match="both with and without"):
        report.main(["--results", str(tmp_path), "--out", str(tmp_path / "RESULTS.md")])
    assert not (tmp_path / "RESULTS.md").exists()


def test_findings_may_disagree_with_the_article() -> None:
    rows = [dataclasses.replace(row, gpu_allocated_gib=5.0) for row in _sweep() if row.status == OK]
    cells = Cells(rows)
    assert "does not agree" in memory(cells)
    assert "does not agree" in speed(cells).split("**")[1], "equal times are not slower"
    assert "twice as large" in largest_batch(cells)
    slow = [dataclasses.replace(r, epoch_seconds_scaled=9e9) if r.engine == ZERO else r for r in rows]
    assert "slower at small batches: agrees" in speed(Cells(slow))


def test_findings_of_two_gpus_are_read_off_the_rows() -> None:
    one, two = Cells(_sweep()), Cells(_sweep(num_gpus=2), num_gpus=2)
    (none,) = two_gpu_findings(one, Cells(_sweep(), num_gpus=2))
    assert "Two GPUs were not measured" in none
    equal = two_gpu_findings(one, two)
    assert "saved on two GPUs than on one: does not agree" in equal[0], "the same share is not more"
    assert "above a batch of about 52: does not agree" in equal[1], "the same time is not faster"
    assert "t5-base is not faster at the largest batch size that both reach, 128" in equal[1]
    assert equal[2].count("(median 2.00) times as fast") == 2

    def better(row: Row) -> Row:
        if row.engine != ZERO or row.status != OK:
            return row
        faster = 0.9 if row.batch_size >= 32 else 1.2
        less = {"gpu_allocated_sum_gib": 0.5 * (row.gpu_allocated_sum_gib or 0)}
        return dataclasses.replace(row, epoch_seconds_scaled=faster * (row.epoch_seconds_scaled or 0), **less)

    found = two_gpu_findings(one, Cells([better(row) for row in _sweep(num_gpus=2)], num_gpus=2))
    assert "saved on two GPUs than on one: agrees" in found[0]
    assert "above a batch of about 52: agrees" in found[1]
    assert "t5-small is faster from batch 32 on" in found[1]
    assert "DataParallel" not in found[1]
    engines = (PLAIN, ZERO, DATA_PARALLEL)
    assert "DataParallel): against that" in two_gpu_findings(one, Cells(_sweep(2, engines), num_gpus=2))[1]


def test_nothing_measured_is_no_agreement() -> None:
    assert verdict(0, 0) == "not measured"
    assert verdict(3, 3) == "agrees"
    assert verdict(0, 3) == "does not agree"
    assert verdict(2, 3) == "agrees in 2 of 3 cells"


def test_panels_of_a_figure_show_all_of_the_larger_one() -> None:
    rows = [dataclasses.replace(r, cpu_percent_mean=90.0 if r.model == "t5-base" else 5.0) for r in _sweep()]
    figure = figures.over_batch_size(rows, figures.CPU)
    assert figure is not None
    assert all(axes.get_ylim()[1] > 90 for axes in figure.axes)


# ------------------------------------------------------------------ learning


def _run(engine: str, loss: float, bleu: float) -> dict[str, Any]:
    return {
        "engine": engine, "num_parameters": 3e7, "num_train_pairs": 900, "batch_size": 8, "precision": "bf16",
        "steps": 40, "loss": [[20, loss], [40, loss / 2]], "bleu": {"newstest2016": [[40, bleu]]},
        "examples": [{"source": "a", "translation": "b", "reference": "c"}],
    }  # fmt: skip


def test_curves_are_the_same_within_what_the_page_says() -> None:
    plain = _run(PLAIN, 4.0, 10.0)
    near, far, worse = _run(ZERO, 4.04, 11.0), _run(ZERO, 4.4, 10.0), _run(ZERO, 4.0, 7.0)
    assert distance(plain, near) == pytest.approx((0.01, 2, 1.0))
    assert distance(plain, near).is_same
    assert not distance(plain, far).is_same
    assert not distance(plain, worse).is_same
    table = learning_section({"runs": [plain, near]})
    assert "|  | steps | loss, at step 40 | BLEU, newstest2016, at step 40 |\n" in table
    assert "at its end" not in table
    near["loss"].pop()
    near["loss"].append([50, 1.5])
    table = learning_section({"runs": [plain, near]})
    assert "| loss, at step 20 | loss, at its end |" in table, "runs of different lengths are compared where both were"
    assert "| this engine | 40 | 4.040 | 1.500 | 11.0 |" in table
    near["loss"].pop()
    assert distance(plain, near).num_entries == 1, "a run that stopped sooner is compared as far as it went"
    assert "**The same curve with and without the engine: Yes.**" in learning_section({"runs": [plain, near]})
    assert "engine: No.**" in learning_section({"runs": [plain, far]})
    assert "same curve" not in learning_section({"runs": [plain]})


def test_half_of_a_comparison_does_not_replace_a_whole_one(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_plain(specs: Any, outs: dict[str, Path], options: Any) -> None:
        outs[PLAIN].write_text(json.dumps(_run(PLAIN, 4.0, 10.0)))

    monkeypatch.setattr(learning, "run_together", only_plain)
    (tmp_path / "learning.json").write_text("of an earlier run")
    with pytest.raises(SystemExit) as ended:
        learning.main(["--out", str(tmp_path), "--train", str(workspace.files["train"]), *_tokenizer(workspace)])
    assert ended.value.code == 1
    assert (tmp_path / "learning.json").read_text() == "of an earlier run"
    assert len(json.loads((tmp_path / "learning_incomplete.json").read_text())["runs"]) == 1


def _tokenizer(workspace: Workspace) -> list[str]:
    return ["--tokenizer", str(workspace.tokenizer), "--model", "t5-demo"]


@pytest.mark.slow
def test_learning_gives_the_same_curve_with_and_without(workspace: Workspace, tmp_path: Path) -> None:
    learning.main(
        [
            "--train", str(workspace.files["train"]), "--tokenizer", str(workspace.tokenizer), "--model", "t5-demo",
            "--test", f"other={workspace.files['test']}", "--hold-out", "4", "--steps", "6", "--eval-steps", "3",
            "--batch-size", "8", "--warmup", "2", "--max-length", "16", "--out", str(tmp_path),
        ]
    )  # fmt: skip
    plain, ours = json.loads((tmp_path / "learning.json").read_text())["runs"]
    assert (plain["engine"], ours["engine"]) == (PLAIN, ZERO)
    assert np.array(ours["loss"]) == pytest.approx(np.array(plain["loss"]), rel=1e-3)
    assert list(ours["bleu"]) == ["held out of the training text", "other"]
    assert [step for step, _ in ours["bleu"]["other"]] == [3, 6]
    assert len(ours["examples"]) == 3
    assert {path.name for path in draw_learning([plain, ours], tmp_path)} == {"learning.png", "learning.svg"}
    section = learning_section({"runs": [plain, ours]})
    assert section.count("translated:") == 3
