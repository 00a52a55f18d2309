"""Tokenizer and model: pretrained, or random weights of a preset size that needs no download."""

from __future__ import annotations

import difflib
import logging
from typing import Any

import torch
from arguments import DataArguments, ModelArguments
from errors import UserError
from huggingface_hub.errors import StrictDataclassError
from presets import PRESETS
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
)

logger = logging.getLogger("translation")

PRESET = "preset:"
LANGUAGE_NAMES = {"en": "English", "ro": "Romanian", "de": "German", "fr": "French"}
"""The languages of T5's translation tasks, by the code that the data uses."""


def load_tokenizer(model: ModelArguments, data: DataArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of --tokenizer_name, or of the model, set to the two languages if it has such a notion.

    Raises:
        UserError: it cannot be loaded, or a multilingual tokenizer does not know the language.
    """
    name = model.tokenizer_name or model.model_name_or_path
    if name is None:
        if str(model.config_name).startswith(PRESET):
            raise UserError(f"--config_name {model.config_name} has no tokenizer: pass --tokenizer_name.")
        name = str(model.config_name)
    tokenizer = _load(AutoTokenizer, name, "tokenizer", model, use_fast=model.use_fast_tokenizer)
    if hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "lang_code_to_id"):
        for flag, language in (("source_lang", data.source_lang), ("target_lang", data.target_lang)):
            if language not in tokenizer.lang_code_to_id:
                known = ", ".join(sorted(tokenizer.lang_code_to_id))
                raise UserError(f"--{flag} {language}: this tokenizer wants one of {known}.")
        tokenizer.src_lang, tokenizer.tgt_lang = data.source_lang, data.target_lang
    return tokenizer


def load_model(model: ModelArguments, data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Pretrained weights of --model_name_or_path, or random fp32 weights of --config_name.

    Raises:
        UserError: a name that cannot be loaded, overrides that do not exist, sizes that do not fit.
    """
    config = load_config(model)
    if model.model_name_or_path is not None:
        # fp32 whatever the file holds: half precision is the choice of --fp16 and --bf16, not of the checkpoint.
        network = _load(
            AutoModelForSeq2SeqLM, model.model_name_or_path, "model", model, config=config, dtype=torch.float32
        )
    else:
        network = AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=model.trust_remote_code)
        num_params = sum(param.numel() for param in network.parameters())
        logger.info("Random weights of %s: %.1f million parameters.", model.config_name, num_params / 1e6)
    _fit_vocabulary(network, tokenizer)
    _fit_positions(network, model, data)
    _set_first_tokens(network, data, tokenizer)
    return network


def load_config(model: ModelArguments) -> PreTrainedConfig:
    """The config of --config_name (a preset, a folder, a hub name) or of the model, with --config_overrides."""
    name = str(model.config_name or model.model_name_or_path)
    if name.startswith(PRESET):
        preset = name.removeprefix(PRESET)
        if preset not in PRESETS:
            raise UserError(f"--config_name {name}: no such preset. There are {', '.join(PRESETS)}.")
        config: PreTrainedConfig = T5Config(**PRESETS[preset])
    else:
        config = _load(AutoConfig, name, "config", model)
        if not config.is_encoder_decoder:
            raise UserError(f"{name} is a {config.model_type}, which has no encoder and decoder to translate with.")
    return config if model.config_overrides is None else _override(config, model.config_overrides)


def _override(config: PreTrainedConfig, overrides: str) -> PreTrainedConfig:
    values = config.to_dict()
    changed: dict[str, Any] = {}
    for item in overrides.split(","):
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals or not text:
            raise UserError(f"--config_overrides: '{item}' is not key=value. Example: 'd_model=64,num_layers=2'.")
        if key not in values:
            near = difflib.get_close_matches(key, values, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise UserError(f"--config_overrides: {config.model_type} has no '{key}'.{hint}")
        changed[key] = _typed(key, text, values[key])
    if "num_layers" in changed and values.get("num_decoder_layers") == values.get("num_layers"):
        # T5 stores both once built; who asks for 2 layers does not want 6 in the decoder.
        changed.setdefault("num_decoder_layers", changed["num_layers"])
    try:
        return type(config).from_dict({**values, **changed})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"--config_overrides {overrides}: {error}") from error


def _typed(key: str, text: str, current: Any) -> Any:
    """``text`` as the type that the config holds now; a key that holds None takes a number if it looks like one."""
    kind = "number" if current is None or isinstance(current, float) else type(current).__name__
    try:
        if isinstance(current, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(current, int):
            return int(text)
        if isinstance(current, float):
            return float(text)
        if current is None:
            return float(text) if "." in text else int(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"--config_overrides: {key}={text} is not of type {kind}.") from error
    if isinstance(current, str):
        return text
    raise UserError(f"--config_overrides: '{key}' is a {kind}; only numbers, booleans and text can be given here.")


def _load(auto_class: Any, name: str, what: str, model: ModelArguments, **kwargs: Any) -> Any:
    try:
        return auto_class.from_pretrained(
            name,
            cache_dir=model.cache_dir,
            revision=model.model_revision,
            token=model.token,
            trust_remote_code=model.trust_remote_code,
            **kwargs,
        )
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        lines = str(error).strip().splitlines()
        raise UserError(
            f"{what} '{name}' cannot be loaded: {lines[0] if lines else type(error).__name__}\n"
            "Without a network, name a local folder, or train random weights with --config_name preset:t5-small "
            "and a local --tokenizer_name."
        ) from error


def _fit_vocabulary(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    # Only ever grown: published T5 has 32128 rows for 32100 tokens, and shrinking would change its size.
    num_rows = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_rows:
        logger.warning("Embeddings grow from %d to %d rows for this tokenizer.", num_rows, len(tokenizer))
        network.resize_token_embeddings(len(tokenizer))


def _fit_positions(network: PreTrainedModel, model: ModelArguments, data: DataArguments) -> None:
    num_positions = getattr(network.config, "max_position_embeddings", None)
    if num_positions is None or num_positions >= data.max_source_length:
        return
    if not model.resize_position_embeddings:
        raise UserError(
            f"--max_source_length {data.max_source_length}: this model has {num_positions} positions. "
            f"Pass --max_source_length {num_positions}, or --resize_position_embeddings true."
        )
    try:
        network.resize_position_embeddings(data.max_source_length)
    except NotImplementedError as error:
        raise UserError(
            f"{network.config.model_type} cannot grow its position embeddings: "
            f"pass --max_source_length {num_positions} at most."
        ) from error


def _set_first_tokens(network: PreTrainedModel, data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    codes = getattr(tokenizer, "lang_code_to_id", None)
    if network.config.decoder_start_token_id is None and codes is not None:
        network.config.decoder_start_token_id = codes[data.target_lang]
    if network.config.decoder_start_token_id is None:
        raise UserError(
            "the model's config has no 'decoder_start_token_id', so the decoder has nothing to begin with. "
            "Set it in config.json (T5: 0)."
        )
    network.generation_config.decoder_start_token_id = network.config.decoder_start_token_id
    if data.forced_bos_token is not None:
        token_id = tokenizer.convert_tokens_to_ids(data.forced_bos_token)
        if token_id is None or token_id == tokenizer.unk_token_id:
            raise UserError(f"--forced_bos_token {data.forced_bos_token}: the tokenizer has no such token.")
        network.generation_config.forced_bos_token_id = token_id


def source_prefix(config: PreTrainedConfig, data: DataArguments) -> str:
    """What stands before every source: --source_prefix, or what T5 was trained with, or nothing."""
    if data.source_prefix is not None:
        return data.source_prefix
    if config.model_type != "t5":
        return ""
    names = [LANGUAGE_NAMES.get(str(language)) for language in (data.source_lang, data.target_lang)]
    if None in names:
        logger.warning(
            "T5 knows no task for %s -> %s, so no prefix is added; pass --source_prefix to choose one.",
            data.source_lang, data.target_lang,
        )  # fmt: skip
        return ""
    prefix = f"translate {names[0]} to {names[1]}: "
    logger.info("T5 expects a task prefix: adding '%s' (--source_prefix '' for none).", prefix)
    return prefix
