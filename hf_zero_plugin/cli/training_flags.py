"""The words after ``hf-zero explain``: our options, the Trainer's arguments, and those of a script.

A real TrainingArguments would set up devices and process groups, so the few arguments that a configuration depends
on are read here, by the names and defaults of its fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hf_zero_plugin.config.facts import TrainingFacts
from hf_zero_plugin.config.problems import did_you_mean
from hf_zero_plugin.errors import ConfigError

__all__ = ["ExplainArguments", "read_arguments"]

_TRUE = frozenset({"true", "1", "yes", "y", "t"})
_FALSE = frozenset({"false", "0", "no", "n", "f"})

_SWITCHES = frozenset({"help", "schema", "json", "all"})
_OPTIONS = frozenset({"model", "num_gpus"})

LAUNCHER_FLAGS = frozenset(
    {"num_nodes", "include", "exclude", "hostfile", "node_rank", "master_addr", "master_port", "module"}
)
"""Arguments of ``hf-zero run``, which may stand in a pasted command line."""

SCRIPT_FLAGS = frozenset(
    {
        "attn_implementation",
        "block_size",
        "cache_dir",
        "config_name",
        "config_overrides",
        "dataset_config",
        "dataset_config_name",
        "dataset_name",
        "dtype",
        "forced_bos_token",
        "ignore_pad_token_for_loss",
        "line_by_line",
        "low_cpu_mem_usage",
        "max_eval_samples",
        "max_predict_samples",
        "max_seq_length",
        "max_source_length",
        "max_target_length",
        "max_train_samples",
        "mlm_probability",
        "model_name_or_path",
        "model_revision",
        "model_type",
        "normalize_diacritics",
        "num_beams",
        "overwrite_cache",
        "overwrite_output_dir",
        "pad_to_max_length",
        "preprocessing_num_workers",
        "resize_position_embeddings",
        "source_lang",
        "source_prefix",
        "streaming",
        "summary_column",
        "target_lang",
        "task_name",
        "test_file",
        "text_column",
        "token",
        "tokenizer_name",
        "torch_dtype",
        "train_file",
        "trust_remote_code",
        "use_fast_tokenizer",
        "val_max_target_length",
        "validation_file",
        "validation_split_percentage",
    }
)
"""Arguments of the example scripts: told apart from typing mistakes, and without influence here."""


@dataclass(slots=True)
class ExplainArguments:
    config: str | None = None
    model: str | None = None
    script_model: str | None = None
    """--model_name_or_path of the script."""
    num_gpus: int = 1
    help: bool = False
    schema: bool = False
    json: bool = False
    all: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    """Arguments that TrainingFacts knows, as given."""
    ignored: list[str] = field(default_factory=list)
    """Flags of the script or the launcher, as given."""


def read_arguments(words: Iterable[str]) -> ExplainArguments:
    """Read every word.

    Raises:
        ConfigError: a flag that nobody knows, a value that does not fit, or a word too many.
    """
    options = ExplainArguments()
    queue = list(words)
    takes_more = False
    while queue:
        word = queue.pop(0)
        if word in ("-h", "--help"):
            options.help = True
        elif word.startswith("--") and len(word) > 2:
            name, has_value, value = word[2:].partition("=")
            takes_more = _read_flag(options, name.replace("-", "_"), value if has_value else None, queue)
        elif word.endswith(".py"):
            continue
        elif options.config is None:
            options.config = word
        elif not takes_more:
            raise ConfigError(
                f'hf-zero explain: the word "{word}" belongs to no argument, and the configuration is '
                f"{options.config} already. Remove it, or put the name of its argument before it."
            )
    return options


def _read_flag(options: ExplainArguments, name: str, value: str | None, queue: list[str]) -> bool:
    """Read one flag and its value; True if more values may follow."""
    if name in _SWITCHES:
        setattr(options, name, True)
        return False
    if name in _OPTIONS:
        given = _required(name, value, queue)
        setattr(options, name, _number(name, given, int) if name == "num_gpus" else given)
        return False
    if name == "deepspeed":
        options.config = _required(name, value, queue)
        return False
    if name in SCRIPT_FLAGS or name in LAUNCHER_FLAGS:
        options.ignored.append(f"--{name}")
        given_or_none = value if value is not None else _optional(queue)
        if name == "model_name_or_path":
            options.script_model = given_or_none
        return True
    return _read_training_flag(options, name, value, queue)


def _read_training_flag(options: ExplainArguments, name: str, value: str | None, queue: list[str]) -> bool:
    negated = name.startswith("no_") and name[3:] in _training_types()
    plain = name[3:] if negated else name
    kinds = _training_types()
    if plain not in kinds:
        known = [*kinds, *SCRIPT_FLAGS, *_SWITCHES, *_OPTIONS]
        near = did_you_mean(name, known)
        hint = f"Did you mean --{near}?" if near else "Remove it if it belongs to your script alone."
        raise ConfigError(f"--{name}: no such argument of the Trainer, of its example scripts or of explain. {hint}")
    facts = {item.name: item.type for item in dataclasses.fields(TrainingFacts)}
    if kinds[plain] == "bool":
        follows = value is None and bool(queue) and queue[0].lower() in _TRUE | _FALSE
        word = queue.pop(0) if follows else (value if value is not None else "true")
        if plain in facts:
            options.training[plain] = _boolean(name, word) is not negated
        return False
    given = value if value is not None else _optional(queue)
    if plain not in facts:
        return True
    if given is None:
        raise ConfigError(f"--{name}: a value is missing after it.")
    kind = facts[plain]
    options.training[plain] = given if kind == "str" else _number(name, given, int if kind == "int" else float)
    return False


def _training_types() -> dict[str, str]:
    """Every TrainingArguments field -> "bool" or "other"."""
    from transformers import Seq2SeqTrainingArguments

    kinds = {}
    for item in dataclasses.fields(Seq2SeqTrainingArguments):
        is_switch = item.type in (bool, "bool") or isinstance(item.default, bool) or str(item.type) == "bool | None"
        kinds[item.name] = "bool" if is_switch else "other"
    return kinds


def _optional(queue: list[str]) -> str | None:
    return None if not queue or queue[0].startswith("--") else queue.pop(0)


def _required(name: str, value: str | None, queue: list[str]) -> str:
    given = value if value is not None else _optional(queue)
    if given is None:
        raise ConfigError(f"--{name}: a value is missing after it.")
    return given


def _boolean(name: str, word: str) -> bool:
    if word.lower() in _TRUE:
        return True
    if word.lower() in _FALSE:
        return False
    raise ConfigError(f'--{name}: "{word}" is neither true nor false. Write one of them, or nothing for true.')


def _number(name: str, word: str, kind: type[int] | type[float]) -> int | float:
    try:
        number = kind(word)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ConfigError(f'--{name}: "{word}" is not {wanted}. Write one, for example 1.') from None
    if name == "num_gpus" and number < 1:
        raise ConfigError(f"--num_gpus: {number} ranks cannot train. Write at least 1.")
    return number
