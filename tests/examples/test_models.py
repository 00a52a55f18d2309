"""Presets, overrides, prefixes: models of true size without a download."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from arguments import DataArguments, ModelArguments
from errors import UserError
from models import PRESETS, load_config, load_model, load_tokenizer, source_prefix
from transformers import AutoModelForSeq2SeqLM, BartConfig, T5Config

from tests.examples.conftest import TINY, Workspace

EN_RO = DataArguments(source_lang="en", target_lang="ro")

PUBLISHED_PARAMETERS = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
}


@pytest.mark.parametrize("preset", PUBLISHED_PARAMETERS)
def test_presets_have_the_published_number_of_parameters(preset: str) -> None:
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(load_config(ModelArguments(config_name=f"preset:{preset}")))
    assert sum(param.numel() for param in model.parameters()) == PUBLISHED_PARAMETERS[preset]


def test_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(UserError, match=", ".join(PRESETS)):
        load_config(ModelArguments(config_name="preset:t5-huge"))


def test_overrides_change_both_stacks() -> None:
    model = ModelArguments(config_name="preset:t5-small", config_overrides="d_model=64, num_layers=2,dropout_rate=0")
    config = load_config(model)
    assert (config.d_model, config.num_layers, config.num_decoder_layers) == (64, 2, 2)
    assert config.dropout_rate == 0.0
    only_encoder = ModelArguments(config_name="preset:t5-small", config_overrides="num_layers=2,num_decoder_layers=3")
    assert load_config(only_encoder).num_decoder_layers == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("d_modle=64", "Did you mean 'd_model'"),
        ("d_model", "'d_model' is not key=value"),
        ("d_model=big", "d_model=big is not of type int"),
        ("use_cache=maybe", "use_cache=maybe is not of type bool"),
        ("feed_forward_proj=a-b-c", "feed_forward_proj"),
    ],
)
def test_bad_overrides_are_named(overrides: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(ModelArguments(config_name="preset:t5-small", config_overrides=overrides))


def test_config_of_a_folder_is_read(tmp_path: Path) -> None:
    T5Config(d_model=32, num_layers=1, decoder_start_token_id=0).save_pretrained(tmp_path)
    config = load_config(ModelArguments(config_name=str(tmp_path), config_overrides="d_ff=48"))
    assert (config.d_model, config.d_ff) == (32, 48)


def test_hub_name_without_network_is_one_clear_error() -> None:
    with pytest.raises(UserError, match=r"config 'no-such/model' cannot be loaded(.|\n)*preset:t5-small"):
        load_config(ModelArguments(config_name="no-such/model"))


def test_preset_needs_a_tokenizer() -> None:
    with pytest.raises(UserError, match="--tokenizer_name"):
        load_tokenizer(ModelArguments(config_name="preset:t5-small"), EN_RO)


def test_embeddings_grow_to_the_tokenizer_but_never_shrink(workspace: Workspace) -> None:
    model = ModelArguments(
        config_name="preset:t5-demo", config_overrides=f"{TINY},vocab_size=7", tokenizer_name=str(workspace.tokenizer)
    )
    tokenizer = load_tokenizer(model, EN_RO)
    assert load_model(model, EN_RO, tokenizer).get_input_embeddings().weight.shape[0] == len(tokenizer)
    model.config_overrides = f"{TINY},vocab_size=5000"
    assert load_model(model, EN_RO, tokenizer).get_input_embeddings().weight.shape[0] == 5000


def test_pretrained_weights_are_loaded_in_fp32(workspace: Workspace, tmp_path: Path) -> None:
    random = ModelArguments(
        config_name="preset:t5-demo", config_overrides=TINY, tokenizer_name=str(workspace.tokenizer)
    )  # fmt: skip
    tokenizer = load_tokenizer(random, EN_RO)
    load_model(random, EN_RO, tokenizer).half().save_pretrained(tmp_path)
    loaded = load_model(ModelArguments(model_name_or_path=str(tmp_path)), EN_RO, tokenizer)
    assert {param.dtype for param in loaded.parameters()} == {torch.float32}


def test_t5_gets_its_prefix_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    t5 = T5Config(d_model=8)
    with caplog.at_level(logging.INFO, logger="translation"):
        assert source_prefix(t5, EN_RO) == "translate English to Romanian: "
    assert "translate English to Romanian: " in caplog.text
    assert source_prefix(t5, DataArguments(source_lang="en", target_lang="ro", source_prefix="")) == ""
    assert source_prefix(t5, DataArguments(source_lang="en", target_lang="xx")) == ""
    assert source_prefix(BartConfig(), EN_RO) == ""


def test_learned_positions_too_few_are_refused_before_training(workspace: Workspace, tmp_path: Path) -> None:
    BartConfig(
        vocab_size=2048, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
    ).save_pretrained(tmp_path)  # fmt: skip
    model = ModelArguments(config_name=str(tmp_path), tokenizer_name=str(workspace.tokenizer))
    tokenizer = load_tokenizer(model, EN_RO)
    with pytest.raises(UserError, match="this model has 64 positions"):
        load_model(model, EN_RO, tokenizer)
    short = DataArguments(source_lang="en", target_lang="ro", max_source_length=64)
    assert load_model(model, short, tokenizer).config.model_type == "bart"
