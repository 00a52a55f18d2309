"""hf-zero explain: what is printed, what is read from a command line, and how mistakes end."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest

from hf_zero_plugin.cli.explain import run
from hf_zero_plugin.cli.main import main
from hf_zero_plugin.cli.training_flags import read_arguments
from hf_zero_plugin.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]
OFFLOAD = str(REPO / "configs" / "zero2_offload.json")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def explained(*words: str) -> str:
    out = io.StringIO()
    assert run(argparse.Namespace(words=list(words)), out) == 0
    return out.getvalue()


def row(text: str, key: str) -> str:
    return next(line for line in text.split("\n") if line.strip().startswith(f"{key} "))


def test_every_key_of_the_file_is_printed_with_value_origin_and_verdict() -> None:
    text = explained(OFFLOAD, "--fp16", "--learning_rate", "3e-5", "--num_gpus", "2")
    assert row(text, "params.lr").split()[1:4] == ["3e-05", "TrainingArguments.learning_rate", "(auto)"]
    assert "16" in row(text, "train_batch_size")
    assert "without effect" in row(text, "contiguous_gradients")
    assert "flat buckets from the start" in row(text, "contiguous_gradients")
    assert "cpu" in row(text, "offload_optimizer.device")
    assert "stage3_max_live_parameters" not in text


def test_all_shows_every_key_there_is() -> None:
    text = explained(OFFLOAD, "--all")
    for key in ("stage3_max_live_parameters", "sparse_gradients", "deepcompile", "offload_param.device"):
        assert row(text, key)


def test_json_holds_the_same_keys() -> None:
    document = json.loads(explained(OFFLOAD, "--json", "--bf16"))
    keys = {item["path"]: item for item in document["keys"]}
    assert keys["$.bf16.enabled"]["source"] == "TrainingArguments.bf16"
    assert keys["$.zero_optimization.stage"]["value"] == 2
    assert document["problems"] == []


def test_a_terminal_gets_a_table_with_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal()
    assert run(argparse.Namespace(words=[OFFLOAD]), terminal) == 0
    text = terminal.getvalue()
    for word in ("zero_optimization", "offload_optimizer.device", "without effect", "TrainingArguments.learning_rate"):
        assert word in text


def test_schema_is_json() -> None:
    assert json.loads(explained("--schema"))["$schema"].endswith("2020-12/schema")


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_explained_without_complaint(path: Path) -> None:
    text = explained(str(path))
    assert "refused" not in text
    assert "warning" not in text


def test_a_model_directory_gives_the_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 32}))
    config = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
    text = explained(json.dumps(config), "--model", str(tmp_path))
    assert row(text, "reduce_bucket_size").split()[1:4] == ["1024", "model", "(auto)"]


def test_a_model_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model .*cannot be read"):
        explained(OFFLOAD, "--model", str(tmp_path))


def test_refused_keys_are_shown_in_the_table_and_end_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"zero_optimization": {"stage": 2},\n "wandb": {"enabled": true}}')
    assert main(["explain", str(path)]) == 2
    printed = capsys.readouterr()
    assert "refused" in printed.out.partition("\nwandb\n")[2].split("\n")[0]
    assert f"{path}:2:12: $.wandb.enabled" in printed.err
    assert "--report_to wandb" in printed.err


def test_differences_from_given_arguments_are_shown_and_end_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    config = '{"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5}'
    assert main(["explain", config]) == 0
    assert "warning: $.gradient_clipping" in capsys.readouterr().out
    assert main(["explain", config, "--max_grad_norm", "1"]) == 2
    assert "0.5 in the file, but 1 from --max_grad_norm" in capsys.readouterr().err


def test_help_is_printed_even_though_the_trainers_flags_are_not_argparses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--help"]) == 0
    assert "usage: hf-zero explain CONFIG" in capsys.readouterr().out


def test_no_configuration_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--all"]) == 2
    assert "Name the file" in capsys.readouterr().err


# ---------------------------------------------------------------- reading a command line


def test_a_whole_command_line_may_be_pasted() -> None:
    words = (
        "--include localhost:1 examples/translation/run_translation.py --deepspeed configs/zero2_offload.json "
        "--model_name_or_path t5-small "
        "--per_device_train_batch_size 16 --output_dir out --overwrite_output_dir --fp16 --do_train "
        "--max_train_samples 10000 --num_train_epochs 1 --dataset_name wmt16 --dataset_config ro-en "
        "--source_lang en --target_lang ro --label_names a b c"
    )
    options = read_arguments(words.split())
    assert options.config == "configs/zero2_offload.json"
    assert options.training == {"per_device_train_batch_size": 16, "fp16": True}
    assert options.script_model == "t5-small"
    assert "--dataset_name" in options.ignored


@pytest.mark.parametrize(
    ("words", "training"),
    [
        (["--fp16"], {"fp16": True}),
        (["--fp16", "false"], {"fp16": False}),
        (["--fp16=True"], {"fp16": True}),
        (["--no_fp16"], {"fp16": False}),
        (["--learning-rate", "1e-4"], {"learning_rate": 1e-4}),
        (["--warmup_steps=0.1"], {"warmup_steps": 0.1}),
        (["--optim", "adafactor"], {"optim": "adafactor"}),
        (["--adam_beta2", "-1"], {"adam_beta2": -1.0}),
        (["--logging_steps", "5", "--do_train"], {}),
    ],
)
def test_training_arguments_are_read_as_the_trainer_would(words: list[str], training: dict[str, Any]) -> None:
    assert read_arguments(["c.json", *words]).training == training


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lerning_rate", "1"], "Did you mean --learning_rate?"),
        (["--zzz"], "no such argument"),
        (["--learning_rate", "fast"], "is not a number"),
        (["--max_steps", "1.5"], "is not a whole number"),
        (["--fp16=maybe"], "neither true nor false"),
        (["--learning_rate"], "a value is missing"),
        (["--num_gpus", "0"], "at least 1"),
        (["other.json"], "belongs to no argument"),
    ],
)
def test_mistakes_on_the_command_line_are_told(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("?", r"\?")):
        read_arguments(["c.json", *words])
