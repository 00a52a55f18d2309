"""Damaged, foreign and half-written checkpoints are told apart; exports hold the masters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from hf_zero_plugin.checkpoint import export as export_module
from hf_zero_plugin.checkpoint.export import export, save_weights
from hf_zero_plugin.checkpoint.format import ShardReader, newest_tag
from hf_zero_plugin.cli.main import main
from hf_zero_plugin.engine import checkpointing, untrained
from hf_zero_plugin.errors import CheckpointError
from tests.engine.harness import Tiny, make_engine, train, weights
from tests.helpers import run_ranks


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Steps 1 and 2 of a Tiny model."""
    engine = make_engine(Tiny())
    for step in range(2):
        train(engine, 1, first=step)
        engine.save_checkpoint(str(tmp_path))
    return tmp_path


def _shard(directory: Path) -> Path:
    (found,) = directory.glob("zero_shard_*.safetensors")
    return found


def test_layout_is_what_transformers_looks_for(checkpoint: Path) -> None:
    assert (checkpoint / "latest").read_text() == "global_step2"
    assert sorted(p.name for p in checkpoint.glob("global_step*")) == ["global_step1", "global_step2"]
    assert newest_tag(checkpoint) == "global_step2"


def test_no_checkpoint_is_none_and_changes_nothing(tmp_path: Path) -> None:
    engine = make_engine(Tiny())
    before = weights(engine.module)
    assert engine.load_checkpoint(str(tmp_path)) == (None, {})
    assert engine.load_checkpoint(str(tmp_path / "nowhere"), tag="global_step5") == (None, {})
    assert all(torch.equal(w, before[name]) for name, w in weights(engine.module).items())


def test_a_tag_can_be_named(checkpoint: Path) -> None:
    engine = make_engine(Tiny(seed=3))
    path, _ = engine.load_checkpoint(str(checkpoint), tag="global_step1")
    assert path == str(checkpoint / "global_step1")
    assert engine.global_steps == 1


@pytest.mark.parametrize("latest", [None, "", "global_step7", "\n"])
def test_a_lost_or_wrong_latest_falls_back_to_the_newest_step(checkpoint: Path, latest: str | None) -> None:
    """A machine that goes down while the file is written leaves it empty."""
    (checkpoint / "latest").unlink()
    if latest is not None:
        (checkpoint / "latest").write_text(latest)
    engine = make_engine(Tiny(seed=3))
    path, _ = engine.load_checkpoint(str(checkpoint))
    assert path == str(checkpoint / "global_step2")


def test_missing_shard_names_its_rank(checkpoint: Path) -> None:
    directory = checkpoint / "global_step2"
    shard = _shard(directory)
    shard.rename(directory / "zero_shard_00001_of_00003_0000.safetensors")
    with pytest.raises(CheckpointError, match=r"written by 3 ranks.*\[0, 2\]"):
        make_engine(Tiny()).load_checkpoint(str(checkpoint))


def test_no_shard_at_all_is_told(checkpoint: Path) -> None:
    _shard(checkpoint / "global_step2").unlink()
    with pytest.raises(CheckpointError, match="global_step2"):
        make_engine(Tiny()).load_checkpoint(str(checkpoint))


@pytest.mark.parametrize("keep", [0, 6, 200, 0.5])
@pytest.mark.parametrize("name", ["zero_shard", "zero_module", "zero_state", "zero_client"])
def test_truncated_files_are_told_by_name(checkpoint: Path, name: str, keep: float) -> None:
    (file,) = (checkpoint / "global_step2").glob(f"{name}*")
    data = file.read_bytes()
    kept = int(len(data) * keep) if isinstance(keep, float) else min(int(keep), len(data) // 2)
    file.write_bytes(data[:kept])
    with pytest.raises(CheckpointError) as caught:
        make_engine(Tiny()).load_checkpoint(str(checkpoint))
    assert file.name in str(caught.value)


@pytest.mark.parametrize("name", ["zero_module.safetensors", "zero_client.pt"])
def test_missing_files_are_told_by_name(checkpoint: Path, name: str) -> None:
    (checkpoint / "global_step2" / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        make_engine(Tiny()).load_checkpoint(str(checkpoint))
    assert name in str(caught.value)


class Other(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.embed = nn.Embedding(width, 16)


def test_another_model_is_told_with_names(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="another model") as caught:
        make_engine(Other()).load_checkpoint(str(checkpoint))
    assert "embed.weight" in str(caught.value)
    assert "last.weight" in str(caught.value)


def test_another_model_can_be_loaded_loosely(checkpoint: Path) -> None:
    source, engine = make_engine(Tiny()), make_engine(Other())
    source.load_checkpoint(str(checkpoint))
    own = engine.module.embed.weight.clone()
    engine.load_checkpoint(str(checkpoint), load_module_strict=False)
    assert torch.equal(engine.module.first.weight, source.module.first.weight)
    assert torch.equal(engine.module.embed.weight, own)


def test_resized_embedding_is_told(tmp_path: Path) -> None:
    make_engine(Other(16)).save_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"'embed.weight' has 256 elements.*320.*resized"):
        make_engine(Other(20)).load_checkpoint(str(tmp_path))


def test_transposed_weight_of_the_same_size_is_told(tmp_path: Path) -> None:
    """As many elements, another shape: silently loading it would scramble the matrix."""

    class Wide(nn.Module):
        def __init__(self, rows: int, columns: int) -> None:
            super().__init__()
            self.layer = nn.Linear(columns, rows, bias=False)

    make_engine(Wide(4, 8)).save_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"layer.weight.*\[4, 8\].*\[8, 4\]"):
        make_engine(Wide(8, 4)).load_checkpoint(str(tmp_path))


def test_deepspeeds_own_layout_is_recognised(tmp_path: Path) -> None:
    directory = tmp_path / "global_step10"
    directory.mkdir()
    (tmp_path / "latest").write_text("global_step10")
    (directory / "mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="DeepSpeed's own layout"):
        make_engine(Tiny()).load_checkpoint(str(tmp_path))


def test_newer_format_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "global_step2" / "zero_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match=r"format 99.*Upgrade"):
        make_engine(Tiny()).load_checkpoint(str(checkpoint))


@pytest.mark.parametrize("where", [(checkpointing, "write_shard"), (untrained, "stream_safetensors")])
def test_a_crash_while_saving_leaves_the_old_checkpoint_usable(
    checkpoint: Path, where: tuple[ModuleType, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(Tiny())
    engine.load_checkpoint(str(checkpoint))
    train(engine, 1, first=2)

    def crash(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(*where, crash)
        with pytest.raises(OSError, match="disk full"):
            engine.save_checkpoint(str(checkpoint))
    again = make_engine(Tiny(seed=4))
    path, _ = again.load_checkpoint(str(checkpoint))
    assert path == str(checkpoint / "global_step2")
    engine.save_checkpoint(str(checkpoint))
    path, _ = again.load_checkpoint(str(checkpoint))
    assert path == str(checkpoint / "global_step3")
    assert not list(checkpoint.glob("*.tmp"))


def test_saving_again_under_the_same_tag_replaces_it(checkpoint: Path) -> None:
    engine = make_engine(Tiny(seed=9))
    engine.save_checkpoint(str(checkpoint), tag="global_step2")
    other = make_engine(Tiny())
    other.load_checkpoint(str(checkpoint))
    assert torch.equal(other.module.first.weight, engine.module.first.weight)


def test_latest_is_written_only_if_asked(tmp_path: Path) -> None:
    make_engine(Tiny()).save_checkpoint(str(tmp_path), tag="mine", save_latest=False)
    assert not (tmp_path / "latest").exists()


def test_large_shards_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_zero_plugin.checkpoint import format as file_format

    monkeypatch.setattr(file_format, "SHARD_BYTES", 1000)
    engine = make_engine(Tiny())
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path))
    assert len(list((tmp_path / "global_step2").glob("zero_shard_*"))) > 3
    other = make_engine(Tiny(seed=1))
    other.load_checkpoint(str(tmp_path))
    assert train(other, 1) == train(engine, 1)
    shutil.rmtree(tmp_path / "global_step2")


# ---------------------------------------------------------------- ranks


def _tags(root: str, mode: str) -> str:
    import torch.distributed as dist

    engine = make_engine(Tiny(), stage=1, checkpoint_tag_validation=mode)
    try:
        engine.save_checkpoint(root, tag="same")
        engine.save_checkpoint(root, tag=f"rank{dist.get_rank()}")
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_ranks_that_disagree_about_the_tag_are_told(tmp_path: Path) -> None:
    for message in run_ranks(_tags, 2, str(tmp_path), "fail"):
        assert "disagree" in message
        assert "rank0" in message
        assert "rank1" in message


# ---------------------------------------------------------------- export


def _tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("small_files", [False, True])
def test_export_is_what_from_pretrained_reads(
    dtype: str, small_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_files:
        monkeypatch.setattr(export_module, "MAX_FILE_BYTES", 3000)
    model = _tiny_t5()
    model.encoder.block[0].requires_grad_(False)
    engine = make_engine(model, precision="bf16")
    tokens = torch.tensor([[3, 4, 5, 1]])
    for _ in range(2):
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(str(tmp_path / "checkpoint-2"))
    out = tmp_path / "out"
    files = export(tmp_path / "checkpoint-2", out, dtype=dtype)
    assert (len(files) > 1) == small_files
    model.config.save_pretrained(out)
    again = T5ForConditionalGeneration.from_pretrained(out, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    from hf_zero_plugin.engine.tensor_access import full_state

    ours = dict(again.named_parameters())
    for name, param in model.named_parameters():
        master = full_state(param, "master") if param.requires_grad else param.float()
        assert master is not None
        assert torch.equal(ours[name].float(), master if dtype == "fp32" else master.bfloat16().float()), name
    assert not list(out.glob("*.tmp"))


def test_a_new_export_takes_the_place_of_an_old_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one in other files, which ``from_pretrained`` might prefer."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter.safetensors").touch()
    for limit, is_whole in [(10**9, True), (1, False), (2000, False), (10**9, True)]:
        monkeypatch.setattr(export_module, "MAX_FILE_BYTES", limit)
        written = export(checkpoint, out)
        index = [] if is_whole else [out / "model.safetensors.index.json"]
        assert set(out.iterdir()) == {*written, *index, out / "adapter.safetensors"}
        assert (len(written) == 1) == is_whole


def test_an_export_loads_by_itself_and_keeps_what_is_there(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "trainer_state.json", "notes.txt"):
        (checkpoint / name).write_text("of the checkpoint")
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text("mine")
    export(checkpoint / "global_step2", out)
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (out / "tokenizer.json").read_text() == "mine"


def test_export_command_and_its_error(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(checkpoint), str(tmp_path / "a")]) in (0, None)
    assert set(load_file(tmp_path / "a" / "model.safetensors")) == {*dict(Tiny().named_parameters()), "seen"}
    with pytest.raises(CheckpointError, match="no checkpoint of this engine"):
        export(tmp_path / "a", tmp_path / "b")


def test_save_16bit_model_writes_shared_tensors_once(tmp_path: Path) -> None:
    engine = make_engine(_tiny_t5(), precision="bf16")
    engine.save_16bit_model(str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    state = engine.module.state_dict()
    assert set(saved) < set(state)
    for name, tensor in saved.items():
        assert torch.equal(tensor, state[name])
        assert tensor.dtype == torch.bfloat16
    assert {"shared.weight"} <= set(saved)


def test_save_weights_keeps_different_views_of_one_memory_apart(tmp_path: Path) -> None:
    flat = torch.arange(6.0)
    save_weights({"a": flat[:3], "b": flat[3:], "c": flat[:3]}, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["a"].tolist() == [0, 1, 2]
    assert saved["b"].tolist() == [3, 4, 5]
    assert set(saved) == {"a", "b"}


def test_reader_refuses_a_gap(checkpoint: Path) -> None:
    reader = ShardReader(checkpoint / "global_step2")
    reader._places["first.weight", "master"].pop()
    reader._places["first.weight", "master"].append(
        reader._places["last.weight", "master"][0]._replace(start=0, end=100)
    )
    with pytest.raises(CheckpointError, match=r"first\.weight"):
        reader.read("first.weight", "master", 0, 256)
