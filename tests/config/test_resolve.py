"""resolve: "auto" and absent keys become values with an origin, and what has to agree is checked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hf_zero_plugin.config.auto import (
    Entry,
    ModelFacts,
    ResolvedConfig,
    TrainingFacts,
    dict_for_trainer,
    resolve,
    resolve_dict,
)
from hf_zero_plugin.config.load import load_config
from hf_zero_plugin.config.problems import ConfigProblems
from hf_zero_plugin.config.settings import EngineSettings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
Z = "$.zero_optimization"


def resolved(
    config: dict[str, Any], args: TrainingFacts | None = None, model: ModelFacts | None = None
) -> ResolvedConfig:
    return resolve(load_config(config), args if args is not None else TrainingFacts(), model)


def entry_of(result: ResolvedConfig, path: str) -> Entry:
    return next(entry for entry in result.entries if entry.path == path)


def problems_of(config: dict[str, Any], args: TrainingFacts | None = None) -> dict[str, tuple[str, str, str]]:
    with pytest.raises(ConfigProblems) as caught:
        resolved(config, args)
    return {problem.path: (problem.what, problem.why, problem.fix) for problem in caught.value.problems}


# ---------------------------------------------------------------- the article's configuration


def test_the_article_configuration_resolves_to_what_its_command_asks_for() -> None:
    args = TrainingFacts(per_device_train_batch_size=16, fp16=True, learning_rate=3e-5, world_size=2)
    result = resolve(load_config(CONFIGS / "zero2_offload.json"), args, ModelFacts(hidden_size=512))
    settings = result.settings
    assert (settings.stage, settings.precision, settings.offload_optimizer.device) == (2, "fp16", "cpu")
    assert settings.loss_scale is not None
    assert (settings.loss_scale.static_scale, settings.loss_scale.window) == (0.0, 1000)
    assert (settings.train_batch_size, settings.train_micro_batch_size_per_gpu) == (32, 16)
    assert (settings.reduce_bucket_size, settings.allgather_bucket_size) == (200_000_000, 200_000_000)
    assert settings.optimizer is not None
    assert settings.optimizer.params == {"lr": 3e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert settings.scheduler is not None
    assert settings.scheduler.params == {"warmup_min_lr": 0.0, "warmup_max_lr": 3e-5, "warmup_num_steps": 0}
    assert settings.steps_per_print == 2000
    assert "auto" not in json.dumps(result.as_ds_dict())
    assert not result.warnings
    assert all(entry.verdict != "refused" for entry in result.entries)


def test_settings_hold_numbers_of_the_declared_type() -> None:
    settings = resolve(load_config(CONFIGS / "zero3_offload.json"), TrainingFacts()).settings
    for field in dataclasses.fields(EngineSettings):
        value = getattr(settings, field.name)
        if field.type == "int":
            assert type(value) is int, field.name
        if field.type == "float":
            assert isinstance(value, (int, float)), field.name


# ---------------------------------------------------------------- where values come from


@pytest.mark.parametrize(
    ("path", "args", "value", "source"),
    [
        ("$.gradient_clipping", TrainingFacts(max_grad_norm=0.3), 0.3, "TrainingArguments.max_grad_norm"),
        (
            "$.gradient_accumulation_steps",
            TrainingFacts(gradient_accumulation_steps=4),
            4,
            "TrainingArguments.gradient_accumulation_steps",
        ),
        ("$.fp16.enabled", TrainingFacts(fp16=True), True, "TrainingArguments.fp16"),
        ("$.fp16.enabled", TrainingFacts(fp16_full_eval=True), True, "TrainingArguments.fp16_full_eval"),
        ("$.bf16.enabled", TrainingFacts(bf16=True), True, "TrainingArguments.bf16"),
        ("$.train_batch_size", TrainingFacts(world_size=4), 32, "derived"),
        ("$.optimizer.params.lr", TrainingFacts(learning_rate=1.0), 1.0, "TrainingArguments.learning_rate"),
        ("$.optimizer.params.eps", TrainingFacts(adam_epsilon=1e-6), 1e-6, "TrainingArguments.adam_epsilon"),
        ("$.scheduler.params.warmup_num_steps", TrainingFacts(warmup_steps=7), 7, "TrainingArguments.warmup_steps"),
        ("$.scheduler.params.total_num_steps", TrainingFacts(max_steps=70), 70, "TrainingArguments.max_steps"),
        ("$.scheduler.params.total_num_steps", TrainingFacts(num_training_steps=90), 90, "derived"),
        (
            "$.scheduler.params.warmup_num_steps",
            TrainingFacts(warmup_steps=0.25, max_steps=10),
            3,
            "TrainingArguments.warmup_steps",
        ),
        (
            "$.checkpoint.use_node_local_storage",
            TrainingFacts(save_on_each_node=True),
            True,
            "TrainingArguments.save_on_each_node",
        ),
    ],
)
@pytest.mark.parametrize("written", ["absent", "auto"])
def test_absent_and_auto_both_take_the_training_argument(
    path: str, args: TrainingFacts, value: Any, source: str, written: str
) -> None:
    config: dict[str, Any] = {
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {}},
        "scheduler": {"type": "WarmupDecayLR", "params": {}},
    }
    if written == "auto":
        if path.startswith("$.checkpoint"):
            return  # the Trainer sets this key; "auto" is not allowed
        node = config
        *sections, name = path.split(".")[1:]
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = "auto"
    entry = entry_of(resolved(config, args), path)
    assert (entry.value, entry.source, entry.in_file) == (value, source, written == "auto")
    assert entry.was_auto is (written == "auto")


def test_without_training_arguments_absent_keys_take_the_defaults_of_deepspeed() -> None:
    settings = resolve_dict({"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam"}})
    assert settings.gradient_clipping == 1.0
    assert settings.gradient_accumulation_steps == 1
    assert settings.precision == "fp32"
    assert settings.optimizer is not None
    assert settings.optimizer.params == {}


def test_sizes_follow_the_hidden_size_of_the_model() -> None:
    config = {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        }
    }
    result = resolved(config, model=ModelFacts(hidden_size=100))
    assert result.settings.reduce_bucket_size == 10_000
    assert result.settings.stage3.prefetch_bucket_size == 9_000
    assert result.settings.stage3.param_persistence_threshold == 1_000
    assert entry_of(result, f"{Z}.reduce_bucket_size").source == "model"


@pytest.mark.parametrize("model", [None, ModelFacts()])
def test_a_model_without_hidden_size_gets_the_defaults_and_a_remark(model: ModelFacts | None) -> None:
    result = resolved({"zero_optimization": {"reduce_bucket_size": "auto"}}, model=model)
    assert result.settings.reduce_bucket_size == 500_000_000
    entry = entry_of(result, f"{Z}.reduce_bucket_size")
    assert entry.source == "default"
    assert "hidden size squared" in entry.note


def test_an_unknown_number_of_steps_is_left_open_and_said_so() -> None:
    config = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}}}
    result = resolved(config, TrainingFacts(warmup_steps=0.1))
    assert result.settings.scheduler is not None
    assert result.settings.scheduler.params == {"warmup_max_lr": 5e-5}
    assert "not known before" in entry_of(result, "$.scheduler.params.total_num_steps").note
    assert "auto" not in json.dumps(result.as_ds_dict())


def test_only_the_adam_family_inherits_betas_and_eps() -> None:
    for name, inherited in (("Lion", {"lr", "weight_decay"}), ("SGD", {"lr", "weight_decay"}), ("Rprop", {"lr"})):
        settings = resolved({"optimizer": {"type": name}}).settings
        assert settings.optimizer is not None
        assert set(settings.optimizer.params) == inherited


def test_keys_without_effect_are_not_passed_to_the_optimizer() -> None:
    params = {"lr": 5e-5, "fused": True, "max_grad_norm": 0.0, "maximize": False, "momentum": 0.9}
    settings = resolved({"optimizer": {"type": "SGD", "params": params}}).settings
    assert settings.optimizer is not None
    assert settings.optimizer.params == {"lr": 5e-5, "weight_decay": 0.0, "momentum": 0.9}


# ---------------------------------------------------------------- what accelerate decides silently


def test_auto_stage_device_and_gathering_are_decided_openly() -> None:
    config = {
        "zero_optimization": {
            "stage": "auto",
            "offload_optimizer": {"device": "auto", "nvme_path": "auto"},
            "offload_param": {"device": "auto"},
            "stage3_gather_16bit_weights_on_model_save": "auto",
        }
    }
    result = resolved(config)
    assert result.settings.stage == 2
    assert result.settings.offload_optimizer.device == "none"
    assert entry_of(result, f"{Z}.stage").was_auto
    assert "offloads nothing" in entry_of(result, f"{Z}.offload_optimizer.device").note


@pytest.mark.parametrize(("stage", "gathers"), [(2, False), (3, True)])
def test_auto_gathering_is_on_exactly_at_stage_3(stage: int, gathers: bool) -> None:
    result = resolved({"zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": "auto"}})
    assert result.settings.stage3.gather_16bit_weights_on_model_save is gathers


def test_a_missing_section_or_stage_is_stage_0_and_said_so() -> None:
    for config in ({}, {"zero_optimization": {}}):
        result = resolved(config)
        assert result.settings.stage == 0
        assert result.as_ds_dict()["zero_optimization"]["stage"] == 0
        assert any("stage 0" in warning for warning in result.warnings)


def test_an_offloaded_optimizer_of_the_trainer_is_not_swapped() -> None:
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    result = resolved(config, TrainingFacts(optim="adafactor"))
    assert result.as_ds_dict()["zero_force_ds_cpu_optimizer"] is False
    assert entry_of(result, "$.optimizer").value == "adafactor"


def test_our_own_autos_reach_the_engine_and_not_accelerate() -> None:
    offload = {"device": "cpu", "ratio": "auto", "step_on": "auto", "gpu_memory_budget": 1.5}
    result = resolved({"zero_optimization": {"stage": 2, "offload_optimizer": offload}})
    settings = result.settings.offload_optimizer
    assert (settings.ratio, settings.step_on, settings.gpu_memory_budget_bytes) == ("auto", "auto", 3 * 2**29)
    assert "auto" not in json.dumps(result.as_ds_dict())


def test_the_dict_for_the_trainer_leaves_nothing_for_accelerate_to_guess() -> None:
    config = {
        "zero_optimization": {
            "offload_optimizer": {"device": "auto", "ratio": "auto"},
            "reduce_bucket_size": "auto",
        },
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}},
    }
    given = dict_for_trainer(load_config(config))
    for key in ("gradient_clipping", "gradient_accumulation_steps", "train_batch_size"):
        assert given[key] == "auto"
    assert given["fp16"] == {"enabled": "auto"}
    assert given["bf16"] == {"enabled": "auto"}
    assert given["zero_optimization"] == {
        "stage": 0,
        "offload_optimizer": {"device": "none"},
        "reduce_bucket_size": "auto",
    }
    assert given["optimizer"]["params"] == dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    assert given["scheduler"]["params"]["warmup_num_steps"] == "auto"
    assert given["zero_force_ds_cpu_optimizer"] is False


def test_a_dict_that_accelerate_has_written_resolves() -> None:
    """No fp16 section and --fp16, no configuration file: every key here is accelerate's own."""
    settings = resolve_dict(
        {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "none", "nvme_path": None},
                "offload_param": {"device": "none", "nvme_path": None},
                "stage3_gather_16bit_weights_on_model_save": False,
            },
            "gradient_clipping": 1.0,
            "steps_per_print": float("inf"),
            "fp16": {"enabled": True, "auto_cast": True},
            "bf16": {"enabled": False},
            "zero_allow_untested_optimizer": True,
            "communication_data_type": "fp32",
        }
    )
    assert (settings.precision, settings.steps_per_print, settings.communication_dtype) == ("fp16", None, "fp32")
    assert settings.cast_inputs


def test_a_dict_with_autos_left_names_every_one_of_them() -> None:
    with pytest.raises(ConfigProblems) as caught:
        resolve_dict({"train_batch_size": "auto", "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}})
    assert [problem.path for problem in caught.value.problems] == ["$.train_batch_size", f"{Z}.reduce_bucket_size"]
    assert "there is no Trainer" in str(caught.value)


# ---------------------------------------------------------------- checks


def test_fp16_with_bf16_is_refused_naming_both_origins() -> None:
    what, _, fix = problems_of({"bf16": {"enabled": "auto"}}, TrainingFacts(fp16=True, bf16=True))["$.bf16.enabled"]
    assert "TrainingArguments.fp16" in what
    assert "TrainingArguments.bf16" in what
    assert "--fp16" in fix


@pytest.mark.parametrize(
    ("config", "args", "path", "told"),
    [
        ({"gradient_clipping": 0.5}, TrainingFacts(), "$.gradient_clipping", "--max_grad_norm"),
        (
            {"gradient_accumulation_steps": 2},
            TrainingFacts(),
            "$.gradient_accumulation_steps",
            "--gradient_accumulation_steps",
        ),
        ({"train_batch_size": 9}, TrainingFacts(), "$.train_batch_size", "8 per device x 1 accumulated x 1 ranks"),
        ({"fp16": {"enabled": True}}, TrainingFacts(), "$.fp16.enabled", "--fp16"),
        ({"fp16": {"enabled": False}}, TrainingFacts(fp16=True), "$.fp16.enabled", "--fp16"),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}},
            TrainingFacts(),
            "$.optimizer.params.lr",
            "--learning_rate",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.95]}}},
            TrainingFacts(),
            "$.optimizer.params.betas",
            "--adam_beta1 and --adam_beta2",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}},
            TrainingFacts(),
            "$.scheduler.params.warmup_num_steps",
            "--warmup_steps",
        ),
    ],
)
def test_a_value_that_differs_from_its_training_argument_is_refused(
    config: dict[str, Any], args: TrainingFacts, path: str, told: str
) -> None:
    what, why, fix = problems_of(config, args)[path]
    assert told in what
    assert "the engine the file" in why
    assert '"auto"' in fix


def test_all_differences_are_listed_together() -> None:
    config = {"gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": 3, "fp16": {"enabled": True}}
    assert len(problems_of(config)) == 3


def test_an_argument_that_was_not_given_is_a_warning_and_no_error() -> None:
    result = resolved({"gradient_clipping": 0.5}, TrainingFacts(given=frozenset({"fp16"})))
    assert any("$.gradient_clipping" in warning and "--max_grad_norm" in warning for warning in result.warnings)
    assert result.settings.gradient_clipping == 0.5


@pytest.mark.parametrize(("written", "steps"), [(0, 0), (1, 0), (0, 1)])
def test_no_warm_up_is_the_same_as_one_step_of_it(written: int, steps: int) -> None:
    config = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": written}}}
    result = resolved(config, TrainingFacts(warmup_steps=steps))
    assert result.settings.scheduler is not None
    assert result.settings.scheduler.params["warmup_num_steps"] == written


def test_a_file_without_total_steps_needs_no_agreement() -> None:
    config = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 100}}}
    assert resolved(config).settings.scheduler is not None
    assert "$.scheduler.params.total_num_steps" in problems_of(config, TrainingFacts(max_steps=50))


def test_auto_find_batch_size_may_differ_from_the_file() -> None:
    resolved({"train_micro_batch_size_per_gpu": 3}, TrainingFacts(auto_find_batch_size=True))


def test_batch_sizes_that_do_not_multiply_out_are_one_problem() -> None:
    config = {"train_batch_size": 20, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1}
    problems = problems_of(config, TrainingFacts(world_size=2))
    assert list(problems) == ["$.train_batch_size"]
    assert "8 x gradient_accumulation_steps 1 x 2 ranks" in problems["$.train_batch_size"][0]


@pytest.mark.parametrize(
    ("config", "world_size", "expected"),
    [
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}, 2, (32, 4, 4)),
        ({"train_batch_size": 32, "gradient_accumulation_steps": 4}, 2, (32, 4, 4)),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}, 2, (16, 4, 2)),
        ({"train_micro_batch_size_per_gpu": 4}, 2, (8, 4, 1)),
        ({"train_batch_size": 32}, 2, (32, 16, 1)),
        ({"train_batch_size": 32}, None, (32, None, 1)),
        ({}, 2, (None, None, 1)),
    ],
)
def test_absent_batch_sizes_are_derived(
    config: dict[str, int], world_size: int | None, expected: tuple[int | None, ...]
) -> None:
    settings = resolve_dict(config, world_size=world_size)
    micro = settings.train_micro_batch_size_per_gpu
    assert (settings.train_batch_size, micro, settings.gradient_accumulation_steps) == expected


@pytest.mark.parametrize(
    ("config", "world_size", "path"),
    [
        ({"train_batch_size": 33, "gradient_accumulation_steps": 4}, 2, "$.train_batch_size"),
        ({"train_batch_size": 2, "train_micro_batch_size_per_gpu": 4}, 1, "$.train_batch_size"),
        (
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4},
            None,
            "$.gradient_accumulation_steps",
        ),
    ],
)
def test_batch_sizes_that_cannot_be_derived_are_refused(
    config: dict[str, int], world_size: int | None, path: str
) -> None:
    with pytest.raises(ConfigProblems) as caught:
        resolve_dict(config, world_size=world_size)
    assert [problem.path for problem in caught.value.problems] == [path]


@pytest.mark.parametrize(
    ("config", "path", "told"),
    [
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            f"{Z}.offload_param.device",
            "needs stage 3, but the stage is 2",
        ),
        (
            {"zero_optimization": {"stage": 3}, "gradient_allreduce_op": "sum"},
            "$.gradient_allreduce_op",
            "stage 3",
        ),
        (
            {"fp16": {"initial_scale_power": 2, "min_loss_scale": 8}},
            "$.fp16.initial_scale_power",
            "start at 2^2, below min_loss_scale 8",
        ),
        (
            {"torch_autocast": {"enabled": True}, "bf16": {"enabled": True}},
            "$.torch_autocast.enabled",
            "both on",
        ),
    ],
)
def test_keys_that_exclude_each_other_are_refused(config: dict[str, Any], path: str, told: str) -> None:
    what, why, fix = problems_of(config, TrainingFacts(bf16="bf16" in config))[path]
    assert told in what
    assert why
    assert fix


def test_a_schedule_that_ends_needs_its_end_without_a_trainer() -> None:
    with pytest.raises(ConfigProblems, match="has to know where it ends"):
        resolve_dict({"scheduler": {"type": "WarmupDecayLR", "params": {}}})


def test_a_bad_training_argument_is_told_as_such() -> None:
    what, why, _ = problems_of({}, TrainingFacts(per_device_train_batch_size=0))["$.train_micro_batch_size_per_gpu"]
    assert "out of range" in what
    assert "--per_device_train_batch_size" in why


def test_arguments_that_the_file_overrules_are_warned_of() -> None:
    config = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
    warnings = resolved(config, TrainingFacts(optim="adafactor", lr_scheduler_type="cosine")).warnings
    assert any("--optim adafactor has no effect" in warning for warning in warnings)
    assert any("--lr_scheduler_type cosine has no effect" in warning for warning in warnings)
    agreeing = TrainingFacts(lr_scheduler_type="constant_with_warmup")
    assert not [warning for warning in resolved(config, agreeing).warnings if "no effect" in warning]


# ---------------------------------------------------------------- autocast and verdicts


def test_autocast_keeps_the_weights_in_fp32_whatever_the_flags() -> None:
    settings = resolved({"torch_autocast": {"enabled": True}}, TrainingFacts(bf16=True)).settings
    assert (settings.precision, settings.autocast, settings.loss_scale) == ("fp32", "bf16", None)
    settings = resolved({"torch_autocast": {"enabled": True}}, TrainingFacts(fp16=True)).settings
    assert (settings.precision, settings.autocast) == ("fp32", "fp16")
    assert settings.loss_scale is not None


@pytest.mark.parametrize(
    ("config", "path", "verdict"),
    [
        ({"fp16": {"loss_scale": 4}}, "$.fp16.loss_scale", "inert"),
        ({"zero_optimization": {"stage3_max_live_parameters": 5}}, f"{Z}.stage3_max_live_parameters", "inert"),
        (
            {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 5}},
            f"{Z}.stage3_max_live_parameters",
            "applied",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"pin_memory": False}}},
            f"{Z}.offload_optimizer.pin_memory",
            "inert",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            f"{Z}.offload_optimizer.device",
            "applied",
        ),
        ({"wandb": {"enabled": False}}, "$.wandb.enabled", "inert"),
        ({"zero_optimization": {"contiguous_gradients": True}}, f"{Z}.contiguous_gradients", "inert"),
    ],
)
def test_verdicts_are_of_this_configuration(config: dict[str, Any], path: str, verdict: str) -> None:
    entry = entry_of(resolved(config), path)
    assert entry.verdict == verdict
    assert verdict == "applied" or entry.note


def test_facts_are_read_from_anything_with_the_attributes() -> None:
    class Kind:
        value = "adafactor"

    class Args:
        fp16 = True
        max_grad_norm = None
        optim = Kind()
        warmup_steps = 0
        warmup_ratio = 0.5
        world_size = 4

    facts = TrainingFacts.of(Args(), num_training_steps=10)
    assert (facts.fp16, facts.max_grad_norm, facts.optim, facts.world_size) == (True, 0.0, "adafactor", 4)
    assert facts.num_warmup_steps == 5
    assert facts.per_device_train_batch_size == 8

    class Text:
        hidden_size = 64

    class Both:
        text_config = Text()
        model_type = "both"

    assert ModelFacts.of(Both()).hidden_size == 64


def test_default_facts_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = {field.name: field.default for field in dataclasses.fields(transformers.TrainingArguments)}
    for field in dataclasses.fields(TrainingFacts):
        if field.name in theirs and theirs[field.name] is not None:
            default = theirs[field.name]
            assert field.default == getattr(default, "value", default), field.name


# ---------------------------------------------------------------- number formats


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"fp16": {"enabled": True, "auto_cast": True}}, {"precision": "fp16", "cast_inputs": True}),
        ({"fp16": {"auto_cast": True}}, {"precision": "fp32", "cast_inputs": False}),
        ({"data_types": {"param_dtype": "bf16"}}, {"precision": "bf16", "loss_scale": None}),
        ({"bf16": {"enabled": True}, "data_types": {"param_dtype": "bf16"}}, {"precision": "bf16"}),
        (
            {"torch_autocast": {"enabled": True}, "data_types": {"param_dtype": "bfloat16"}},
            {"precision": "bf16", "autocast": "bf16"},
        ),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
            {"master_dtype": "bf16", "optimizer_state_dtype": "bf16"},
        ),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, {"precision": "fp32", "master_dtype": "fp32"}),
        (
            {"bf16": {"enabled": True}, "optimizer": {"type": "Adam", "params": {"fp32_optimizer_states": False}}},
            {"master_dtype": "fp32", "optimizer_state_dtype": "bf16"},
        ),
        ({"fp16": {"enabled": True}, "bf16": {"check_grad_overflow": False}}, {"check_grad_overflow": True}),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, {"check_grad_overflow": False}),
        (
            {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["torch.nn.Linear"]}},
            {"lower_precision_safe_modules": ("torch.nn.Linear",)},
        ),
        ({"torch_autocast": {"lower_precision_safe_modules": ["x"]}}, {"lower_precision_safe_modules": ()}),
    ],
)
def test_number_formats_become_settings(config: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = resolve_dict(config)
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"fp16": {"enabled": True}, "data_types": {"param_dtype": "bf16"}}, "$.data_types.param_dtype"),
        ({"bf16": {"enabled": True}, "data_types": {"param_dtype": "fp32"}}, "$.data_types.param_dtype"),
        (
            {"fp16": {"enabled": True}, "optimizer": {"type": "Adam", "params": {"fp32_optimizer_states": False}}},
            "$.optimizer.params.fp32_optimizer_states",
        ),
    ],
)
def test_number_formats_that_contradict_each_other_are_refused(config: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigProblems) as caught:
        resolve_dict(config)
    assert [problem.path for problem in caught.value.problems] == [path]


def test_reports_and_profiler_become_settings() -> None:
    settings = resolve_dict(
        {
            "log_level": "WARNING",
            "timers": {"throughput": {"enabled": False}},
            "flops_profiler": {"enabled": True, "profile_step": 3, "top_modules": 2, "output_file": "x"},
        }
    )
    assert (settings.log_level, settings.throughput) == ("warning", False)
    assert settings.flops_profiler is not None
    assert (settings.flops_profiler.profile_step, settings.flops_profiler.output_file) == (3, "x")
    assert resolve_dict({}).flops_profiler is None


def test_share_of_host_threads_counts_only_when_written() -> None:
    offload = {"device": "cpu", "step_on": "host"}
    assert resolve_dict({"zero_optimization": {"offload_optimizer": offload}}).offload_optimizer.host_threads_share == 1
    given = {"zero_optimization": {"offload_optimizer": {**offload, "cpuadam_cores_perc": 0.5}}}
    assert resolve_dict(given).offload_optimizer.host_threads_share == 0.5


def test_share_of_the_host_needs_both_to_work() -> None:
    offload = {"device": "cpu", "step_on": "both", "host_share": 0.4}
    result = resolved({"zero_optimization": {"offload_optimizer": offload}})
    assert (result.settings.offload_optimizer.step_on, result.settings.offload_optimizer.host_share) == ("both", 0.4)
    assert entry_of(result, "$.zero_optimization.offload_optimizer.host_share").note == ""
    result = resolved({"zero_optimization": {"offload_optimizer": {**offload, "step_on": "device"}}})
    assert "both" in entry_of(result, "$.zero_optimization.offload_optimizer.host_share").note


def test_nvme_needs_a_path_and_its_keys_become_settings() -> None:
    offload: dict[str, Any] = {"device": "nvme", "buffer_count": 5, "pipeline_read": True}
    with pytest.raises(ConfigProblems, match="nvme_path: the key is missing"):
        resolve_dict({"zero_optimization": {"stage": 2, "offload_optimizer": offload}})
    offload["nvme_path"] = "/disk"
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": offload}, "aio": {"queue_depth": 16}}
    settings = resolve_dict(config)
    where = settings.offload_optimizer
    assert (where.device, where.nvme_path, where.buffer_count, where.pipeline_read) == ("nvme", "/disk", 5, True)
    assert (settings.aio.queue_depth, settings.aio.block_size) == (16, 1_048_576)
