"""The command line: HF's flags and the article's spelling, what they default to, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from arguments import checkpoint_to_resume, field_of, parse_arguments
from errors import UserError, exit_code_of

from tests.examples.conftest import pair, write_lines


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    train = write_lines(tmp_path / "train.json", [pair("a", "b")])
    return [
        "--config_name", "preset:t5-small", "--source_lang", "en", "--target_lang", "ro", "--do_train",
        "--train_file", str(train), "--output_dir", str(tmp_path / "out"), "--use_cpu",
    ]  # fmt: skip


def without(arguments: list[str], flag: str) -> list[str]:
    index = arguments.index(flag)
    return arguments[:index] + arguments[index + 2 :]


def test_the_articles_command_parses(tmp_path: Path) -> None:
    """Among others --dataset_config, which is short for --dataset_config_name, and --overwrite_output_dir."""
    arguments = parse_arguments(
        "--model_name_or_path t5-small --per_device_train_batch_size 4 --overwrite_output_dir --do_train "
        "--max_train_samples 10000 --num_train_epochs 1 --dataset_name wmt16 --dataset_config ro-en "
        f"--source_lang en --target_lang ro --use_cpu --output_dir {tmp_path}".split()
    )
    assert arguments.data.dataset_config_name == "ro-en"
    assert arguments.data.overwrite_output_dir
    assert arguments.data.max_train_samples == 10000
    assert arguments.data.max_source_length == 1024
    assert arguments.training.generation_max_length == arguments.data.val_max_target_length == 128


def test_every_flag_of_hfs_script_is_taken(base: list[str]) -> None:
    flags = (
        "--cache_dir c --use_fast_tokenizer true --model_revision main --token t --trust_remote_code "
        "--resize_position_embeddings true --overwrite_cache --preprocessing_num_workers 2 --max_source_length 9 "
        "--max_target_length 8 --val_max_target_length 7 --pad_to_max_length --max_eval_samples 3 "
        "--max_predict_samples 3 --num_beams 2 --ignore_pad_token_for_loss false --source_prefix x "
        "--forced_bos_token y --predict_with_generate --resume_from_checkpoint z"
    )
    arguments = parse_arguments([*base, *flags.split()])
    assert arguments.training.generation_max_length == 7
    assert arguments.training.generation_num_beams == 2
    assert not arguments.data.ignore_pad_token_for_loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: without(a, "--config_name"), "no model"),
        (lambda a: [*a, "--model_name_or_path", "m", "--config_overrides", "d_model=8"], "--config_overrides"),
        (lambda a: without(a, "--source_lang"), "--source_lang"),
        (lambda a: [*a, "--target_lang", "en"], "both 'en'"),
        (lambda a: [x for x in a if x != "--do_train"], "nothing to do"),
        (lambda a: without(a, "--train_file"), "pass --train_file"),
        (lambda a: [*a, "--train_file", "nowhere.json"], "nowhere.json: no such file"),
        (lambda a: [*a, "--do_predict"], "pass --test_file"),
        (lambda a: [*a, "--max_train_samples", "0"], "--max_train_samples 0"),
        (lambda a: [*a, "--max_source_length", "1"], "--max_source_length 1"),
        (lambda a: [*a, "--predict_before_training"], "--predict_before_training"),
        (lambda a: [*a, "--target_lang", "de", "--normalize_diacritics"], "Romanian"),
        (lambda a: [*a, "--logging_steps", "0"], "logging_steps"),
    ],
)
def test_refused_with_a_message_that_names_the_flag(
    base: list[str], change: Callable[[list[str]], list[str]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parse_arguments(change(base))


def test_language_code_of_mbart_is_stored_under_its_first_part() -> None:
    assert (field_of("ro_RO"), field_of("ro")) == ("ro", "ro")


def test_checkpoint_choice(base: list[str], tmp_path: Path) -> None:
    """Empty folder: anew. Files but no checkpoint: refused, unless told to overwrite. Checkpoint: resumed."""
    out = tmp_path / "out"

    def choice(*flags: str) -> str | None:
        arguments = parse_arguments([*base, *flags])
        return checkpoint_to_resume(arguments.data, arguments.training)

    assert choice() is None
    with pytest.raises(UserError, match="holds no folder checkpoint"):
        choice("--resume_from_checkpoint", "True")
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite_output_dir"):
        choice()
    assert choice("--overwrite_output_dir") is None
    (out / "checkpoint-2").mkdir()
    (out / "checkpoint-10").mkdir()
    assert choice() == str(out / "checkpoint-10")
    assert choice("--overwrite_output_dir") is None
    assert choice("--resume_from_checkpoint", "True") == str(out / "checkpoint-10")
    assert choice("--resume_from_checkpoint", "False") is None
    assert choice("--resume_from_checkpoint", str(out / "checkpoint-2")) == str(out / "checkpoint-2")
    with pytest.raises(UserError, match="no such folder"):
        choice("--resume_from_checkpoint", str(out / "checkpoint-3"))
    assert (out / "notes.txt").read_text() == "mine"


def test_exit_code_two_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("what, where, why, fix")

    assert exit_code_of(main, "program") == 2
    assert capsys.readouterr().err == "program: error: what, where, why, fix\n"
