"""Weights that are not gathered: what ``save_model`` says, and that doing what it says gives the weights."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .playing import play_scenes
from .test_trainer import environment
from .ungathered_scenes import MODELS

pytestmark = pytest.mark.slow

HF_ZERO = "import sys; from hf_zero_plugin.cli.main import main; sys.exit(main())"
Saved = tuple[Path, str]


@pytest.fixture(scope="module", params=[1, 2])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, repo_dir: Path) -> Saved:
    """(folder, everything that was said) of one number of ranks."""
    out = tmp_path_factory.mktemp("ungathered")
    return out, play_scenes("ungathered_scenes", request.param, out, repo_dir)


@pytest.mark.parametrize("name", MODELS)
def test_the_command_that_is_shown_makes_the_weights(name: str, saved: Saved, repo_dir: Path) -> None:
    """T5 (tied, biasless), stacked experts with buffers of no state dict, and a model that was never trained."""
    out, said = saved
    folder = out / f"{name} saved"
    assert not list(folder.glob("*.safetensors"))
    (shown,) = re.findall(rf"with: (hf-zero export .*{name} saved.*)", said)
    program, *arguments = shlex.split(shown)
    done = subprocess.run([sys.executable, "-c", HF_ZERO, *arguments], cwd=repo_dir, env=environment())
    assert (program, done.returncode) == ("hf-zero", 0)
    found, wanted = load_file(folder / "model.safetensors"), load_file(out / f"{name}.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_reads_an_export_to_another_folder(name: str, saved: Saved, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from hf_zero_plugin.cli.main import main

    out, _ = saved
    assert main(["export", str(out / f"{name} saved"), str(tmp_path)]) in (0, None)
    reader = AutoModelForCausalLM if name == "experts" else AutoModelForSeq2SeqLM
    model, report = reader.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    wanted = load_file(out / f"{name}.safetensors")
    found = {key: param for key, param in model.named_parameters() if key in wanted}
    assert len(found) > 20
    assert all(torch.equal(found[key], wanted[key]) for key in found)


def test_advice_is_given_once_and_only_where_it_is_needed(saved: Saved) -> None:
    out, said = saved
    assert "zero_to_fp32" not in said
    assert said.count("hf-zero export") == len(MODELS)
    assert "hf-zero" not in said[said.index("saving lora") :]
    assert (out / "lora saved" / "adapter_model.safetensors").is_file()
