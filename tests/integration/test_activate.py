"""activate(): who answers ``import deepspeed``, in a fresh interpreter each time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .test_trainer import environment


def _run(code: str, *paths: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    env = environment(PYTHONPATH=":".join(map(str, paths)), **extra)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.fixture
def real_deepspeed(tmp_path: Path) -> Path:
    """A directory that holds what looks like an installed deepspeed 0.19.8."""
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("__version__ = '0.19.8'\n")
    info = tmp_path / "deepspeed-0.19.8.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.19.8\n")
    return tmp_path


SHOW = """
import importlib.metadata, deepspeed
print(deepspeed.__version__, importlib.metadata.version("deepspeed"))
"""


def test_activate_answers_for_module_and_version_and_may_be_repeated() -> None:
    done = _run(f"import hf_zero_plugin as z; z.activate(); z.activate()\n{SHOW}")
    assert done.returncode == 0, done.stderr
    module, version = done.stdout.split()
    assert module == version
    assert version.endswith("+hfzero")
    assert done.stderr.count("is the engine behind --deepspeed") == 1


def test_without_activate_nothing_answers() -> None:
    done = _run(f"import hf_zero_plugin\n{SHOW}")
    assert "ModuleNotFoundError" in done.stderr or "PackageNotFoundError" in done.stderr


def test_activate_takes_over_from_the_real_deepspeed_and_says_so(real_deepspeed: Path) -> None:
    done = _run(f"import hf_zero_plugin; hf_zero_plugin.activate()\n{SHOW}", real_deepspeed)
    assert done.returncode == 0, done.stderr
    assert all(version.endswith("+hfzero") for version in done.stdout.split())
    assert "the installed deepspeed 0.19.8 is not used" in done.stderr


def test_the_real_deepspeed_wins_where_it_is_preferred(real_deepspeed: Path) -> None:
    done = _run(f"import hf_zero_plugin; hf_zero_plugin.activate(prefer_ours=False)\n{SHOW}", real_deepspeed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.19.8", "0.19.8"]
    assert "stays in charge" in done.stderr


def test_without_a_real_one_ours_answers_even_if_not_preferred() -> None:
    done = _run(f"import hf_zero_plugin; hf_zero_plugin.activate(prefer_ours=False)\n{SHOW}")
    assert done.stdout.split()[0].endswith("+hfzero"), done.stderr


def test_activate_after_the_real_one_was_imported_is_an_error(real_deepspeed: Path) -> None:
    done = _run("import deepspeed, hf_zero_plugin; hf_zero_plugin.activate()", real_deepspeed)
    assert done.returncode != 0
    assert "ActivationError" in done.stderr
    assert "before every other import" in done.stderr


@pytest.mark.parametrize("early", ["from transformers import Trainer", "from accelerate import Accelerator"])
def test_activate_too_late_says_what_to_move_where(early: str) -> None:
    done = _run(f"{early}\nimport hf_zero_plugin; hf_zero_plugin.activate()")
    assert done.returncode != 0
    assert "ActivationError: activate() came too late" in done.stderr
    assert "top of the script" in done.stderr
    assert "hf_zero_plugin.activate()" in done.stderr


def test_bare_transformers_imported_first_is_early_enough() -> None:
    """``import transformers`` is lazy: it has not asked about deepspeed yet."""
    code = "import transformers, hf_zero_plugin; hf_zero_plugin.activate()\nfrom transformers import TrainingArguments"
    done = _run(f"{code}\n{SHOW}")
    assert done.returncode == 0, done.stderr


def test_other_ranks_do_not_repeat_the_choice() -> None:
    done = _run("import hf_zero_plugin; hf_zero_plugin.activate()", RANK="1")
    assert done.returncode == 0
    assert "[hf-zero]" not in done.stderr


@pytest.mark.slow
def test_accelerate_use_cpu_hides_gpus_and_does_not_switch_the_engine_off() -> None:
    """``accelerate launch --cpu`` sets it; accelerate alone would train by DDP and say nothing."""
    code = """
import hf_zero_plugin; hf_zero_plugin.activate()
import os
from transformers import TrainingArguments
args = TrainingArguments("out", deepspeed={"zero_optimization": {"stage": 2}})
from accelerate import Accelerator
print(args.device.type, args.use_cpu, os.environ["CUDA_VISIBLE_DEVICES"] == "")
print(Accelerator(deepspeed_plugin=args.deepspeed_plugin).distributed_type.value)
"""
    done = _run(code, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cpu", "True", "True", "DEEPSPEED"]
    assert "ACCELERATE_USE_CPU makes accelerate ignore --deepspeed" in done.stderr
