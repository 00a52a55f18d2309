"""Every checkpoint folder is written once, by itself or beside weights that are not gathered."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.integration.single_write import in_save_model, write_once
from tests.engine.harness import Tiny, make_engine

from .playing import play_scenes
from .single_write_scenes import STEPS

# ---------------------------------------------------------------- the order of calls, without a Trainer


def _trainer_class() -> Any:
    """What transformers' Trainer does with an engine that gives it no weights."""

    class Trainer:
        folder: Path

        def __init__(self, engine: ZeroEngine, root: Path, save_only_model: bool = False) -> None:
            self.deepspeed = engine
            self.args = SimpleNamespace(save_only_model=save_only_model)
            self.state = SimpleNamespace(global_step=7)
            self.folder = root / "checkpoint-7"

        def save_model(self, folder: Path) -> None:
            with in_save_model(self):
                self.deepspeed.save_checkpoint(str(folder))

        def _save_checkpoint(self) -> None:
            self.save_model(self.folder)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler()

        def _save_optimizer_and_scheduler(self) -> None:
            self.deepspeed.save_checkpoint(str(self.folder))

    write_once(SimpleNamespace(Trainer=Trainer, PREFIX_CHECKPOINT_DIR="checkpoint"))  # type: ignore[arg-type]
    return Trainer


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ZeroEngine:
    """It only remembers, in ``written``, what it is to write: folder and the first weight of that time."""
    made = make_engine(Tiny())
    made.written = []

    def save_checkpoint(self: ZeroEngine, save_dir: str, exclude_frozen_parameters: bool = False) -> bool:
        weight = self.module.first.weight.flatten()[0].item()
        made.written.append((Path(save_dir).name, weight, exclude_frozen_parameters))
        return True

    monkeypatch.setattr(ZeroEngine, "save_checkpoint", save_checkpoint)
    return made


def _set_weight(engine: ZeroEngine, value: float) -> None:
    with torch.no_grad():
        engine.module.first.weight.fill_(value)


def test_weights_that_are_saved_alone_are_not_put_off(engine: ZeroEngine, tmp_path: Path) -> None:
    _set_weight(engine, 1.0)
    trainer = _trainer_class()(engine, tmp_path)
    trainer.save_model(tmp_path / "checkpoint-7")
    _trainer_class()(engine, tmp_path, save_only_model=True)._save_checkpoint()
    assert engine.written == [("checkpoint-7", 1.0, False)] * 2


def test_the_later_write_is_the_one_that_is_done(engine: ZeroEngine, tmp_path: Path) -> None:
    """Averaged weights, say, are in the model while it is saved, and gone when the optimizer is."""

    class Averaged(_trainer_class()):  # type: ignore[misc]
        def save_model(self, folder: Path) -> None:
            _set_weight(self.deepspeed, 5.0)
            super().save_model(folder)
            super().save_model(folder.parent / "averaged")
            _set_weight(self.deepspeed, 1.0)

    trainer = Averaged(engine, tmp_path)
    trainer._save_checkpoint()
    assert engine.written == [("averaged", 5.0, False), ("checkpoint-7", 1.0, False)]
    trainer.save_model(tmp_path / "checkpoint-7")  # nothing of the saving is left
    assert len(engine.written) == 4
    assert "save_checkpoint" not in vars(engine)


def test_a_write_that_does_not_come_is_made_up_for(engine: ZeroEngine, tmp_path: Path) -> None:
    _set_weight(engine, 1.0)

    class OwnStates(_trainer_class()):  # type: ignore[misc]
        def _save_optimizer_and_scheduler(self) -> None:
            self.deepspeed.save_checkpoint(str(self.folder / "states"), exclude_frozen_parameters=True)

    OwnStates(engine, tmp_path)._save_checkpoint()
    assert engine.written == [("states", 1.0, True), ("checkpoint-7", 1.0, False)]


def test_an_error_while_saving_leaves_the_engine_as_it_was(engine: ZeroEngine, tmp_path: Path) -> None:
    class Broken(_trainer_class()):  # type: ignore[misc]
        def _save_optimizer_and_scheduler(self) -> None:
            raise OSError("disk full")

    trainer = Broken(engine, tmp_path)
    with pytest.raises(OSError, match="disk full"):
        trainer._save_checkpoint()
    assert engine.written == []
    trainer.save_model(tmp_path / "checkpoint-7")
    assert len(engine.written) == 1


# ---------------------------------------------------------------- the Trainer

Saved = tuple[Path, str, list[list[tuple[str, int]]]]


@pytest.fixture(scope="module", params=[1, 2])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, repo_dir: Path) -> Saved:
    """(folder, everything that was said, every rank's writes)."""
    out = tmp_path_factory.mktemp("single")
    said = play_scenes("single_write_scenes", request.param, out, repo_dir)
    writes = [json.loads((out / f"writes{rank}.json").read_text()) for rank in range(request.param)]
    return out, said, writes


CHECKPOINTS = [f"{run}/checkpoint-{n}/global_step{n}" for run in ("whole", "only_model") for n in range(1, STEPS + 1)]
FOLDERS = [*CHECKPOINTS[:STEPS], f"elsewhere/global_step{STEPS}", *CHECKPOINTS[STEPS:]]


@pytest.mark.slow
def test_every_folder_is_written_once_and_in_full(saved: Saved) -> None:
    out, _, writes = saved
    for mine in writes:
        assert [folder for folder, _ in mine] == FOLDERS
    num_bytes: Counter[str] = Counter()
    for folder, size in (write for mine in writes for write in mine):
        num_bytes[folder] += size
    for folder in FOLDERS:
        assert {file.name[:11] for file in (out / folder).iterdir()} == {
            *("zero_client", "zero_module", "zero_shard_", "zero_state."),
        }
        shards = [load_file(file) for file in (out / folder).glob("zero_shard_*")]
        on_disk = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        assert num_bytes[folder] == on_disk > 0
        assert not (out / folder).parent.joinpath("model.safetensors").exists()


@pytest.mark.slow
def test_what_is_saved_elsewhere_is_the_last_checkpoint_and_says_what_to_do(saved: Saved) -> None:
    out, said, _ = saved
    last, elsewhere = out / CHECKPOINTS[STEPS - 1], out / FOLDERS[STEPS]
    for file in elsewhere.glob("*.safetensors"):
        found, wanted = load_file(file), load_file(last / file.name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    advised = Counter(re.findall(r"hf-zero export (\S+) ", said))
    assert advised == Counter(str((out / folder).parent) for folder in FOLDERS)


@pytest.mark.slow
def test_a_resumed_run_ends_where_the_whole_one_did(saved: Saved) -> None:
    out, _, _ = saved
    found, wanted = load_file(out / "resumed.safetensors"), load_file(out / "whole.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
