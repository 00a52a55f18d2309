"""The processes of the sweep: ranks end together, a time limit or an interruption leaves what was finished and no
process behind. A stand-in for ``measure.cell`` plays the ranks, so that nothing has to be trained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import experiments
import pytest
from measure import launch
from measure.child import Events, run_process
from measure.launch import placements
from measure.limit import TimeLimit
from measure.plan import Wanted, lanes, plan
from measure.rows import FAILED, OK, OUT_OF_MEMORY, Row, read_rows
from measure.spec import DATA_PARALLEL, DEEPSPEED, PLAIN, ZERO, Spec

from tests.examples.conftest import EXAMPLE, Workspace

ACTOR = """
import json, os, sys, time
spec = json.loads(sys.argv[1])
rank = int(os.environ.get("RANK", "0"))
open(os.path.join(os.environ["ACTED"], f"pid{os.getpid()}"), "w").close()
def say(word, content):
    print(f"\\n{word} {json.dumps(content)}", flush=True)
def row(batch, **more):
    names = ("model", "engine", "num_gpus", "round", "num_side_by_side", "gpu_memory_limit_gib")
    return {"batch_size": batch, "device": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            "num_cores": len(os.sched_getaffinity(0)), **{name: spec[name] for name in names}, **more}
for batch in spec["batches"]:
    started = os.path.join(os.environ["ACTED"], f"started{batch}")
    if rank == 0:
        say("STARTED", {"batch_size": batch})
        open(started, "w").close()
    while not os.path.exists(started):  # as ranks that train together do, by their collectives
        time.sleep(0.01)
    if batch == 8 and rank == spec["num_gpus"] - 1:  # runs out of memory; the others wait for it
        say("RESULT", row(batch, status="out of memory"))
        os._exit(3)
    if batch == 16 and rank == spec["num_gpus"] - 1:
        sys.exit("a message")
    if batch >= 8:
        time.sleep(600)
    if rank == 0:
        say("RESULT", row(batch))
"""


@pytest.fixture
def acted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ranks are played by ACTOR; each leaves a file named after its process id in the folder returned."""
    package = tmp_path / "actor" / "measure"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cell.py").write_text(ACTOR)
    monkeypatch.setattr(launch, "EXAMPLE", tmp_path / "actor")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("ACTED", str(tmp_path / "acted"))
    (tmp_path / "acted").mkdir()
    return tmp_path / "acted"


def _spec(**changes: object) -> Spec:
    values: dict[str, object] = {"model": "m", "engine": PLAIN, "batches": [2], "train_file": "", "tokenizer": ""}
    return Spec(**{**values, **changes})  # type: ignore[arg-type]


def _all_gone(acted: Path) -> bool:
    pids = [int(path.name.removeprefix("pid")) for path in acted.glob("pid*")]
    return bool(pids) and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def _run(spec: Spec, limit: TimeLimit | None = None) -> tuple[list[int], list[tuple[int, str]], list[Row]]:
    rows: list[Row] = []
    waiting = run_process(spec, Events(lambda *_: None, rows.append, lambda _: None), limit or TimeLimit(None))
    return waiting, [(row.batch_size, row.status) for row in rows], rows


def test_memory_that_one_rank_lacks_is_a_row_and_ends_all_ranks(acted: Path) -> None:
    waiting, found, _ = _run(_spec(num_gpus=2, batches=[2, 4, 8, 32]))
    assert found == [(2, OK), (4, OK), (8, OUT_OF_MEMORY)]
    assert waiting == [32], "larger ones are for a fresh process"
    assert _all_gone(acted)


def test_death_of_one_rank_is_a_row_and_ends_all_ranks(acted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.5)
    waiting, found, rows = _run(_spec(num_gpus=2, batches=[2, 16, 32]))
    assert (waiting, found) == ([32], [(2, OK), (16, FAILED)])
    assert rows[-1].error == "exit code 1: a message"
    assert _all_gone(acted)


def test_cell_cut_off_by_the_time_limit_is_no_row(acted: Path) -> None:
    waiting, found, _ = _run(_spec(num_gpus=2, batches=[4, 32]), TimeLimit(2 / 60))
    assert (waiting, found) == ([32], [(4, OK)])
    assert _all_gone(acted)


def test_each_rank_is_told_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert placements(_spec()) == [{"CUDA_VISIBLE_DEVICES": "0"}]
    assert placements(_spec(gpus="1")) == [{"CUDA_VISIBLE_DEVICES": "1"}]
    assert placements(_spec(num_gpus=2, gpus="0,1", engine=DATA_PARALLEL)) == [{"CUDA_VISIBLE_DEVICES": "0,1"}]
    assert placements(_spec(engine=DEEPSPEED))[0]["WORLD_SIZE"] == "1"
    first, second = placements(_spec(num_gpus=2, gpus="2,3,5"))
    assert (first["RANK"], second["RANK"], second["LOCAL_RANK"], second["WORLD_SIZE"]) == ("0", "1", "1", "2")
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert second["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert int(second["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert placements(_spec())[0]["CUDA_VISIBLE_DEVICES"] == "4"


def test_models_are_shared_among_the_gpus_and_stay_there() -> None:
    wanted = Wanted(["small", "base", "large"], [PLAIN, ZERO, DATA_PARALLEL], [1, 2], num_rounds=2)
    one, two = lanes(plan(wanted, _spec(), [], grouped=True), ["0", "1"])
    assert [(s.model, s.engine, s.gpus, s.num_side_by_side) for s in two] == [
        ("base", PLAIN, "1", 2),
        ("base", ZERO, "1", 2),
    ] * 2
    assert {(spec.model, spec.gpus) for spec in one} == {("small", "0"), ("large", "0")}
    (alone,) = lanes(plan(wanted, _spec(), [], grouped=True), [])
    assert {spec.num_side_by_side for spec in alone} == {1}
    (both,) = lanes(plan(wanted, _spec(num_gpus=2), [], grouped=True), ["0", "1", "2"])
    assert {(spec.gpus, spec.num_side_by_side) for spec in both} == {("0,1", 1)}
    assert DATA_PARALLEL in {spec.engine for spec in both}, "one process for several GPUs; with one GPU it is plain"


def _arguments(workspace: Workspace, out: Path, batches: str) -> list[str]:
    return [
        "--data", str(workspace.files["train"]), "--tokenizer", str(workspace.tokenizer),
        "--models", "t5-base,t5-small", "--num-gpus", "1,2", "--gpus", "0,1", "--batches", batches, "--out", str(out),
    ]  # fmt: skip


def test_one_gpu_side_by_side_then_two_together(acted: Path, workspace: Workspace, tmp_path: Path) -> None:
    experiments.main(_arguments(workspace, tmp_path / "out", "2,8,4"))
    rows = read_rows(tmp_path / "out" / "sweep.csv")
    assert len(rows) == 2 * 2 * 2 * 3
    cores = len(os.sched_getaffinity(0))
    for row in rows:
        assert row.status == (OUT_OF_MEMORY if row.batch_size == 8 else OK)
        together = row.num_gpus == 2
        assert row.device == ("0,1" if together else {"t5-base": "0", "t5-small": "1"}[row.model])
        assert row.num_side_by_side == (1 if together else 2)
        assert row.num_cores == (cores if together else max(1, cores // 2))
    order = [(row.num_gpus, row.model, row.engine, row.batch_size) for row in rows]
    assert order == sorted(order)
    assert len(os.sched_getaffinity(0)) == cores, "the cores of this process are its own again"


def test_interrupted_sweep_keeps_its_cells_and_leaves_no_process(
    acted: Path, workspace: Workspace, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # As a program, which turns SIGTERM (what timeout and schedulers send) into an orderly end.
    code = (
        f"import pathlib, runpy, sys; sys.path.insert(0, {str(EXAMPLE)!r}); from measure import launch; "
        f"launch.EXAMPLE = pathlib.Path({str(launch.EXAMPLE)!r}); "
        f"sys.argv[1:] = {_arguments(workspace, out, '2,32')!r}; "
        f"runpy.run_path({str(EXAMPLE / 'experiments.py')!r}, run_name='__main__')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while not (out / "sweep.csv").is_file() or len(read_rows(out / "sweep.csv")) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert {(row.model, row.batch_size, row.status) for row in read_rows(out / "sweep.csv")} == {
        ("t5-base", 2, OK),
        ("t5-small", 2, OK),
    }
    assert "14 cells missing, run again to go on" in printed
    assert _all_gone(acted)
