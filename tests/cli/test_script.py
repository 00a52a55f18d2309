"""Running a script in-process: its errors, its arguments, and what is checked before it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest

from hf_zero_plugin.cli import script_args
from hf_zero_plugin.cli.script_args import deepspeed_value, drop_removed_flags
from hf_zero_plugin.integration.removed_flags import OVERWRITE_VARIABLE, restore_overwrite_output_dir

from .conftest import Run, clean_environment

PYTHON_M = [sys.executable, "-m", "hf_zero_plugin"]
RAISES = """
from hf_zero_plugin.errors import ConfigError
def deep():
    raise ConfigError("$.fp16: cannot be. Set it to false.")
deep()
"""

Script = Callable[..., str]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--deepspeed", "a.json", "--x"], "a.json"),
        (["--deepspeed=a=b.json"], "a=b.json"),
        (["--x", "--deepspeed", "a", "--deepspeed", "b"], "b"),
        (["--deepspeed_other", "a"], None),
        (["--deepspeed"], None),
        ([], None),
    ],
)
def test_deepspeed_value(arguments: list[str], value: str | None) -> None:
    assert deepspeed_value(arguments) == value


def test_our_errors_are_a_message_and_code_2(run: Run, script: Script) -> None:
    """Raised inside the user's script, as the engine does from inside the Trainer."""
    name = script(RAISES)
    for command, arguments in ((PYTHON_M, [name]), (None, ["run", name])):
        done = run(*arguments, **({"command": command} if command else {}))
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == "hf-zero: error: $.fp16: cannot be. Set it to false."
        assert "Traceback" not in done.stderr


def test_traceback_on_request(run: Run, script: Script) -> None:
    done = run("run", script(RAISES), HF_ZERO_TRACEBACK="1")
    assert done.returncode == 2
    assert "in deep" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("hf-zero: error: $.fp16")


def test_other_ranks_say_who_they_are(run: Run, script: Script) -> None:
    done = run(script(RAISES), command=PYTHON_M, RANK="3", LOCAL_RANK="3", WORLD_SIZE="4")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("hf-zero: error: [rank 3] $.fp16")


@pytest.mark.parametrize("flag", [["--deepspeed", "nowhere.json"], ["--deepspeed=nowhere.json"]])
def test_a_mistake_in_the_config_is_told_before_torch_is_loaded(run: Run, script: Script, flag: list[str]) -> None:
    """The script would say so: it never starts."""
    name = script("import torch; raise SystemExit('too late')")
    for done in (run("run", name, *flag), run(name, *flag, command=PYTHON_M), run("run", "--num_gpus=2", name, *flag)):
        assert done.returncode == 2
        assert "hf-zero: error:" in done.stderr
        assert "nowhere.json" in done.stderr
        assert "too late" not in done.stderr


def test_checking_a_good_config_does_not_load_torch(tmp_path: Path) -> None:
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}))
    code = (
        "import sys; from hf_zero_plugin.cli.script_args import check_deepspeed_config as check;"
        f"check(['--deepspeed', {str(config)!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment())
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["doctor", "--help"]])
def test_help_is_cheap(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom hf_zero_plugin.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print([name for name in ('torch', 'transformers', 'pydantic', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment())
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.py"], "no script at 'nowhere.py'"),
        (["train"], "put -m before it"),
        (["-m", "no_such_package.train"], "no module named 'no_such_package'"),
        ([], "usage:"),
    ],
)
def test_what_is_not_there(run: Run, arguments: list[str], says: str) -> None:
    for done in (run("run", *arguments), run(*arguments, command=PYTHON_M)):
        assert done.returncode == 2
        assert says in done.stderr


def test_spawned_workers_find_the_script(run: Run, script: Script, tmp_path: Path) -> None:
    """multiprocessing's spawn imports ``__main__`` again by its path: data loaders depend on it."""
    source = """
import multiprocessing, sys
def square(x): return x * x
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(square, [3]))
"""
    done = run("run", script(source))
    assert done.returncode == 0, done.stderr
    assert "[9]" in done.stdout


@pytest.fixture
def transformers_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script_args, "_transformers_major", lambda: 5)
    # Set and then deleted, so that what a test writes there is undone.
    monkeypatch.setenv(OVERWRITE_VARIABLE, "")
    monkeypatch.delenv(OVERWRITE_VARIABLE)


@pytest.mark.usefixtures("transformers_5")
class TestOverwriteOutputDir:
    ARGUMENTS = ("--a", "1", "--overwrite_output_dir", "--b")

    def test_is_dropped_and_said_for_a_script_without_it(
        self, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / script("if training_args.overwrite_output_dir: pass")
        assert drop_removed_flags(list(self.ARGUMENTS), path) == ["--a", "1", "--b"]
        assert "--overwrite_output_dir was left out" in capsys.readouterr().err

    @pytest.mark.parametrize("written", ["--overwrite_output_dir=True", "--overwrite-output-dir"])
    def test_other_spellings(self, script: Script, tmp_path: Path, written: str) -> None:
        assert drop_removed_flags(["--a", written, "--b"], tmp_path / script("")) == ["--a", "--b"]
        assert drop_removed_flags(["--overwrite_output_dir", "True", "x"], None) == ["x"]

    @pytest.mark.parametrize(
        "source",
        [
            "class Arguments:\n    overwrite_output_dir: bool = False",
            "parser.add_argument('--overwrite_output_dir', action='store_true')",
        ],
    )
    def test_is_kept_for_a_script_that_has_it(self, script: Script, tmp_path: Path, source: str) -> None:
        path = tmp_path / script(source)
        assert drop_removed_flags(list(self.ARGUMENTS), path) == list(self.ARGUMENTS)

    def test_is_kept_when_a_module_beside_the_script_has_it(self, script: Script, tmp_path: Path) -> None:
        script("class A:\n    overwrite_output_dir: bool = False", "arguments.py")
        path = tmp_path / script("from arguments import A")
        assert drop_removed_flags(list(self.ARGUMENTS), path) == list(self.ARGUMENTS)

    def test_older_transformers_keep_it(self, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(script_args, "_transformers_major", lambda: 4)
        assert drop_removed_flags(list(self.ARGUMENTS), tmp_path / script("")) == list(self.ARGUMENTS)

    def test_old_scripts_may_still_read_it(self, script: Script, tmp_path: Path) -> None:
        module = SimpleNamespace(TrainingArguments=type("TrainingArguments", (), {}))
        restore_overwrite_output_dir(cast(ModuleType, module))
        assert not hasattr(module.TrainingArguments, "overwrite_output_dir")
        drop_removed_flags(list(self.ARGUMENTS), tmp_path / script(""))
        restore_overwrite_output_dir(cast(ModuleType, module))
        assert module.TrainingArguments.overwrite_output_dir is True
