"""load_config: every form of source, and every mistake told with path, reason and remedy."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from hf_zero_plugin.config.load import load_config
from hf_zero_plugin.config.problems import ConfigProblems
from hf_zero_plugin.errors import ConfigError

VALID: dict[str, Any] = {"train_batch_size": "auto", "zero_optimization": {"stage": 2}}


def problems_of(config: dict[str, Any] | str) -> dict[str, tuple[str, str, str]]:
    with pytest.raises(ConfigProblems) as caught:
        load_config(config)
    return {problem.path: (problem.what, problem.why, problem.fix) for problem in caught.value.problems}


# ---------------------------------------------------------------- sources


def test_a_file_a_path_a_dict_inline_and_base64_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(VALID), encoding="utf-8")
    encoded = base64.urlsafe_b64encode(json.dumps(VALID).encode()).decode()
    for source in (path, str(path), VALID, json.dumps(VALID), f"\n {json.dumps(VALID)}", encoded):
        assert load_config(source).config == VALID


def test_the_dict_of_the_caller_is_not_changed() -> None:
    mine = {"bfloat16": {"enabled": True}, "zero_optimization": {"offload_param": None, "cpu_offload": True}}
    before = json.dumps(mine)
    loaded = load_config(mine)
    assert json.dumps(mine) == before
    assert loaded.raw == mine


def test_a_missing_file_is_named_with_its_nearest_neighbour(tmp_path: Path) -> None:
    (tmp_path / "zero2.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"does not exist.*Did you mean .*zero2\.json\?"):
        load_config(tmp_path / "zero_2.json")
    with pytest.raises(ConfigError, match="There is no directory"):
        load_config("no/such/place.json")


def test_a_directory_is_told_apart_from_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(str(tmp_path))


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.json"
    path.write_bytes(b'{\n "a": "\xe9"}')
    with pytest.raises(ConfigError, match=r"latin\.json:2: .*not UTF-8"):
        load_config(path)


def test_a_list_is_not_a_configuration() -> None:
    assert "not an object" in problems_of("[1]")["$"][0]


def test_syntax_errors_carry_file_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{\n  "fp16": {"enabled": true,}\n}')
    with pytest.raises(ConfigError, match=r"broken\.json:2:27: \$: not JSON: .*comma"):
        load_config(path)


# ---------------------------------------------------------------- all mistakes, in file order


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "many.json"
    path.write_text(
        """{
  "wall_clock_breakdown": 1,
  "zero_optimization": {
    "stage": 5,
    "stge": 2
  },
  "gradient_cliping": 1.0,
  "sparse_gradients": true,
  "fp16": {"enabled": true, "enabled": false},
  "optimizer": {"type": "AdamV"}
}"""
    )
    with pytest.raises(ConfigProblems) as caught:
        load_config(path)
    assert [problem.path for problem in caught.value.problems] == [
        "$.wall_clock_breakdown",
        "$.zero_optimization.stage",
        "$.zero_optimization.stge",
        "$.gradient_cliping",
        "$.sparse_gradients",
        "$.fp16.enabled",
        "$.optimizer.type",
    ]
    text = str(caught.value)
    assert text.startswith("7 problems in the configuration:")
    assert f"{path}:5:5: $.zero_optimization.stge" in text
    assert text.count("Fix: ") == 7


# ---------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("config", "path", "fix"),
    [
        ({"gradient_cliping": 1.0}, "$.gradient_cliping", 'Did you mean "gradient_clipping"?'),
        ({"Gradient_Clipping": 1.0}, "$.Gradient_Clipping", 'Did you mean "gradient_clipping"?'),
        ({"aio": {"blok_size": 1}}, "$.aio.blok_size", 'Did you mean "block_size"?'),
        ({"checkpoint": {"tag_valid": "Warn"}}, "$.checkpoint.tag_valid", 'Did you mean "tag_validation"?'),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "$.data_types.grad_acum_dtype", '"grad_accum_dtype"?'),
        ({"flops_profiler": {"enable": False}}, "$.flops_profiler.enable", 'Did you mean "enabled"?'),
        (
            {"activation_checkpointing": {"cpu_checkpoint": True}},
            "$.activation_checkpointing.cpu_checkpoint",
            'Did you mean "cpu_checkpointing"?',
        ),
        ({"stage": 2}, "$.stage", "This key belongs in $.zero_optimization."),
        ({"offload_optimizer": {}}, "$.offload_optimizer", "This key belongs in $.zero_optimization."),
        ({"lr": 1e-3}, "$.lr", "This key belongs in $.optimizer.params."),
        ({"loss_scale": 0}, "$.loss_scale", "This key belongs in $.fp16."),
        ({"fp16": {"gradient_clipping": 1.0}}, "$.fp16.gradient_clipping", "This key belongs in $."),
        ({"_comment": "x"}, "$._comment", "Remove it."),
        ({"optimizer": {"typ": "Adam"}}, "$.optimizer.typ", 'Did you mean "type"?'),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 9}}},
            "$.scheduler.params.total_num_steps",
            "Only WarmupDecayLR, WarmupCosineLR would take it.",
        ),
        (
            {"optimizer": {"type": "adamw", "params": {"weight_decy": 0.1}}},
            "$.optimizer.params.weight_decy",
            'Did you mean "weight_decay"?',
        ),
        ({"optimizer": {"type": "SGD", "params": {"betas": [0, 0]}}}, "$.optimizer.params.betas", "Only Adam, AdamW"),
    ],
)
def test_unknown_keys_are_refused_with_the_key_that_was_meant(config: dict[str, Any], path: str, fix: str) -> None:
    what, why, told = problems_of(config)[path]
    assert path.rpartition(".")[2] in what
    assert "ignored silently" in why
    assert fix in told


def test_a_section_that_needs_its_type_says_so() -> None:
    what, _, fix = problems_of({"optimizer": {"params": {}}})["$.optimizer.type"]
    assert "missing" in what
    assert 'Add "type"' in fix


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("config", "path", "what", "fix"),
    [
        ({"gradient_clipping": "0.5"}, "$.gradient_clipping", "text in quotes", "Write 0.5 without quotes."),
        ({"gradient_clipping": True}, "$.gradient_clipping", "true or false", "Write a number."),
        ({"gradient_clipping": None, "fp16": {"loss_scale": None}}, "$.fp16.loss_scale", "null", "Remove the key"),
        ({"train_batch_size": 1.5}, "$.train_batch_size", "1.5", "Write a whole number."),
        ({"train_batch_size": True}, "$.train_batch_size", "true", "Write a whole number."),
        ({"train_batch_size": "8"}, "$.train_batch_size", '"8"', "Write 8 without quotes."),
        ({"fp16": {"enabled": "true"}}, "$.fp16.enabled", '"true"', "Write true without quotes."),
        ({"fp16": {"enabled": 1}}, "$.fp16.enabled", "1 is a number", "Write true."),
        ({"fp16": True}, "$.fp16", "true", 'Write {"enabled": true}.'),
        ({"fp16": []}, "$.fp16", "a list", "Write an object in braces."),
        ({"zero_optimization": True}, "$.zero_optimization", "true", 'write {"stage": 1}'),
        ({"optimizer": {"type": "Adam", "params": {"betas": 0.9}}}, "$.optimizer.params.betas", "0.9", "a list"),
        ({"optimizer": {"type": "Adam", "params": {"lr": "1e-3"}}}, "$.optimizer.params.lr", "text", "without quotes"),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}}, "$.optimizer.params.betas", "1 item,", "2 items"),
        ({"steps_per_print": 0}, "$.steps_per_print", "out of range", "at least 1"),
        ({"zero_optimization": {"stage": 4}}, "$.zero_optimization.stage", "out of range", "at most 3"),
        ({"zero_optimization": {"stage": -1}}, "$.zero_optimization.stage", "out of range", "at least 0"),
        (
            {"zero_optimization": {"offload_optimizer": {"ratio": 1.5}}},
            "$.zero_optimization.offload_optimizer.ratio",
            "out of range",
            "at most 1",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
            "$.zero_optimization.offload_optimizer.device",
            "not a choice",
            'Did you mean "none"?',
        ),
        (
            {"zero_optimization": {"offload_optimizer": "cpu"}},
            "$.zero_optimization.offload_optimizer",
            "text in quotes",
            'Write {"device": "cpu"}.',
        ),
        ({"gradient_allreduce_op": "avg"}, "$.gradient_allreduce_op", "not a choice", '"mean"'),
        ({"data_types": {"grad_accum_dtype": "flot32"}}, "$.data_types.grad_accum_dtype", "not a choice", "fp32"),
        ({"wall_clock_breakdown": "auto"}, "$.wall_clock_breakdown", '"auto" cannot stand here', "remove the key"),
        (
            {"zero_optimization": {"stage3_max_live_parameters": "auto"}},
            "$.zero_optimization.stage3_max_live_parameters",
            '"auto" cannot stand here',
            "remove the key",
        ),
        ({"optimizer": {"type": "AdmaW"}}, "$.optimizer.type", "not the name of any optimizer", '"AdamW"?'),
        ({"optimizer": {"type": "OneBitAdam"}}, "$.optimizer.type", "does not have", "Use AdamW."),
        ({"scheduler": {"type": "WarmupLr2"}}, "$.scheduler.type", "not the name of any", '"WarmupLR"?'),
        ({"scheduler": {"type": "LambdaLR"}}, "$.scheduler.type", "is a scheduler that", "in your code"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [0.1, "x"]}}},
            "$.scheduler.params.warmup_max_lr[1]",
            "text in quotes",
            "Write a number.",
        ),
    ],
)
def test_wrong_values_are_refused_with_a_remedy(config: dict[str, Any], path: str, what: str, fix: str) -> None:
    told_what, _, told_fix = problems_of(config)[path]
    assert what in told_what
    assert fix in told_fix


def test_large_integers_may_be_written_as_floats_and_integers_as_floats_stay_numbers() -> None:
    load_config({"zero_optimization": {"reduce_bucket_size": 2e8, "stage": 2.0}, "gradient_clipping": 1})


@pytest.mark.parametrize("spelling", ["Warn", "WARN", "ignore", "Fail"])
def test_tag_validation_is_read_without_regard_to_case(spelling: str) -> None:
    load_config({"checkpoint": {"tag_validation": spelling}})


@pytest.mark.parametrize("spelling", ["fp16", "half", "torch.float16", "bfloat16", "fp32", "float", "torch.float32"])
def test_data_types_have_the_spellings_of_deepspeed(spelling: str) -> None:
    load_config({"communication_data_type": spelling})


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"amp": {"enabled": True}}, "$.amp.enabled"),
        ({"sparse_gradients": True}, "$.sparse_gradients"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "$.fp16.fp16_master_weights_and_grads"),
        ({"optimizer": {"type": "Adam", "params": {"amsgrad": True}}}, "$.optimizer.params.amsgrad"),
        ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}}, "$.optimizer.params.max_grad_norm"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "$.zero_optimization.zenflow"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "$.zero_optimization.zero_hpz_partition_size"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "$.zero_optimization.zero_quantized_weights"),
        ({"zero_optimization": {"mics_shard_size": 4}}, "$.zero_optimization.mics_shard_size"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}},
            "$.zero_optimization.offload_param.device",
        ),
        ({"aio": {"use_gds": True}}, "$.aio.use_gds"),
        ({"comms_logger": {"enabled": True}}, "$.comms_logger.enabled"),
        ({"tensorboard": {"enabled": True}}, "$.tensorboard.enabled"),
        ({"wandb": {"enabled": True}}, "$.wandb.enabled"),
        ({"csv_monitor": {"enabled": True}}, "$.csv_monitor.enabled"),
        ({"comet": {"enabled": True}}, "$.comet.enabled"),
        ({"tensor_parallel": {"autotp_size": 2}}, "$.tensor_parallel.autotp_size"),
        ({"sequence_parallel_size": 2}, "$.sequence_parallel_size"),
        ({"pipeline": {"stages": 2}}, "$.pipeline"),
        ({"compile": {"deepcompile": True}}, "$.compile.deepcompile"),
        ({"sparse_attention": {"mode": "fixed"}}, "$.sparse_attention"),
        ({"weight_quantization": {"quantized_initialization": {"num_bits": 4}}}, "$.weight_quantization"),
        ({"elasticity": {"enabled": True}}, "$.elasticity.enabled"),
        ({"autotuning": {"enabled": True}}, "$.autotuning"),
        ({"eigenvalue": {"enabled": True}}, "$.eigenvalue"),
        ({"curriculum_learning": {"enabled": True}}, "$.curriculum_learning"),
        ({"data_efficiency": {"enabled": True}}, "$.data_efficiency"),
        ({"hybrid_engine": {"enabled": True}}, "$.hybrid_engine.enabled"),
        ({"nebula": {"enabled": True}}, "$.nebula.enabled"),
        ({"datastates_ckpt": {"host_cache_size": 16}}, "$.datastates_ckpt"),
        ({"graph_harvesting": True}, "$.graph_harvesting"),
        ({"progressive_layer_drop": {"enabled": True}}, "$.progressive_layer_drop.enabled"),
        ({"msamp": {"enabled": True, "opt_level": "O1"}}, "$.msamp.enabled"),
        (
            {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}},
            "$.compression_training",
        ),
    ],
)
def test_features_that_we_do_not_have_are_refused_when_asked_for(config: dict[str, Any], path: str) -> None:
    what, why, fix = problems_of(config)[path]
    assert "does not have" in what
    assert why.endswith(".")
    assert fix.endswith(".")
    load_config(config, allow_refused=True)


@pytest.mark.parametrize(
    "config",
    [
        {"amp": {"enabled": False, "opt_level": "O2", "keep_batchnorm_fp32": True}},
        {"flops_profiler": {"enabled": False, "profile_step": 3}},
        {"eigenvalue": {"enabled": False, "verbose": True}},
        {"autotuning": {"enabled": False, "metric": "throughput"}},
        {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}}},
        {"tensor_parallel": {"autotp_size": 1}},
        {"tensor_parallel": {"autotp_size": 0, "tp_overlap_comm": True}},
        {"sparse_attention": None},
        {"pipeline": {}},
        {"datastates_ckpt": False},
        {"zero_optimization": {"zero_hpz_partition_size": 1, "mics_shard_size": -1, "zenflow": None}},
        {"wandb": {"enabled": False, "project": "x"}},
    ],
)
def test_features_that_we_do_not_have_are_accepted_when_switched_off(config: dict[str, Any]) -> None:
    load_config(config)


# ---------------------------------------------------------------- old spellings


def test_old_spellings_are_read_as_todays_with_a_warning() -> None:
    loaded = load_config(
        {
            "bfloat16": {"enabled": True},
            "zero_optimization": {
                "stage": 3,
                "cpu_offload": True,
                "cpu_offload_param": True,
                "cpu_offload_use_pin_memory": False,
                "stage3_gather_fp16_weights_on_model_save": True,
                "prefetch_bucket_size": 5,
            },
        }
    )
    zero = loaded.config["zero_optimization"]
    assert loaded.config["bf16"] == {"enabled": True}
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert zero["stage3_prefetch_bucket_size"] == 5
    assert len(loaded.warnings) == 6


def test_mistakes_inside_an_old_section_point_at_the_old_place() -> None:
    with pytest.raises(ConfigError, match=r"inline JSON:2:15: \$\.bf16\.enabled"):
        load_config('{\n "bfloat16": {"enabled": 3}}')


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"bfloat16": {}, "bf16": {}}, "$.bfloat16"),
        (
            {"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "none"}}},
            "$.zero_optimization.cpu_offload",
        ),
    ],
)
def test_old_and_new_key_side_by_side_are_refused(config: dict[str, Any], path: str) -> None:
    what, _, fix = problems_of(config)[path]
    assert "stands beside" in what
    assert fix.startswith("Keep $.")


def test_an_old_switch_that_is_no_switch_is_refused() -> None:
    assert (
        "true or false"
        in problems_of({"zero_optimization": {"cpu_offload": "yes"}})["$.zero_optimization.cpu_offload"][0]
    )


def test_null_sections_are_absent_sections() -> None:
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": None, "offload_param": None}, "fp16": None}
    assert load_config(config).config == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    "text", ["", "[1]", "3", '{"a": tru}', '{"fp16": true}', '{"optimizer": {"params": {"betas": [1]}}}']
)
def test_every_refusal_tells_place_what_why_and_fix(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(text)
    with pytest.raises(ConfigProblems) as caught:
        load_config(path)
    for problem in caught.value.problems:
        assert problem.path.startswith("$")
        assert problem.position is not None
        assert problem.what
        assert problem.why
        assert problem.fix
