"""The sweep: what it writes, that it goes on where it was, that a process's death costs only its cells."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import experiments
import numpy as np
import pytest
from data import TokenisedPairs
from measure import texts
from measure.child import Events, run_process
from measure.limit import TimeLimit
from measure.plan import Wanted, keys_of, plan
from measure.rows import FAILED, OK, Row, read_rows, write_rows
from measure.spec import PLAIN, ZERO, Spec
from measure.usage import _interpolate, _per_second, num_cores

from tests.examples.conftest import Workspace
from tests.examples.made_up import row as _row
from tests.examples.made_up import sweep as _sweep

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
def test_death_of_a_process_is_a_row(workspace: Workspace) -> None:
    rows: list[Row] = []
    events = Events(lambda *_: None, rows.append, lambda _: None)
    lost = _template(workspace, model="no such preset", batches=[2, 4])
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
    assert not json.loads((tmp_path / "sweep.json").read_text())["cells_share_processes"]
    machine = json.loads((tmp_path / "sweep.json").read_text())["machines"][0]
    assert machine["torch"]
    assert machine["num_cores"] > 0

    capsys.readouterr()
    experiments.main([*arguments, "--batches", "2,4", "--engines", ZERO, "--group"])
    assert "3 cells" in capsys.readouterr().out
    assert json.loads((tmp_path / "sweep.json").read_text())["cells_share_processes"]
    again = {row.key: row for row in read_rows(tmp_path / "sweep.csv")}
    assert all(again[row.key] == row for row in first), "cells in the file are not measured twice"


@pytest.mark.slow
def test_two_ranks_measure_the_losses_of_one(workspace: Workspace, tmp_path: Path) -> None:
    common = [
        "--data", str(workspace.files["train"]), "--tokenizer", str(workspace.tokenizer), "--models", "t5-demo",
        "--steps", "2", "--samples", "64", "--max-length", "16", "--out", str(tmp_path),
    ]  # fmt: skip
    experiments.main([*common, "--num-gpus", "2", "--batches", "2,4", "--group"])
    experiments.main([*common, "--engines", PLAIN, "--batches", "4"])
    rows = {(row.engine, row.num_gpus, row.batch_size): row for row in read_rows(tmp_path / "sweep.csv")}
    assert {row.status for row in rows.values()} == {OK}
    one = rows[PLAIN, 1, 4]
    for engine in (PLAIN, ZERO):
        both = rows[engine, 2, 2]
        assert both.epoch_steps == one.epoch_steps == 16
        # The same batches in halves: a mean of means, so equal but for the number of tokens in each half.
        assert both.loss_warmup == pytest.approx(one.loss_warmup, rel=0.02)
