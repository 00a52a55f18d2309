"""The measuring scripts: tables come from raw lines, cells can be asked for, searches end; nothing is measured here."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from compute import union_length
from engines import engine_config
from largest import ladder, next_rung
from raw import Raw
from run import parse_cells
from serving import merge, peer_path
from simulate import GIB, Machine, pieces_of, simulate
from table import render
from tables_ranks import parity_difference, parity_pairs
from transfers import Turns
from turns import TURN_STEPS, TurnClock, split_turns, steps_of_turns
from workloads import DISTINCT_BATCHES

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {
    "device": "A GPU",
    "torch": "2",
    "threads": 16,
    "host_adamw_gb_s": 100.0,
    "host_copy_gb_s": 70.0,
    "both_gb_s": 100.0,
}


def test_tables_of_the_readme_come_from_the_raw_lines() -> None:
    raw = sorted(str(path) for path in (ROOT / "benchmarks" / "raw").glob("*.jsonl"))
    script = str(ROOT / "benchmarks" / "table.py")
    tables = subprocess.run([sys.executable, script, *raw], capture_output=True, text=True, check=True).stdout
    assert tables.strip() in (ROOT / "benchmarks" / "README.md").read_text()


def _line(engine: str, step_ms: float, round_number: int = 0, **more: Any) -> dict[str, Any]:
    line = {"round": round_number, "engine": engine, "model": "decoder-3b", "precision": "bf16", "batch": 4}
    line |= {"accumulation": 1, "length": 1024, "checkpointing": True, "num_parameters": 1_000_000_000}
    line |= {"step_ms": [step_ms], "step_ms_median": step_ms, "step_ms_mean": step_ms, "tokens": 4096.0}
    line |= {"tokens_padded": 4096.0, "tokens_per_s": 4096 / step_ms * 1000, "peak_allocated": 2**30}
    return {**line, "cpu_seconds_per_second": 1.0, "first_step_s": None, **more}


def _tables(tmp_path: Path, *lines: dict[str, Any]) -> str:
    path = tmp_path / "raw.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in ({"limits": LIMITS}, *lines)))
    return render(Raw([path]))


def test_ratios_are_taken_within_a_round(tmp_path: Path) -> None:
    lines = [_line("plain", 100, 0), _line("ours", 110, 0), _line("plain", 200, 1), _line("ours", 180, 1)]
    assert "| 1.00 (0.90-1.10) |" in _tables(tmp_path, *lines)


def test_the_limit_of_a_step_states_its_terms(tmp_path: Path) -> None:
    """A billion parameters: 28 GB at 100 GB/s, 2 and 12 GB at 50 GB/s a direction."""
    text = _tables(tmp_path, _line("compute", 250, gpu_busy_ms=200.0), _line("ours", 350, config="zero2_offload"))
    assert "| 350 | 200 | 280 | 40 | 240 | 1.25 | 1.46 | 250 |" in text


def test_what_misses_its_target_is_listed(tmp_path: Path) -> None:
    text = _tables(tmp_path, _line("ours", 100), _line("deepspeed", 150), _line("plain", 90))
    assert "step, DeepSpeed / ours: 1.50 (target >= 2.0)" in text
    assert "step, ours / plain: 1.11 (target <= 1.0)" in text


def test_a_failed_cell_is_told(tmp_path: Path) -> None:
    line = {
        "round": 0,
        "engine": "plain",
        "model": "t5-base",
        "precision": "fp16",
        "batch": 8,
        "failed": "rank 0 ended",
    }
    assert "| plain: t5-base fp16, batch 8 | rank 0 ended | 1 |" in _tables(tmp_path, line)


def test_an_engine_without_a_config_is_compared_with_every_config(tmp_path: Path) -> None:
    lines = [_line("plain", 100), _line("ours", 100, config="zero1"), _line("ours-z3", 120, config="zero3_offload")]
    text = _tables(tmp_path, *lines)
    assert "zero1 | 1 | 100 | 100 |" in text
    assert "zero3_offload | 1 | 100 | 120 |" in text


def test_parity_takes_the_scale_out() -> None:
    assert parity_difference([20.0, 10.0], [10.0, 5.0]) == (2.0, 0.0)


def test_options_of_a_cell_multiply() -> None:
    jobs = parse_cells(["t5-base:bf16:1,8:ours,deepspeed:accumulation=1/4,steps=8", "decoder-3b:bf16:4"], "plain")
    assert [(job["batch"], job["accumulation"]) for job, _ in jobs[:4]] == [(1, 1), (8, 1), (1, 4), (8, 4)]
    assert all(names == ["ours", "deepspeed"] and job["steps"] == 8 for job, names in jobs[:4])
    assert jobs[4] == ({"model": "decoder-3b", "precision": "bf16", "batch": 4, "fresh": 1}, ["plain"])


@pytest.mark.parametrize("spec", ["t5-base:fp16", "t5-base:fp16:1:nobody", "t5-base:fp16:1:ours:speed=3"])
def test_a_cell_that_cannot_be_read_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"expected|no engine"):
        parse_cells([spec], "plain")


def test_engines_change_what_their_names_say() -> None:
    def offload(engine: str, **asked: Any) -> Any:
        return engine_config(engine, **asked)["zero_optimization"].get("offload_optimizer")  # type: ignore[index]

    assert engine_config("plain") is None
    stage1 = engine_config("deepspeed", "zero1_offload")
    assert stage1 is not None and stage1["zero_optimization"]["stage"] == 1
    assert offload("ours", asked="zero1_offload") == {"device": "cpu", "pin_memory": True}
    assert offload("ours", asked="zero1") is None
    assert offload("ours-both", share=0.4)["host_share"] == 0.4
    assert offload("ours-device") is None
    assert offload("ours-host")["step_on"] == "host"
    assert offload("ours", ratio=0.5)["ratio"] == 0.5
    assert offload("ours-auto", budget_gib=4.0)["gpu_memory_budget"] == 4.0
    assert engine_config("deepspeed-z3") == json.loads((ROOT / "configs" / "zero3_offload.json").read_text())


def test_several_ranks_make_one_result() -> None:
    ranks = [_line("ours", 100, peak_allocated=3), _line("ours", 200, peak_allocated=5)]
    merged = merge(ranks)
    assert (merged["peak_allocated"], merged["peak_allocated_sum"], merged["tokens"]) == (5, 8, 8192.0)
    assert merged["tokens_per_s"] == 8192 / 0.2


def test_each_peer_may_have_its_own_folder() -> None:
    assert peer_path("/p", "torchao") == "/p"
    assert [peer_path("deepspeed=/d,torchao=/t", name) for name in ("deepspeed", "torchao")] == ["/d", "/t"]


def test_busy_time_counts_overlapping_kernels_once() -> None:
    assert union_length([(0, 10), (2, 5), (8, 12), (20, 21)]) == 13


@pytest.mark.parametrize("limit", [0, 3, 16, 17, 40, 200])
def test_the_search_finds_the_largest_rung_that_works(limit: int) -> None:
    rungs = ladder(16, 1.25, 80)
    outcomes: dict[int, bool] = {}
    while (rung := next_rung(rungs, 16, outcomes)) is not None:
        assert rung not in outcomes
        outcomes[rung] = rung <= limit
    assert len(outcomes) <= len(rungs)
    best = max((rung for rung, worked in outcomes.items() if worked), default=0)
    assert best == max((rung for rung in rungs if rung <= limit), default=0)


def _run(script: str, *options: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_two_ranks_report_the_losses_of_one(tmp_path: Path) -> None:
    """Whole scripts, two engines, one and two processes: every line holds what the tables ask for."""
    out = tmp_path / "raw.jsonl"
    options = ":plain,ours:length=16,steps=3,losses=1"
    cells = [f"decoder-tiny:bf16:4{options},gpus=1", f"decoder-tiny:bf16:2{options},gpus=2"]
    _run("run.py", "--out", str(out), "--rounds", "1", "--cells", *cells)
    raw = Raw([out])
    assert not raw.failures
    pairs = parity_pairs(raw, "CPU")
    assert [engine for _, engine, *_ in pairs] == ["plain", "ours"]
    for cell, engine, several, one in pairs:
        assert parity_difference(several, one)[1] < 1e-5
        record = cell.records(engine)[0]
        assert record["tokens"] == 64 and record["world_size"] == 2
        assert record["rss_peak_bytes"] >= record["rss_baseline_bytes"] > 0


@pytest.mark.slow
def test_a_lost_rank_is_watched_to_the_end(tmp_path: Path) -> None:
    out = tmp_path / "kill.jsonl"
    common = ("--model", "t5-tiny", "--configs", "zero2", "--how", "kill", "--launchers", "hf-zero,bare", "--at", "2")
    _run("kill_rank.py", "--out", str(out), *common)
    launched, bare = (json.loads(line) for line in out.read_text().splitlines())
    assert launched["exit_code"] == 137
    assert "rank 1 was ended by SIGKILL" in launched["message"]
    assert bare["exit_code"] == 1
    assert "rank 0 of 2, step 3" in bare["message"]


@pytest.mark.parametrize(("model", "untimed"), [("t5-tiny", DISTINCT_BATCHES), ("decoder-tiny", 1)])
def test_a_run_in_turns_waits_before_each_turn_and_times_nothing_else(model: str, untimed: int) -> None:
    job = argparse.Namespace(model=model, warmup=3, turns=2)
    waits: list[int] = []

    def wait() -> bool:
        waits.append(clock.num_steps)
        return True

    clock = TurnClock(job, cuda=False, wait=wait)
    timed = 0
    for _ in range(steps_of_turns(job)):
        timed += clock.times_step(clock.num_steps + 1)
        clock.on_step_end()
    assert waits == [3, 3 + untimed + TURN_STEPS]
    assert timed == 2 * TURN_STEPS
    result = clock.finish()
    assert [record["steps"] for record in result["turns"]] == [TURN_STEPS] * 2


def test_turns_may_end_early() -> None:
    """Time is up: what was measured is kept."""
    job = argparse.Namespace(model="t5-tiny", warmup=3, turns=5)
    words = iter([True, True, False])
    clock = TurnClock(job, cuda=False, wait=lambda: next(words))
    while not clock.is_over:
        clock.on_step_end()
    assert clock.num_steps == 3 + 2 * (DISTINCT_BATCHES + TURN_STEPS)
    assert len(clock.finish()["turns"]) == 2


@pytest.mark.slow
def test_a_budget_ends_turns_and_keeps_their_results(tmp_path: Path) -> None:
    out = tmp_path / "raw.jsonl"
    cell = "t5-tiny:bf16:2:plain,ours:length=8,turns=100000,warmup=1"
    _run("run.py", "--out", str(out), "--budget", "25", "--cells", cell)
    rounds = [json.loads(line) for line in out.read_text().splitlines()][1:]
    plain, ours = ([line for line in rounds if line["engine"] == name] for name in ("plain", "ours"))
    assert len(plain) == len(ours) > 1


@pytest.mark.parametrize("cell", ["plain,ours,ours:turns=2", "ours:turns=-1", "ours:turns=2,warmup=0", "our:turns=2"])
def test_turns_that_cannot_be_taken_are_refused(cell: str, tmp_path: Path) -> None:
    """Two turns of one process would answer each other's questions."""
    script = str(ROOT / "benchmarks" / "run.py")
    command = [sys.executable, script, "--out", str(tmp_path / "out.jsonl"), "--cells", f"t5-base:fp16:8:{cell}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "t5-base:fp16:8" in ended.stderr and "Traceback" not in ended.stderr


def test_turns_become_rounds() -> None:
    turns = [_line("ours", 10.0), _line("ours", 20.0)]
    records = [{name: turn[name] for name in ("step_ms", "step_ms_median", "step_ms_mean")} for turn in turns]
    first, second = split_turns({**_line("ours", 15.0, first_step_s=4.0), "turns": records})
    assert (first["step_ms"], second["step_ms"]) == ([10.0], [20.0])
    assert (first["first_step_s"], second["first_step_s"]) == (4.0, None)
    assert second["tokens_per_s"] == pytest.approx(4096 / 20 * 1000)
    assert "turns" not in first


def test_ways_take_turns_in_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, str]] = []
    turns = Turns(["one", "other"], rounds=2, warmup=2, timed=3)
    monkeypatch.setattr("transfers.find_home", lambda: None)
    monkeypatch.setattr("transfers.take_way", lambda _, way: taken.append((turns._step, way)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    for _ in range(turns.num_steps):
        turns.on_step_end()
    assert taken == [(0, "one"), (5, "other"), (10, "other"), (15, "one")]
    assert {way: len(found) for way, found in turns.step_ms.items()} == {"one": 2, "other": 2}
    assert turns.peak_gib == {"one": 1.0, "other": 1.0}


def test_a_file_of_an_earlier_engine_makes_rows_of_its_own(tmp_path: Path) -> None:
    line = {"engine": "ours", "round": 0, "model": "t5-tiny", "precision": "bf16", "batch": 1, "step_ms": [2.0]}
    for name, ms in (("a-earlier-engine.jsonl", 2.0), ("a.jsonl", 1.0)):
        lines = [{"limits": LIMITS}, {**line, "step_ms_median": ms, "step_ms_mean": ms}]
        (tmp_path / name).write_text("\n".join(json.dumps(line) for line in lines))
    cells = list(Raw(sorted(tmp_path.iterdir())).cells("A GPU"))
    assert [(cell.label, cell.values("ours", "step_ms_median")) for cell in cells] == [
        ("t5-tiny bf16, batch 1", [1.0]),
        ("t5-tiny bf16, batch 1, earlier engine", [2.0]),
    ]


def test_a_simulated_step_is_the_longer_of_device_and_link() -> None:
    pieces = pieces_of("t5-base")
    link_s = 12 * sum(piece.numel for piece in pieces) / 49e9
    device_bound = simulate(pieces, Machine(forward_s=0.4, backward_s=0.6, activations=20 * GIB))
    assert device_bound["step_ms"] == pytest.approx(1000, rel=0.01)
    assert device_bound["wait_ms"] == pytest.approx(0, abs=1)
    link_bound = simulate(pieces, Machine(forward_s=0.001, backward_s=0.001, activations=20 * GIB))
    assert 1000 * link_s <= link_bound["step_ms"] < 1.15 * 1000 * link_s
    without_room = simulate(pieces, Machine(forward_s=0.02, backward_s=0.04, activations=0.0))
    assert without_room["step_ms"] > 1000 * (link_s + 0.04)


@pytest.mark.parametrize("activations", [8, 30])
def test_transfers_of_a_decoder_fill_the_link(activations: int) -> None:
    """Neither a buffer of another size nor the wait for one holds them up, where there is memory to stage half in."""
    pieces = pieces_of("decoder-3b")
    link_ms = 1000 * 12 * sum(piece.numel for piece in pieces) / 49e9
    found = simulate(pieces, Machine(forward_s=0.1, backward_s=0.2, activations=activations * GIB, launch_s=0.08))
    assert found["step_ms"] < 1.05 * link_ms
