"""Plays scenes in processes of their own, without the engine and with it, and brings back what they saw.

``python -m tests.ecosystem.play MODULE KIND OUT`` calls ``scenes(kind, OUT)`` of ``tests.ecosystem.MODULE``, which
gives functions by name, runs them in turn and leaves their results in OUT/results<RANK>.json. KIND is "stock" or
"plugin"; only the latter activates the engine, which must happen before transformers is imported. A fourth argument
chooses the scenes in whose names it stands.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.integration.test_trainer import environment

__all__ = ["Played", "Scene", "same_weights"]

Scene = Callable[[], Any]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


class Played:
    """Both kinds of ``module``'s scenes, played at the same time on ``ranks`` processes each."""

    def __init__(self, module: str, root: Path, repo: Path, ranks: int = 1, kinds: Sequence[str] = ()) -> None:
        self.root, self.ranks = root, ranks
        self.kinds = tuple(kinds or ("stock", "plugin"))
        started: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._start(started, module, repo)
            codes = {kind: process.wait() for kind, process in started.items()}
        finally:
            for process in started.values():
                process.terminate()  # torchrun takes its ranks along
        for kind, code in codes.items():
            assert code == 0, (root / f"{kind}.log").read_text()[-4000:]
        self._results = {kind: [self._read(kind, rank) for rank in range(ranks)] for kind in self.kinds}

    def _start(self, started: dict[str, subprocess.Popen[bytes]], module: str, repo: Path) -> None:
        root, ranks = self.root, self.ranks
        for kind in self.kinds:
            launcher = [*TORCHRUN, str(ranks)] if ranks > 1 else []
            command = [sys.executable, *launcher, "-m", "tests.ecosystem.play", module, kind, str(root / kind)]
            env = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", HF_HOME=str(root / "hf"))
            log = (root / f"{kind}.log").open("w")
            started[kind] = subprocess.Popen(command, cwd=repo, env=env, stdout=log, stderr=subprocess.STDOUT)

    def _read(self, kind: str, rank: int) -> dict[str, Any]:
        return json.loads((self.root / kind / f"results{rank}.json").read_text())

    def __call__(self, kind: str, scene: str, rank: int = 0) -> Any:
        """What a scene returned on a rank; what it raised is raised here."""
        result = self._results[kind][rank][scene]
        if isinstance(result, dict):
            assert "error" not in result, result["error"]
        return result

    def folder(self, kind: str, scene: str) -> Path:
        """Where a scene put its files: ``OUT/NAME``."""
        return self.root / kind / scene


def same_weights(first: Path, second: Path, name: str = "model.safetensors", atol: float = 1e-5) -> None:
    """Both folders hold ``name``, with the same tensors up to ``atol``."""
    import torch
    from safetensors.torch import load_file

    found, wanted = load_file(first / name), load_file(second / name)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, atol=atol, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


def main(module: str, kind: str, out: str, only: str = "") -> None:
    if kind == "plugin":
        import hf_zero_plugin

        hf_zero_plugin.activate()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    root, rank = Path(out), os.environ.get("RANK", "0")
    root.mkdir(parents=True, exist_ok=True)
    results = {}
    scenes = importlib.import_module(f"tests.ecosystem.{module}").scenes(kind, root)
    for name, scene in scenes.items():
        if only and only not in name:
            continue
        try:
            results[name] = scene()
        except Exception as error:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise  # the other ranks wait for this one: torchrun ends them
            results[name] = {"error": f"{error!r}\n{traceback.format_exc()}"}
    (root / f"results{rank}.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
