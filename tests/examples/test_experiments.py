"""The sweep: what it writes, that it goes on where it was, that a process's death costs only its cells; figures and
RESULTS.md from a CSV."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import experiments
import figures
import learning
import numpy as np
import pytest
import report
from data import TokenisedPairs
from errors import UserError
from measure import texts
from measure.child import Events, run_process
from measure.findings import Cells, largest_batch, memory, speed, verdict
from measure.findings_two import two_gpu_findings
from measure.learned import distance, learning_section
from measure.learning_figure import draw_learning
from measure.limit import TimeLimit
from measure.plan import Wanted, keys_of, plan
from measure.rows import FAILED, OK, OUT_OF_MEMORY, Row, read_rows, write_rows
from measure.spec import DATA_PARALLEL, DEEPSPEED, PLAIN, ZERO, Spec
from measure.usage import _interpolate, _per_second, num_cores

from tests.examples.conftest import Workspace

BATCHES = [2**power for power in range(9)]


def _row(model: str, engine: str, batch: int, num_gpus: int = 1, **changes: object) -> Row:
    """A made-up measurement with the proportions of a real one."""
    size = 3.4 if model == "t5-base" else 1.0
    memory_gib = size * (1.0 if engine == PLAIN else 0.4) + 0.4 * batch * (1.0 if engine == PLAIN else 0.8)
    step = max(0.2, 0.002 * batch) * (1.9 if engine == DEEPSPEED else 1.0)
    values: dict[str, object] = {
        "num_gpus": num_gpus, "device": "NVIDIA H200", "precision": "fp16", "num_parameters": int(size * 6e7),
        "num_samples": 9999, "epoch_steps": -(-9999 // (batch * num_gpus)), "measured_steps": 30,
        "step_seconds_median": step, "epoch_seconds_scaled": step * -(-9999 // (batch * num_gpus)),
        "gpu_allocated_sum_gib": num_gpus * memory_gib,
        "gpu_allocated_gib": memory_gib, "gpu_reserved_gib": memory_gib + 0.5, "cpu_percent_mean": 7.0,
        "cpu_seconds_per_second": 1.1, "cpu_percent_per_second": "6.5;7.5", "loss_warmup": 10.25, "loss": 9.5,
    }  # fmt: skip
    return Row(model=model, engine=engine, batch_size=batch, **{**values, **changes})  # type: ignore[arg-type]


def _sweep(num_gpus: int = 1, engines: tuple[str, ...] = (PLAIN, ZERO)) -> list[Row]:
    rows = [_row(m, e, b, num_gpus) for m in ("t5-small", "t5-base") for e in engines for b in BATCHES]
    lost = Row(model="t5-base", engine=PLAIN, batch_size=256, num_gpus=num_gpus, status=OUT_OF_MEMORY)
    return [lost if row.key == lost.key else row for row in rows]


# ------------------------------------------------------------------ rows


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = [*_sweep(), Row(model="m", engine=PLAIN, batch_size=1, is_full_epoch=True, epoch_seconds=3.5)]
    write_rows(tmp_path / "sweep.csv", rows)
    read = read_rows(tmp_path / "sweep.csv")
    assert len(read) == len(rows)
    for row, again in zip(rows, read, strict=True):
        for field in dataclasses.fields(Row):
            expected = getattr(row, field.name)
            found = getattr(again, field.name)
            assert found == (pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected), field.name
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.csv"]


def test_newest_row_of_a_cell_counts(tmp_path: Path) -> None:
    old, new = _row("t5-small", PLAIN, 4, status=FAILED), _row("t5-small", PLAIN, 4)
    write_rows(tmp_path / "sweep.csv", [old, new])
    assert [row.status for row in read_rows(tmp_path / "sweep.csv")] == [OK]


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column batch_size, engine, model, status"):
        read_rows(tmp_path / "sweep.csv")


# ------------------------------------------------------------------ batches


def _pairs(count: int) -> TokenisedPairs:
    lengths = random.Random(0).choices(range(3, 60), k=2 * count)
    arrays = [np.arange(length, dtype=np.int32) for length in lengths]
    return TokenisedPairs(arrays[:count], arrays[count:])


@pytest.mark.parametrize("batch", [1, 4, 64, 256])
def test_sample_of_an_epoch_begins_with_its_largest_batch(batch: int) -> None:
    pairs, num_steps = _pairs(200), 14
    schedule = texts.sampled_epoch(pairs, batch, num_steps, seed=1)
    assert schedule.epoch_steps == -(-200 // batch)
    assert len(schedule.rows) == batch * num_steps

    def size(rows: list[int]) -> int:
        widths = [[len(pairs[row]["input_ids"]), len(pairs[row]["labels"])] for row in rows]
        return int((-(-np.array(widths).max(axis=0) // texts.MULTIPLE_OF) * texts.MULTIPLE_OF).sum())

    order = texts.whole_epoch(pairs, batch, seed=1).rows
    every = [size(order[start : start + batch]) for start in range(0, len(order) - batch + 1, batch)] or [size(order)]
    steps = [schedule.rows[start : start + batch] for start in range(0, len(schedule.rows), batch)]
    assert size(steps[0]) == max(every)
    assert steps[1 : 1 + texts.NUM_DISTINCT] == steps[1 + texts.NUM_DISTINCT : 1 + 2 * texts.NUM_DISTINCT]
    assert np.mean([size(rows) for rows in steps[1 : 1 + texts.NUM_DISTINCT]]) == pytest.approx(np.mean(every), rel=0.1)


def test_whole_epoch_takes_every_sample_once() -> None:
    schedule = texts.whole_epoch(_pairs(50), 8, seed=3)
    assert sorted(schedule.rows) == list(range(50))
    assert schedule.epoch_steps == 7


# ------------------------------------------------------------------ usage


def test_cores_per_second_are_interpolated() -> None:
    points = [(10.0, 0.0), (10.6, 1.2), (11.4, 1.6), (12.5, 3.8)]
    assert _per_second(points) == pytest.approx([1.4, 1.4])
    assert sum(_per_second(points)) == pytest.approx(_interpolate([0.0, 0.6, 1.4, 2.5], [0.0, 1.2, 1.6, 3.8], 2.0))
    assert _per_second([(0.0, 1.0), (0.5, 2.0)]) == pytest.approx([2.0])
    assert num_cores() > 0


# ------------------------------------------------------------------ plan


def _template(workspace: Workspace, **changes: object) -> Spec:
    values: dict[str, object] = {
        "model": "t5-demo", "engine": PLAIN, "batches": [2], "train_file": str(workspace.files["train"]),
        "tokenizer": str(workspace.tokenizer), "num_samples": 64, "steps": 2, "max_length": 16,
    }  # fmt: skip
    return Spec(**{**values, **changes})  # type: ignore[arg-type]


def test_plan_leaves_out_what_is_done(workspace: Workspace) -> None:
    wanted = Wanted(["t5-small", "t5-base"], [PLAIN, ZERO], [1, 2, 4], num_rounds=2)
    whole = plan(wanted, _template(workspace), [], grouped=True)
    assert [(spec.round, spec.model, spec.engine) for spec in whole[:3]] == [
        (0, "t5-small", PLAIN),
        (0, "t5-small", ZERO),
        (0, "t5-base", PLAIN),
    ]
    assert len(whole) == 8
    done = {*keys_of(whole[0]), keys_of(whole[1])[1]}
    left = plan(wanted, _template(workspace), done, grouped=True)
    assert (left[0].engine, left[0].batches) == (ZERO, [1, 4])
    assert all(len(spec.batches) == 1 for spec in plan(wanted, _template(workspace), done, grouped=False))
    assert len(plan(wanted, _template(workspace), done, grouped=False)) == 24 - 4


@pytest.mark.slow
def test_death_of_a_process_is_a_row(workspace: Workspace, tmp_path: Path) -> None:
    rows: list[Row] = []
    events = Events(lambda *_: None, rows.append, lambda _: None)
    lost = _template(workspace, tokenizer=str(tmp_path / "nothing"), batches=[2, 4])
    assert run_process(lost, events, TimeLimit(None)) == []
    assert [(row.batch_size, row.status) for row in rows] == [(2, FAILED), (4, FAILED)]
    assert rows[0].error.startswith("before the first cell, exit code 1")
    rows.clear()
    # A batch of no rows cannot be: the process dies in its second cell and does not come to the third.
    assert run_process(_template(workspace, batches=[2, 0, 4]), events, TimeLimit(None)) == [4]
    assert [(row.batch_size, row.status) for row in rows] == [(2, OK), (0, FAILED)]


@pytest.mark.slow
def test_sweep_measures_and_goes_on_where_it_was(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--data", str(workspace.files["train"]), "--tokenizer", str(workspace.tokenizer), "--models", "t5-demo",
        "--steps", "3", "--samples", "64", "--max-length", "16", "--out", str(tmp_path),
    ]  # fmt: skip
    experiments.main([*arguments, "--batches", "2"])
    first = read_rows(tmp_path / "sweep.csv")
    assert {(row.engine, row.status) for row in first} == {(PLAIN, OK), (ZERO, OK)}
    for row in first:
        assert (row.measured_steps, row.epoch_steps, row.num_samples) == (3, 32, 64)
        assert row.epoch_seconds is None
        assert row.epoch_seconds_scaled == pytest.approx(32 * (row.step_seconds_median or 0), rel=1e-4)
        assert row.cpu_percent_mean is not None
        assert row.gpu_allocated_gib is None
    plain, ours = sorted(first, key=lambda row: row.engine)
    # The same weights and batches; WarmupLR holds the learning rate at zero for one step more.
    assert ours.loss_warmup == pytest.approx(plain.loss_warmup, rel=0.01)
    machine = json.loads((tmp_path / "sweep.json").read_text())["machines"][0]
    assert machine["torch"]
    assert machine["num_cores"] > 0

    capsys.readouterr()
    experiments.main([*arguments, "--batches", "2,4", "--engines", ZERO])
    assert "3 cells" in capsys.readouterr().out
    again = {row.key: row for row in read_rows(tmp_path / "sweep.csv")}
    assert all(again[row.key] == row for row in first), "cells in the file are not measured twice"


@pytest.mark.slow
def test_two_ranks_measure_the_losses_of_one(workspace: Workspace, tmp_path: Path) -> None:
    common = [
        "--data", str(workspace.files["train"]), "--tokenizer", str(workspace.tokenizer), "--models", "t5-demo",
        "--steps", "2", "--samples", "64", "--max-length", "16", "--out", str(tmp_path),
    ]  # fmt: skip
    experiments.main([*common, "--num-gpus", "2", "--batches", "2,4"])
    experiments.main([*common, "--engines", PLAIN, "--batches", "4"])
    rows = {(row.engine, row.num_gpus, row.batch_size): row for row in read_rows(tmp_path / "sweep.csv")}
    assert {row.status for row in rows.values()} == {OK}
    one = rows[PLAIN, 1, 4]
    for engine in (PLAIN, ZERO):
        both = rows[engine, 2, 2]
        assert both.epoch_steps == one.epoch_steps == 16
        # The same batches in halves: a mean of means, so equal but for the number of tokens in each half.
        assert both.loss_warmup == pytest.approx(one.loss_warmup, rel=0.02)


def test_arguments_that_cannot_be_are_told() -> None:
    with pytest.raises(UserError, match="there are plain, zero2_offload, deepspeed"):
        experiments.parse_options(["--engines", "magic"])
    with pytest.raises(UserError, match="--num-gpus 2: --gpus names only 1"):
        experiments.parse_options(["--num-gpus", "1,2", "--gpus", "0"])
    with pytest.raises(UserError, match="--data needs --tokenizer"):
        experiments.parse_options(["--data", "somewhere"])
    with pytest.raises(UserError, match="no file"):
        experiments.find_text(experiments.parse_options(["--data", "nowhere", "--tokenizer", "none"]))
    with pytest.raises(UserError, match="write NAME=FILE"):
        learning.make_spec(learning.parse_options(["--test", "x"]))


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
    near["loss"].pop()
    assert distance(plain, near).num_entries == 1, "a run that stopped sooner is compared as far as it went"
    assert "**The same curve with and without the engine: Yes.**" in learning_section({"runs": [plain, near]})
    assert "engine: No.**" in learning_section({"runs": [plain, far]})
    assert "same curve" not in learning_section({"runs": [plain]})


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
