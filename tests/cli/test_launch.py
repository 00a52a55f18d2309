"""Real launches: what ranks see, and how they end. The scripts use torch.distributed at most."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from .conftest import Run, Start, wait_until

REPORT = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
seen = {name: os.environ.get(name) for name in names}
seen.update(argv=sys.argv, path=sys.path[0], file=__file__, name=__name__)
"""
WRITE = """
with open(f"rank{seen['RANK']}.json", "w") as file:
    json.dump(seen, file)
"""
ALL_REDUCE = """
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
seen["total"] = total.item()
dist.destroy_process_group()
"""
READY = """
import os, pathlib
pathlib.Path("ready" + os.environ["RANK"]).write_text(str(os.getpid()))
"""

Script = Callable[..., str]


def read_report(directory: Path, rank: int) -> dict[str, object]:
    report: dict[str, object] = json.loads((directory / f"rank{rank}.json").read_text())
    return report


def ready_pids(directory: Path, num_ranks: int) -> list[int]:
    """Wait until every rank has said that it runs."""
    files = [directory / f"ready{rank}" for rank in range(num_ranks)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def assert_gone(pids: list[int], timeout_s: float = 10.0) -> None:
    """Not running, and no zombie either."""
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), timeout_s)


def test_one_process_runs_in_place(run: Run, script: Script, tmp_path: Path) -> None:
    """No torchrun: the launcher's process is the rank, and sees what torchrun would have set."""
    script(REPORT + "seen['ppid_is_pytest'] = os.getppid() == int(sys.argv[1])" + WRITE, "sub/script.py")
    done = run("run", "--num_gpus", "1", "sub/script.py", str(os.getpid()), "--num_gpus", "7", "--", "-m")
    assert done.returncode == 0, done.stderr
    seen = read_report(tmp_path, 0)
    assert seen["ppid_is_pytest"]
    assert seen["name"] == "__main__"
    assert seen["argv"][1:] == [str(os.getpid()), "--num_gpus", "7", "--", "-m"]  # type: ignore[index]
    assert seen["path"] == str(tmp_path / "sub")
    assert seen["file"] == str(tmp_path / "sub" / "script.py")
    ranks = [seen[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
    assert ranks == ["0", "0", "1", "1"]
    assert seen["MASTER_ADDR"] == "127.0.0.1"


def test_two_cpu_ranks_meet_over_gloo(run: Run, script: Script, tmp_path: Path) -> None:
    done = run("run", "--num_gpus=2", script(REPORT + ALL_REDUCE + WRITE), "--x", "a b")
    assert done.returncode == 0, done.stderr
    seen = [read_report(tmp_path, rank) for rank in range(2)]
    assert [report["total"] for report in seen] == [3.0, 3.0]
    assert [report["LOCAL_RANK"] for report in seen] == ["0", "1"]
    assert {report["WORLD_SIZE"] for report in seen} == {"2"}
    assert seen[0]["MASTER_PORT"] == seen[1]["MASTER_PORT"]
    assert all(report["argv"][1:] == ["--x", "a b"] for report in seen)  # type: ignore[index]
    assert all(report["path"] == str(tmp_path) for report in seen)
    assert int(str(seen[0]["OMP_NUM_THREADS"])) >= 1
    assert "on CPU in 2 processes" in done.stderr


def test_a_module_by_name_sees_the_current_directory_first(run: Run, script: Script, tmp_path: Path) -> None:
    script("", "package/__init__.py")
    script(REPORT + WRITE, "package/train.py")
    done = run("run", "-m", "package.train", "--a")
    assert done.returncode == 0, done.stderr
    seen = read_report(tmp_path, 0)
    assert seen["argv"] == [str(tmp_path / "package" / "train.py"), "--a"]
    assert seen["path"] == str(tmp_path)


def test_exit_code_of_a_rank_is_kept(run: Run, script: Script) -> None:
    """One rank leaves with 3 while the other works: 3 is the answer, within seconds."""
    source = "import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(300)"
    started = time.monotonic()
    done = run("run", "--num_gpus", "2", script(source))
    assert done.returncode == 3
    assert "rank 1 exited with code 3" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 30


def test_signal_that_ended_a_rank_is_kept(run: Run, script: Script) -> None:
    source = "import os, time\nos.kill(os.getpid(), 9) if os.environ['RANK'] == '0' else time.sleep(300)"
    done = run("run", "--num_gpus", "2", script(source))
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 0 was ended by SIGKILL" in done.stderr


@pytest.mark.parametrize("code", [1, 3])
def test_the_rank_that_failed_by_itself_is_reported_not_one_that_was_ended(run: Run, script: Script, code: int) -> None:
    """The other rank is sent SIGTERM within the same second, and dies of it."""
    source = READY + (
        "import sys, time\n"
        "while not all(pathlib.Path(f'ready{r}').exists() for r in range(2)): time.sleep(0.01)\n"
        "if os.environ['RANK'] == '0':\n"
        "    time.sleep(60)\n"
        f"sys.exit({code})\n"
    )
    done = run("run", "--num_gpus", "2", script(source))
    assert done.returncode == code, done.stderr
    assert f"rank 1 exited with code {code}" in done.stderr


def test_exit_code_in_place_is_the_scripts(run: Run, script: Script) -> None:
    assert run("run", script("raise SystemExit(5)")).returncode == 5
    failed = run("run", script("1 / 0"))
    assert failed.returncode == 1
    assert "ZeroDivisionError" in failed.stderr


def test_a_dying_rank_takes_stubborn_ones_and_their_children_along(
    start: Start, script: Script, tmp_path: Path
) -> None:
    """Rank 0 ignores every polite request and has a child that does too; rank 1 dies once both run."""
    source = """
import os, pathlib, signal, subprocess, sys, time
if os.environ["RANK"] == "0":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "300"])  # SIG_IGN is inherited
    pathlib.Path("child").write_text(str(child.pid))
else:
    while not os.path.exists("ready0"):
        time.sleep(0.05)
"""
    end = "\nif os.environ['RANK'] == '1':\n    sys.exit(7)\ntime.sleep(300)"
    launcher = start("run", "--num_gpus", "2", script(source + READY + end))
    pids = [*ready_pids(tmp_path, 2), int((tmp_path / "child").read_text())]
    assert launcher.wait(timeout=30) == 7
    assert_gone(pids)


def test_ctrl_c_ends_every_rank(start: Start, script: Script, tmp_path: Path) -> None:
    launcher = start("run", "--num_gpus", "2", script(READY + "\nimport time\ntime.sleep(300)"))
    pids = ready_pids(tmp_path, 2)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=20) == 128 + signal.SIGINT
    assert_gone(pids)
    said = launcher.stderr.read() if launcher.stderr else ""
    assert "interrupted" in said
    assert "Traceback" not in said
    assert "torch/distributed" not in said  # torchrun says nothing of its own


def test_ctrl_c_in_place(start: Start, script: Script, tmp_path: Path) -> None:
    launcher = start("run", script(READY + "\nimport time\ntime.sleep(300)"))
    ready_pids(tmp_path, 1)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=10) == 128 + signal.SIGINT


def test_second_ctrl_c_kills(start: Start, script: Script, tmp_path: Path) -> None:
    deaf = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)"
    launcher = start("run", "--num_gpus", "2", script(deaf + READY + "\nimport time\ntime.sleep(300)"))
    pids = ready_pids(tmp_path, 2)
    launcher.send_signal(signal.SIGINT)
    time.sleep(1)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=4) == 128 + signal.SIGINT
    assert_gone(pids)


def test_sigterm_reaches_every_rank(start: Start, script: Script, tmp_path: Path) -> None:
    """As from a scheduler that leaves time to save: every rank hears it and may take longer than after Ctrl-C."""
    source = """
import os, pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    pathlib.Path("saved" + os.environ["RANK"]).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
"""
    launcher = start("run", "--num_gpus", "2", script(source + READY + "\ntime.sleep(300)"))
    pids = ready_pids(tmp_path, 2)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=30) == 128 + signal.SIGTERM
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()
    assert_gone(pids)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_ranks_do_not_outlive_a_killed_launcher(start: Start, script: Script, tmp_path: Path) -> None:
    launcher = start("run", "--num_gpus", "2", script(READY + "\nimport time\ntime.sleep(300)"))
    pids = ready_pids(tmp_path, 2)
    launcher.kill()
    launcher.wait(timeout=10)
    # Whoever adopts them reaps them: gone, or zombies of that process.
    wait_until(lambda: all(not psutil.pid_exists(pid) or _is_zombie(pid) for pid in pids), 10)


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_two_nodes_meet(start: Start, run: Run, script: Script, tmp_path: Path) -> None:
    """Both launchers on this machine; the ranks count across them."""
    from hf_zero_plugin.cli.network import find_free_port

    name = script(REPORT + ALL_REDUCE + WRITE)
    shared = ["run", "--num_nodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(find_free_port())]
    second = start(*shared, "--node_rank", "1", name)
    first = run(*shared, "--node_rank", "0", name)
    assert first.returncode == 0, first.stderr
    assert second.wait(timeout=60) == 0
    assert [read_report(tmp_path, rank)["total"] for rank in range(2)] == [3.0, 3.0]
    assert "on node 1: hf-zero run --num_nodes 2 --node_rank 1 --master_addr 127.0.0.1" in first.stderr


def test_a_master_that_does_not_answer_is_named(run: Run, script: Script) -> None:
    from hf_zero_plugin.cli.network import find_free_port

    port = str(find_free_port())
    where = ["--num_nodes", "2", "--node_rank", "1", "--master_addr", "127.0.0.1", "--master_port", port]
    done = run("run", *where, script("pass"), HF_ZERO_JOIN_TIMEOUT="1")
    assert done.returncode == 2
    assert f"node 0 did not answer at 127.0.0.1:{port} within 1 s" in done.stderr


def test_a_node_that_does_not_come_is_missed(run: Run, script: Script) -> None:
    from hf_zero_plugin.cli.network import find_free_port

    port = str(find_free_port())
    where = ["--num_nodes", "2", "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", port]
    done = run("run", *where, script("pass"), HF_ZERO_JOIN_TIMEOUT="1")
    assert done.returncode == 2
    assert f"not all 2 nodes met at 127.0.0.1:{port} within 1 s" in done.stderr
    assert "Traceback" not in done.stderr
