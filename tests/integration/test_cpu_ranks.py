"""Processes launched on a machine without accelerator see each other through accelerate, with the stock Trainer too."""

from __future__ import annotations

import enum
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from hf_zero_plugin.integration.cpu_ranks import repair_partial_state

STOCK_TRAINER = """
import pathlib, sys
import accelerate.state
from hf_zero_plugin.integration.cpu_ranks import repair_partial_state
repair_partial_state(accelerate.state)
import torch
from transformers import Trainer, TrainingArguments

class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
    def forward(self, x, labels):
        return {"loss": ((self.weight * x - labels) ** 2).mean()}

# The ranks' halves of every batch differ, so only averaged gradients give the weight of the whole batch.
data = [{"x": torch.tensor(1.0), "labels": torch.tensor(float(i))} for i in range(8)]
arguments = TrainingArguments(sys.argv[1], per_device_train_batch_size=int(sys.argv[2]), max_steps=2, report_to=[],
    save_strategy="no", optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", disable_tqdm=True)
trainer = Trainer(Line(), arguments, train_dataset=data)
trainer.train()
weight = f"{trainer.model.weight.item():.6f}"
# A file a rank: lines that two processes print into one pipe may run into each other.
seen = f"{arguments.process_index} {arguments.world_size} {arguments.device.type} {weight}"
pathlib.Path(sys.argv[1], f"seen{arguments.process_index}").write_text(seen)
"""


class Kind(enum.Enum):
    NO = enum.auto()
    MULTI_CPU = enum.auto()
    MULTI_GPU = enum.auto()


def fake_accelerate(answer: tuple[str | None, Kind]) -> Any:
    class PartialState:
        def _prepare_backend(self, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None) -> Any:
            return answer

    return SimpleNamespace(PartialState=PartialState, DistributedType=Kind)


@pytest.mark.parametrize(
    ("launched", "answer", "expected"),
    [
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, (None, Kind.NO), ("gloo", Kind.MULTI_CPU)),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, (None, Kind.NO), (None, Kind.NO)),
        ({}, (None, Kind.NO), (None, Kind.NO)),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, ("nccl", Kind.MULTI_GPU), ("nccl", Kind.MULTI_GPU)),
    ],
)
def test_only_lonely_cpu_ranks_are_answered_for(
    monkeypatch: pytest.MonkeyPatch, launched: dict[str, str], answer: Any, expected: Any
) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    module = fake_accelerate(answer)
    repair_partial_state(module)
    repaired = module.PartialState._prepare_backend
    repair_partial_state(module)
    assert module.PartialState._prepare_backend is repaired
    assert module.PartialState()._prepare_backend(False) == expected


def test_a_version_without_the_method_is_left_alone() -> None:
    repair_partial_state(cast(ModuleType, SimpleNamespace(PartialState=type("PartialState", (), {}))))


@pytest.mark.slow
def test_stock_trainer_on_two_cpu_ranks_equals_one_with_the_whole_batch(tmp_path: Path) -> None:
    """Without the repair every rank says world size 1 and trains alone, on its own gradients."""
    script = tmp_path / "train.py"
    script.write_text(STOCK_TRAINER)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

    def seen(launcher: list[str], batch_size: int) -> list[list[str]]:
        out = tmp_path / f"out{batch_size}"
        out.mkdir()
        command = [sys.executable, *launcher, str(script), str(out), str(batch_size)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return [path.read_text().split() for path in sorted(out.glob("seen*"))]

    [alone] = seen([], batch_size=4)
    both = seen(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], batch_size=2)
    assert alone[:3] == ["0", "1", "cpu"]
    assert both == [[rank, "2", "cpu", alone[3]] for rank in ("0", "1")]
