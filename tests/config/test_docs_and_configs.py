"""docs/config.md is fresh, and every shipped configuration is good."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_zero_plugin.config.auto import ModelFacts, TrainingFacts, resolve
from hf_zero_plugin.config.docs import render
from hf_zero_plugin.config.load import load_config
from hf_zero_plugin.config.report import short_table

REPO = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPO / "configs").glob("*.json"))

ARTICLE = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def test_the_document_is_fresh() -> None:
    text = (REPO / "docs" / "config.md").read_text(encoding="utf-8")
    assert text == render(), "run: python -m hf_zero_plugin.config.docs > docs/config.md"


def test_the_offload_configuration_is_the_articles_key_for_key() -> None:
    assert json.loads((REPO / "configs" / "zero2_offload.json").read_text()) == ARTICLE


def test_all_six_configurations_are_there() -> None:
    names = {path.stem for path in CONFIGS}
    assert {"zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("args", [TrainingFacts(), TrainingFacts(fp16=True), TrainingFacts(bf16=True, world_size=2)])
def test_every_configuration_resolves_without_a_warning(path: Path, args: TrainingFacts) -> None:
    result = resolve(load_config(path), args, ModelFacts(hidden_size=64))
    assert not result.warnings
    assert result.settings.stage == int(path.stem[4])
    assert (result.settings.offload_optimizer.device == "cpu") is path.stem.endswith("offload")
    assert result.settings.stage3.gather_16bit_weights_on_model_save is (result.settings.stage == 3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_short_table_fits_into_a_dozen_lines(path: Path) -> None:
    table = short_table(resolve(load_config(path), TrainingFacts(fp16=True), ModelFacts(hidden_size=64)))
    lines = table.split("\n")
    assert len(lines) <= 13
    assert str(path) in lines[0]
    assert "fp16, dynamic loss scale from 2^16" in table
    assert "TrainingArguments.max_grad_norm" in table


def test_loading_a_configuration_imports_no_torch() -> None:
    code = (
        "import sys; from hf_zero_plugin.config.auto import resolve, TrainingFacts;"
        "from hf_zero_plugin.config.load import load_config;"
        f"resolve(load_config({str(CONFIGS[0])!r}), TrainingFacts());"
        "print([name for name in ('torch', 'transformers', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
