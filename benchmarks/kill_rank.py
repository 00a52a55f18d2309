"""One of several ranks is lost in the middle of training: when, and saying what, do the others end?

    python benchmarks/kill_rank.py --out kill.jsonl --configs zero1,zero2,zero3_offload --how kill,hang

Two ranks train (NCCL; gloo without GPUs). At step --at the last rank is lost in one of these ways:

    kill    SIGKILL: the process is gone, as after an out-of-memory kill
    raise   a Python exception
    hang    it stays and does nothing: only the time-out of the collectives (HF_ZERO_COLLECTIVE_TIMEOUT) helps

and each is tried twice: with bare processes, where the other rank must find out by itself, and under ``hf-zero run``,
which watches its ranks. A JSON line each: seconds from the loss to the end of everything else, exit code, and the
line of standard error that tells it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engines import ROOT
from serving import free_port, rank_environment

HOW = ("kill", "raise", "hang")
_LAUNCH = "import sys; from hf_zero_plugin.cli.main import main; sys.exit(main())"
STEPS = 1000
"""More than are ever reached."""


# ---------------------------------------------------------------- the rank


def train_and_be_lost(options: argparse.Namespace) -> None:
    """What each rank runs. The last one notes the time in ``options.note`` before it is lost."""
    from cell import build_parser, prepare

    prepare("ours")
    import torch
    from transformers import TrainerCallback
    from trial import make_trainer

    class Loss(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == options.at and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
                Path(options.note).write_text(repr(time.time()))
                lose(options.how)

    job = build_parser().parse_args(["--engine", "ours", "--model", options.model, "--precision", "bf16"])
    job.batch, job.steps, job.length, job.config = 2, STEPS, 64, options.configs
    trainer = make_trainer(job, torch.cuda.is_available())[0]
    trainer.add_callback(Loss())
    trainer.train()


def lose(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise RuntimeError("this rank was told to fail")
    while True:
        time.sleep(3600)


# ---------------------------------------------------------------- the observer


def rank_command(options: argparse.Namespace, config: str, how: str, note: Path) -> list[str]:
    return [
        str(Path(__file__).resolve()),
        *("--rank", "--configs", config, "--how", how, "--at", str(options.at), "--model", options.model),
        *("--note", str(note)),
    ]


def watch(options: argparse.Namespace, config: str, how: str, launcher: bool) -> dict[str, Any]:
    """Lose one rank and wait for the others, at most ``options.patience`` seconds after the loss."""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "lost_at"
        script = rank_command(options, config, how, note)
        environment = {**os.environ, "HF_ZERO_COLLECTIVE_TIMEOUT": str(options.collective_timeout)}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        if launcher:
            flags = ["-c", _LAUNCH, "run", "--num_gpus", str(options.ranks)]
            rank_variables: list[dict[str, str]] = [{}]
        else:
            flags, port = [], free_port()
            rank_variables = [rank_environment(rank, options.ranks, port) for rank in range(options.ranks)]
        logs = [Path(folder) / f"stderr{number}" for number in range(len(rank_variables))]
        processes = []
        for variables, log in zip(rank_variables, logs):
            with log.open("w") as stderr:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *flags, *script],
                        env=environment | variables,
                        stdout=subprocess.DEVNULL,
                        stderr=stderr,
                        start_new_session=True,
                    )
                )
        try:
            return outcome(options, processes, logs, note, how)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def outcome(
    options: argparse.Namespace, processes: list[subprocess.Popen[bytes]], logs: list[Path], note: Path, how: str
) -> dict[str, Any]:
    """Of the first process: rank 0, or the launcher."""
    survivor, begun = processes[0], time.time()
    while not note.exists() or not note.read_text():
        if survivor.poll() is not None or time.time() - begun > options.start_timeout:
            return {"failed": "did not reach the step", "message": told(logs[0])}
        time.sleep(0.05)
    lost_at = float(note.read_text())
    while survivor.poll() is None and time.time() - lost_at < options.patience:
        time.sleep(0.02)
    ended = survivor.poll() is not None
    return {
        "seconds": round(time.time() - lost_at, 2) if ended else None,
        "exit_code": survivor.returncode if ended else None,
        "message": told(logs[0]),
    }


def told(log: Path) -> str:
    """The last line that names a rank, or else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    naming = [line for line in lines if re.search(r"rank \d+ (of \d+|was|exited|ended)", line)]
    return (naming or lines or [""])[-1][:600]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--configs", default="zero2,zero3_offload")
    parser.add_argument("--how", default="kill,hang", help=f"of {', '.join(HOW)}")
    parser.add_argument("--launchers", default="bare,hf-zero", help="bare processes, hf-zero run, or both")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", default="t5-small")
    parser.add_argument("--at", type=int, default=5, help="the step after which a rank is lost")
    parser.add_argument("--collective-timeout", type=float, default=30)
    parser.add_argument("--patience", type=float, default=120, help="seconds after the loss; then the rest is killed")
    parser.add_argument("--start-timeout", type=float, default=120, help="seconds until the loss")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--note", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = build_parser().parse_args()
    if options.rank:
        train_and_be_lost(options)
        return
    # The ranks have sessions of their own: if this process is ended and they are not, they keep the GPUs busy.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for config in options.configs.split(","):
        for how in options.how.split(","):
            for launcher in options.launchers.split(","):
                found = watch(options, config, how, launcher == "hf-zero")
                asked = {"config": config, "how": how, "launcher": launcher, "timeout_s": options.collective_timeout}
                record = {"lost_rank": {**asked, "ranks": options.ranks, "at": options.at}, **found}
                print(json.dumps(record), flush=True)
                if options.out is not None:
                    with options.out.open("a") as file:
                        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
