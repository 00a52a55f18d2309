"""The sweep meets input that cannot be, damaged files and interruptions: a reason is told, nothing is lost."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import experiments
import figures
import learning
import pytest
import torch
from errors import UserError
from measure import cell, texts
from measure.alike import check_device
from measure.launch import first_gpu, placements
from measure.progress import Progress
from measure.rows import OK, OUT_OF_MEMORY, Row, read_rows, write_rows
from measure.spec import PLAIN, ZERO, Spec
from rich.console import Console
from rich.live import Live

from tests.examples.conftest import EXAMPLE, Workspace, pair, write_lines
from tests.examples.made_up import row, sweep


def _demo_arguments(workspace: Workspace) -> list[str]:
    return [
        "--data", str(workspace.files["train"]), "--tokenizer", str(workspace.tokenizer), "--models", "t5-demo",
        "--steps", "3", "--samples", "64", "--max-length", "16",
    ]  # fmt: skip


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    for content, reason in (
        (b"a,b\n1,2\n", "no column model, engine, batch_size, status; it begins with a, b"),
        (b"", "it is empty"),
        (b"model,engine,batch_size,status,colour\n", "unknown columns colour"),
        (b"model,engine\n\xff\xfe", "not a CSV file in UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason):
            read_rows(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda line: line[:120], "line 3: .* values for .* columns, cut short"),
        (lambda line: line.replace(",2,", ",two,", 1), "line 3, column batch_size: 'two' is not a value"),
        (lambda line: line.replace(",False,", ",maybe,", 1), "line 3, column is_full_epoch: 'maybe'"),
        (lambda line: line.replace(",ok,", ",o,", 1), "line 3, column status: 'o' is none of ok, out of memory"),
    ],
)
def test_a_damaged_line_is_named_and_the_file_left_alone(
    tmp_path: Path, workspace: Workspace, damage: Callable[[str], str], reason: str
) -> None:
    path = tmp_path / "sweep.csv"
    write_rows(path, [row("t5-small", PLAIN, batch) for batch in (1, 2, 4)])
    lines = path.read_text().splitlines()
    lines[2] = damage(lines[2])
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    with pytest.raises(UserError, match=reason):
        experiments.main(["--out", str(tmp_path), *_demo_arguments(workspace)])
    with pytest.raises(UserError, match=reason):
        figures.main(["--csv", str(path), "--out", str(tmp_path / "figures")])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["sweep.csv"]


def test_arguments_that_cannot_be_are_told(workspace: Workspace) -> None:
    with pytest.raises(UserError, match="there are plain, zero2_offload, deepspeed"):
        experiments.parse_options(["--engines", "magic"])
    with pytest.raises(UserError, match="--num-gpus 2: --gpus names only 1"):
        experiments.parse_options(["--num-gpus", "1,2", "--gpus", "0"])
    with pytest.raises(UserError, match="--data needs --tokenizer"):
        experiments.parse_options(["--data", "somewhere"])
    with pytest.raises(UserError, match="no file"):
        experiments.find_text(experiments.parse_options(["--data", "nowhere", "--tokenizer", str(workspace.tokenizer)]))
    with pytest.raises(UserError, match="--tokenizer none: no such folder"):
        experiments.find_text(experiments.parse_options(["--tokenizer", "none"]))
    with pytest.raises(UserError, match=r"no tokenizer in it, none of tokenizer.json"):
        experiments.find_text(experiments.parse_options(["--tokenizer", str(workspace.folder)]))
    with pytest.raises(UserError, match="--models t5-huge: there are t5-small, t5-base"):
        experiments.parse_options(["--models", "t5-huge"])
    with pytest.raises(UserError, match="write NAME=FILE"):
        learning.make_spec(learning.parse_options(["--test", "x"]))
    with pytest.raises(UserError, match="--test x=nowhere: no such file"):
        learning.make_spec(learning.parse_options(["--test", "x=nowhere"]))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--batches", "1,x"], "argument --batches: 'x' is not a whole number"),
        (["--batches", "0"], "argument --batches: 0 is less than 1"),
        (["--batches", ","], "argument --batches: give at least one name"),
        (["--models", ""], "argument --models: give at least one name"),
        (["--steps", "many"], "argument --steps: 'many' is not a whole number"),
        (["--steps", "0"], "argument --steps: 0 is less than 1"),
        (["--samples", "0"], "argument --samples: 0 is less than 1"),
        (["--num-gpus", "0"], "argument --num-gpus: 0 is less than 1"),
        (["--max-length", "1"], "argument --max-length: 1 leaves no room"),
        (["--cell-seconds", "-1"], "argument --cell-seconds: -1: must be more than 0"),
        (["--max-minutes", "soon"], "argument --max-minutes: 'soon' is not a number"),
    ],
)
def test_values_that_cannot_be_end_with_code_2(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        experiments.parse_options(arguments)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_deepspeed_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match="--engines deepspeed: DeepSpeed itself is not installed"):
        experiments.parse_options(["--engines", "plain,deepspeed"])


def test_results_that_cannot_be_written_are_told_before_measuring(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "file").touch()
    where = str(tmp_path / "file" / "folder")
    with pytest.raises(UserError, match=r"--out .*: cannot be made a folder"):
        experiments.main(["--out", where, *_demo_arguments(workspace)])
    with pytest.raises(UserError, match=r"--out .*: cannot be made a folder"):
        learning.main(["--out", where])


def test_trial_runs_stay_out_of_the_committed_results(workspace: Workspace) -> None:
    assert experiments.parse_options([]).out.parts[-2:] == ("out", "sweep")
    assert learning.parse_options([]).out.parts[-2:] == ("out", "learning")
    text = ["--tokenizer", str(workspace.tokenizer)]
    assert experiments.parse_options(["--data", "x", *text]).out == experiments.RESULTS
    assert learning.parse_options(["--train", "x", *text]).out == experiments.RESULTS


def test_cells_measured_otherwise_are_not_mixed(tmp_path: Path, workspace: Workspace) -> None:
    write_rows(tmp_path / "sweep.csv", [row("t5-small", PLAIN, 1)])
    known = {"machines": [], "text": "wmt16_en_ro", "max_length": 128, "seed": 42}
    (tmp_path / "sweep.json").write_text(json.dumps(known))
    before = (tmp_path / "sweep.csv").read_bytes()
    out = ["--out", str(tmp_path)]
    with pytest.raises(
        UserError, match=r"text wmt16_en_ro, asked is data; max_length 128, asked is 16.*another folder"
    ):
        experiments.main([*out, *_demo_arguments(workspace)])
    known |= {"text": "data", "max_length": 16, "samples": 64}
    (tmp_path / "sweep.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match="precision fp16, asked is bf16"):
        experiments.main([*out, *_demo_arguments(workspace), "--precision", "bf16"])
    (tmp_path / "sweep.json").write_text('{"machines": [')
    with pytest.raises(UserError, match=r"sweep.json, line 1, column 15: not JSON"):
        experiments.main([*out, *_demo_arguments(workspace)])
    assert (tmp_path / "sweep.csv").read_bytes() == before


def test_a_sweep_with_nothing_to_measure_says_where_its_cells_are_from(
    tmp_path: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "sweep.csv", [row("t5-demo", engine, 1) for engine in (PLAIN, ZERO)])
    experiments.main([*_demo_arguments(workspace), "--out", str(tmp_path), "--batches", "1"])
    assert "Nothing to measure: every cell asked for is in" in (out := capsys.readouterr().out)
    assert "from NVIDIA H200. For others: --out FOLDER" in out


def test_cells_of_another_device_are_not_mixed(tmp_path: Path) -> None:
    csv, rows = tmp_path / "sweep.csv", [row("t5-small", PLAIN, 1)]
    check_device(csv, rows, {"device": "NVIDIA H200", "num_visible_gpus": 2})
    check_device(csv, [dataclasses.replace(rows[0], device="cpu")], {"device": "x86_64", "num_visible_gpus": 0})
    lost = Row(model="t5-small", engine=PLAIN, batch_size=2, status=OUT_OF_MEMORY)
    check_device(csv, [lost], {"device": "anything", "num_visible_gpus": 1})
    with pytest.raises(UserError, match=r"measured on NVIDIA H200, and this is cpu.*--mix-devices"):
        check_device(csv, rows, {"device": "x86_64", "num_visible_gpus": 0})


def test_text_that_cannot_be_trained_on_is_told(tmp_path: Path, workspace: Workspace) -> None:
    path = tmp_path / "train.json"
    good = pair("one", "unu")
    for rows, reason in (
        ([], "no usable pair"),
        ([pair("", "unu")], "no usable pair"),
        ([good, {"translation": {"en": "one", "de": "eins"}}], "pair 2: needs text in 'en' and 'ro', has en, de"),
        ([good, '{"translation": {"en": "one", "ro'], "line 2, column .*: not JSON"),
    ):
        with pytest.raises(UserError, match=reason):
            texts.read_pairs(write_lines(path, rows))
    with pytest.raises(UserError, match="cannot be loaded"):
        texts.load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"--tokenizer has .* tokens, small knows 10"):
        texts.check_vocabulary(texts.load_tokenizer(str(workspace.tokenizer)), {"vocab_size": 10}, "small")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), MemoryError("host")]
)
def test_running_out_of_memory_is_a_result(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object) -> Row:
        raise error

    monkeypatch.setattr(cell, "train_and_measure", train)
    spec = Spec(model="t5-base", engine=PLAIN, batches=[256], train_file="", tokenizer="")
    row = cell.measure(spec, 256, SimpleNamespace())  # type: ignore[arg-type]
    assert (row.status, row.error) == (OUT_OF_MEMORY, str(error).splitlines()[0])
    assert (row.seconds or 0) > 0


def test_other_errors_are_not_taken_for_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object) -> Row:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(cell, "train_and_measure", train)
    with pytest.raises(RuntimeError, match="shapes"):
        cell.measure(Spec(model="m", engine=PLAIN, batches=[1], train_file="", tokenizer=""), 1, SimpleNamespace())  # type: ignore[arg-type]


def test_gpus_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = Spec(model="m", engine=PLAIN, batches=[1], train_file="", tokenizer="")
    cell.choose_gpu(spec)
    cell.choose_gpu(dataclasses.replace(spec, num_gpus=2))  # two processes on the processor
    with pytest.raises(UserError, match="--gpus 7: 1 wanted, none can be seen"):
        cell.choose_gpu(dataclasses.replace(spec, gpus="7"))
    with pytest.raises(UserError, match="--gpu-memory-gib: there is no GPU"):
        cell.choose_gpu(dataclasses.replace(spec, gpu_memory_limit_gib=16.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--num-gpus 2: 2 wanted, 1 can be seen"):
        cell.choose_gpu(dataclasses.replace(spec, num_gpus=2))


@pytest.mark.parametrize(("variable", "seen"), [(None, "0"), ("", ""), ("3,1", "3")])
def test_a_process_on_its_own_sees_one_gpu_and_none_that_is_hidden(
    variable: str | None, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    (place,) = placements(Spec(model="m", engine=PLAIN, batches=[1], train_file="", tokenizer=""))
    assert place["CUDA_VISIBLE_DEVICES"] == first_gpu() == seen


# ------------------------------------------------------------------ interruption, and what is seen meanwhile


def _sweep_process(workspace: Workspace, out: Path, *more: str) -> subprocess.Popen[str]:
    script = [sys.executable, str(EXAMPLE / "experiments.py"), "--out", str(out), *_demo_arguments(workspace), *more]
    return subprocess.Popen(
        script,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that a shell runs in the background have inherited that Ctrl-C is not for them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_sweep_loses_nothing_and_goes_on(
    workspace: Workspace, tmp_path: Path, blow: signal.Signals
) -> None:
    csv = tmp_path / "sweep.csv"
    process = _sweep_process(workspace, tmp_path, "--batches", "1,2")
    deadline = time.monotonic() + 120
    while not csv.is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(blow)
    out, err = process.communicate(timeout=60)
    first = read_rows(csv)
    assert 1 <= len(first) < 4
    assert {row.status for row in first} == {OK}
    if blow != signal.SIGKILL:
        assert process.returncode == 130
        assert f"; {4 - len(first)} cells missing, run again to go on" in out
        assert "Traceback" not in err
    again = _sweep_process(workspace, tmp_path, "--batches", "1,2", "--group")
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    rows = {row.key: row for row in read_rows(csv)}
    assert len(rows) == 4
    assert all(rows[row.key] == row for row in first)
    assert "No GPU here" in err or torch.cuda.is_available()
    assert out.splitlines()[0].split()[:4] == ["model", "engine", "GPUs", "batch"]


@pytest.mark.slow
def test_what_a_process_refuses_ends_the_sweep_with_code_2(workspace: Workspace, tmp_path: Path) -> None:
    process = _sweep_process(workspace, tmp_path, "--gpus", "nothing")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith("experiments.py: error: --gpus nothing: 1 wanted, none can be seen")
    assert "Traceback" not in err
    assert not (tmp_path / "sweep.csv").exists(), "no cell is at fault"


def test_live_table_keeps_to_the_screen_and_ends_whole() -> None:
    rows = {row.key: row for row in sweep()}
    progress = Progress(rows)
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=20)
    progress._live = Live(console=console, auto_refresh=False)
    progress.cell_started(Spec(model="t5-base", engine=ZERO, batches=[256], train_file="", tokenizer=""), 256)
    shown = progress._live.get_renderable()
    with console.capture() as captured:
        console.print(shown)
    lines = captured.get().splitlines()
    assert len(lines) <= 20
    assert "..." in lines[-1], "what is being measured is seen"
    assert "cells above" in captured.get()
    with console.capture() as captured:
        console.print(progress._table())
    whole = captured.get()
    assert len(whole.splitlines()) >= len(rows) + 2
    assert "cells above" not in whole
    assert "out of" in whole
    assert "scaled" in whole
