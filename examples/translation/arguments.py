"""The command line of run_translation.py: HF's own flags, and five of ours (marked "Ours")."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

logger = logging.getLogger("translation")


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model, from where, and of what size."""

    model_name_or_path: str | None = _flag(
        None, "Hub name or folder of the pretrained model. Absent: random weights of --config_name."
    )
    config_name: str | None = _flag(
        None, "Hub name or folder of a config, or preset:t5-small (t5-base, t5-large, t5-3b, t5-11b, t5-demo)."
    )
    tokenizer_name: str | None = _flag(None, "Hub name or folder of the tokenizer, if it is not the model's.")
    cache_dir: str | None = _flag(None, "Where downloads are kept.")
    use_fast_tokenizer: bool = _flag(True, "Use the tokenizer written in Rust, where there is one.")
    model_revision: str = _flag("main", "Branch, tag or commit of the model on the hub.")
    token: str | None = _flag(None, "Token for private models on the hub.")
    trust_remote_code: bool = _flag(False, "Run model code that the hub repository brings along.")
    resize_position_embeddings: bool | None = _flag(
        None, "Grow learned position embeddings to --max_source_length. T5 has none."
    )
    config_overrides: str | None = _flag(
        None, "Ours. Change the config before random weights are made: 'd_model=64,num_layers=2'."
    )


@dataclass
class DataArguments:
    """Which text, how much of it, and how long."""

    source_lang: str | None = _flag(None, "Language to translate from, e.g. en.")
    target_lang: str | None = _flag(None, "Language to translate to, e.g. ro.")
    dataset_name: str | None = _flag(None, "Dataset on the hub, e.g. wmt16.")
    dataset_config_name: str | None = _flag(None, "Its configuration, e.g. ro-en.")
    train_file: str | None = _flag(None, 'JSON lines: {"translation": {"en": ..., "ro": ...}}.')
    validation_file: str | None = _flag(None, "The same for evaluation.")
    test_file: str | None = _flag(None, "The same for prediction.")
    overwrite_cache: bool = _flag(
        False, "Accepted. Nothing tokenised is cached on disk here, so there is nothing to overwrite."
    )
    overwrite_output_dir: bool = _flag(
        False, "Train anew into an output folder that is not empty; no file is deleted, no checkpoint picked up."
    )
    preprocessing_num_workers: int | None = _flag(None, "Threads of the tokenizer. Absent: one per core.")
    max_source_length: int = _flag(1024, "Longer sources are cut to this many tokens.")
    max_target_length: int = _flag(128, "Longer targets are cut to this many tokens.")
    val_max_target_length: int | None = _flag(
        None, "The same for evaluation and prediction, and the limit of generate. Absent: --max_target_length."
    )
    pad_to_max_length: bool = _flag(False, "Pad every batch to the limits, not to its longest row.")
    max_train_samples: int | None = _flag(None, "Use at most this many training pairs.")
    max_eval_samples: int | None = _flag(None, "Use at most this many validation pairs.")
    max_predict_samples: int | None = _flag(None, "Use at most this many test pairs.")
    num_beams: int | None = _flag(None, "Beams of generate.")
    ignore_pad_token_for_loss: bool = _flag(True, "Padding does not count in the loss.")
    source_prefix: str | None = _flag(
        None, "Text before every source. Absent: T5's own, e.g. 'translate English to Romanian: '."
    )
    forced_bos_token: str | None = _flag(None, "First token to generate: the language code of multilingual models.")
    normalize_diacritics: bool = _flag(
        False, "Ours. Write Romanian s and t with comma below where the text has the cedilla, references included."
    )
    predict_before_training: bool = _flag(
        False, "Ours. Translate the test set (or the validation set) before training too, as before_bleu."
    )


class Arguments(NamedTuple):
    model: ModelArguments
    data: DataArguments
    training: Seq2SeqTrainingArguments


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parse and check the command line.

    Args:
        argv: the arguments without the program; None means ``sys.argv``.

    Raises:
        UserError: arguments that are wrong alone or together. (argparse itself exits with code 2.)
    """
    # No annotation of the list: HfArgumentParser resolves the dataclasses' own annotations.
    parser = HfArgumentParser([ModelArguments, DataArguments, Seq2SeqTrainingArguments])
    try:
        model, data, training = parser.parse_args_into_dataclasses(args=list(argv) if argv is not None else None)
    except ValueError as error:
        # TrainingArguments checks itself when it is built; its messages name the argument.
        raise UserError(str(error)) from error
    except ImportError as error:
        # transformers looks for the package behind --deepspeed while it builds the arguments.
        raise UserError(
            f"an argument needs a package that is not there: {str(error).splitlines()[0]}\n"
            "For --deepspeed, start this script by 'hf-zero run', or install deepspeed."
        ) from error
    arguments = Arguments(model, data, training)
    _check_model(arguments)
    _check_data(arguments)
    _fill_generation(data, training)
    return arguments


def _check_model(arguments: Arguments) -> None:
    model = arguments.model
    if model.model_name_or_path is None and model.config_name is None:
        raise UserError(
            "no model: pass --model_name_or_path (pretrained weights), "
            "or --config_name (random weights, e.g. preset:t5-small)."
        )
    if model.model_name_or_path is not None and model.config_overrides is not None:
        raise UserError(
            "--config_overrides changes the sizes of a model, so pretrained weights would not fit. "
            "Drop it, or drop --model_name_or_path and train random weights of --config_name."
        )


def _check_data(arguments: Arguments) -> None:
    data, training = arguments.data, arguments.training
    if not (training.do_train or training.do_eval or training.do_predict):
        raise UserError("nothing to do: pass at least one of --do_train, --do_eval, --do_predict.")
    if not data.source_lang or not data.target_lang:
        raise UserError("pass --source_lang and --target_lang, e.g. --source_lang en --target_lang ro.")
    if data.source_lang == data.target_lang:
        raise UserError(f"--source_lang and --target_lang are both '{data.source_lang}'.")
    wanted = {
        "train_file": training.do_train,
        "validation_file": training.do_eval,
        "test_file": training.do_predict,
    }
    for name, is_needed in wanted.items():
        path = getattr(data, name)
        if is_needed and path is None and data.dataset_name is None:
            raise UserError(f"pass --{name} (JSON lines), or --dataset_name (a dataset on the hub).")
        if path is not None and not Path(path).is_file():
            raise UserError(f"--{name} {path}: no such file (looked from {Path.cwd()}).")
    for name in ("max_source_length", "max_target_length", "val_max_target_length"):
        value = getattr(data, name)
        if value is not None and value < 2:
            raise UserError(f"--{name} {value}: at least 2, one token and the end of the sentence.")
    for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
        value = getattr(data, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: at least 1; leave it out to use every row.")
    if data.predict_before_training and not (training.do_predict or training.do_eval):
        raise UserError("--predict_before_training needs text to translate: add --do_predict or --do_eval.")
    if data.normalize_diacritics and "ro" not in (field_of(data.source_lang), field_of(data.target_lang)):
        raise UserError("--normalize_diacritics is about Romanian; neither --source_lang nor --target_lang is ro.")


def _fill_generation(data: DataArguments, training: Seq2SeqTrainingArguments) -> None:
    """Let every generate of the Trainer, also those inside ``train()``, use the limits of the command line."""
    if data.val_max_target_length is None:
        data.val_max_target_length = data.max_target_length
    if training.generation_max_length is None:
        training.generation_max_length = data.val_max_target_length
    if data.num_beams is not None:
        training.generation_num_beams = data.num_beams


def field_of(language: str) -> str:
    """The key of a language in the rows: mBART's 'ro_RO' is stored under 'ro'."""
    return language.split("_")[0]


def checkpoint_to_resume(data: DataArguments, training: Seq2SeqTrainingArguments) -> str | None:
    """The checkpoint folder that training starts from, or None to start anew.

    An explicit --resume_from_checkpoint wins ('True' means the last one). Otherwise the last checkpoint in the
    output folder is picked up, unless --overwrite_output_dir asks to start anew.

    Raises:
        UserError: the checkpoint named is not there, or the folder holds other files and nothing to resume.
    """
    from transformers.trainer_utils import get_last_checkpoint

    output_dir = Path(str(training.output_dir))
    last = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    asked = training.resume_from_checkpoint
    if asked is not None and str(asked).lower() not in ("true", "false"):
        if not Path(asked).is_dir():
            raise UserError(f"--resume_from_checkpoint {asked}: no such folder.")
        return str(asked)
    if asked is not None and str(asked).lower() == "true":
        if last is None:
            raise UserError(f"--resume_from_checkpoint True: {output_dir} holds no folder checkpoint-*.")
        return last
    if data.overwrite_output_dir or asked is not None or not training.do_train:
        return None
    if last is not None:
        logger.warning("Resuming from %s. To start anew pass --overwrite_output_dir.", last)
        return last
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(
            f"--output_dir {output_dir} is not empty and holds no checkpoint to resume from. "
            "Pass --overwrite_output_dir to train into it all the same, or name another folder."
        )
    return None
