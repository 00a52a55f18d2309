"""Masters and states that rest in bf16, weights of autocast, inputs that are cast: against the same by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_zero_plugin.config.settings import LossScaleSettings, OptimizerSettings
from hf_zero_plugin.engine.low_precision import cast_floats, params_of_safe_modules
from hf_zero_plugin.errors import ConfigError

from .harness import ADAMW, OFFLOADS, Tiny, batch, loss_of, make_engine, train, weights

STEPS = 4
KINDS = [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")]
"""Types of masters and of states."""


def _by_hand(master_dtype: str, state_dtype: str, micros: int = 1) -> nn.Module:
    """bf16 weights; every step widens master and moments, steps by torch's AdamW, and rounds all three."""
    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    model = Tiny()
    params = list(model.parameters())
    masters = [p.detach().float().to(types[master_dtype]) for p in params]
    model.to(torch.bfloat16)
    moments = [[torch.zeros_like(p, dtype=types[state_dtype]) for _ in range(2)] for p in params]
    for step in range(STEPS):
        sums = [torch.zeros_like(m) for m in masters]
        for micro in range(micros):
            (loss_of(model, batch(step, micro).bfloat16()) / micros).backward()
            for total, param in zip(sums, params):
                total += param.grad
                param.grad = None
        for param, master, pair, total in zip(params, masters, moments, sums):
            wide = nn.Parameter(master.float())
            options = {**ADAMW, "weight_decay": 0.1 if param.ndim > 1 else 0.0}
            optimizer = torch.optim.AdamW([wide], fused=True, **options)  # type: ignore[arg-type]
            state = {"step": torch.tensor(float(step)), "exp_avg": pair[0].float(), "exp_avg_sq": pair[1].float()}
            optimizer.state[wide] = state
            wide.grad = total.float()
            optimizer.step()
            master.copy_(wide.detach())
            pair[0].copy_(state["exp_avg"])
            pair[1].copy_(state["exp_avg_sq"])
            param.data.copy_(wide.detach())
    return model


def _engine(master_dtype: str, state_dtype: str, offload: str, **options: Any) -> Any:
    types = {"master_dtype": master_dtype, "optimizer_state_dtype": state_dtype}
    return make_engine(Tiny(), precision="bf16", offload=offload, gradient_clipping=0.0, **types, **options)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize(("master", "state"), KINDS)
def test_narrow_masters_and_states_equal_torch_by_hand_to_the_bit(master: str, state: str, offload: str) -> None:
    engine = _engine(master, state, offload)
    train(engine, STEPS)
    engine.synchronize()
    expected = weights(_by_hand(master, state))
    for name, weight in weights(engine.module).items():
        assert torch.equal(weight, expected[name]), name
    kept = engine.parts.masters.homes[0].tensors(0)
    assert str(kept["master"].dtype).endswith({"bf16": "bfloat16", "fp32": "float32"}[master])
    assert str(kept["exp_avg"].dtype).endswith({"bf16": "bfloat16", "fp32": "float32"}[state])


@pytest.mark.parametrize(("master", "state"), KINDS)
def test_they_differ_from_fp32_ones(master: str, state: str) -> None:
    """Or the test above would say nothing."""
    narrow, wide = _engine(master, state, "none"), _engine("fp32", "fp32", "none")
    train(narrow, STEPS)
    train(wide, STEPS)
    assert any(not torch.equal(a, b) for a, b in zip(weights(narrow.module).values(), weights(wide.module).values()))


def test_narrow_masters_sum_micro_steps_in_bf16() -> None:
    engine = _engine("bf16", "bf16", "none", gradient_accumulation_steps=2)
    train(engine, STEPS, micros=2)
    expected = weights(_by_hand("bf16", "bf16", micros=2))
    for name, weight in weights(engine.module).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("offload", OFFLOADS)
def test_what_narrow_states_take(offload: str) -> None:
    """Bytes per element, padding counted; a bf16 master on the device is the weight itself."""
    engine = _engine("bf16", "bf16", offload)
    numel = sum(layout.padded_numel for layout in engine.parts.layouts)
    place = engine.memory_report()["device" if offload == "none" else "host"]
    assert place["moments"] == 2 * 2 * numel
    assert place["master weights"] == (0 if offload == "none" else 2 * numel)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_narrow_states_resume_to_the_bit(offload: str, tmp_path: Path) -> None:
    whole = _engine("bf16", "bf16", offload)
    train(whole, STEPS)
    first = _engine("bf16", "bf16", offload)
    train(first, 2)
    first.save_checkpoint(str(tmp_path))
    second = _engine("bf16", "bf16", offload)
    second.load_checkpoint(str(tmp_path))
    train(second, STEPS - 2, first=2)
    second.synchronize()
    whole.synchronize()
    for name, weight in weights(second.module).items():
        assert torch.equal(weight, weights(whole.module)[name]), name


def test_optimizers_that_hold_their_own_states_say_so() -> None:
    with pytest.raises(ConfigError, match="RAdam keeps its own states in fp32"):
        _engine("fp32", "bf16", "none", optimizer=OptimizerSettings(type="RAdam", params={"lr": 0.1}))


# ---------------------------------------------------------------- weights and inputs


def test_bf16_weights_under_autocast_equal_torch_to_the_bit() -> None:
    engine = make_engine(Tiny(), precision="bf16", autocast="bf16")
    plain = make_engine(Tiny(), precision="bf16")
    x = batch(0)
    assert next(engine.module.parameters()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain.module(x)
    assert torch.equal(engine(x), expected)


def test_inputs_are_cast_when_asked_for() -> None:
    scale = LossScaleSettings(static_scale=4.0)
    engine = make_engine(Tiny(), precision="fp16", loss_scale=scale, cast_inputs=True)
    plain = make_engine(Tiny(), precision="fp16", loss_scale=scale)
    assert torch.equal(engine(x=batch(0)), plain(x=batch(0).half()))
    with pytest.raises(RuntimeError, match="dtype"):
        plain(batch(0))


def test_only_floating_point_tensors_are_cast_at_any_depth() -> None:
    ids, mask = torch.arange(3), torch.ones(2)
    cast = cast_floats({"a": [ids, (mask, None)], "b": "text", "c": 1.5}, torch.float16)
    assert cast["a"][0] is ids
    assert cast["a"][1][0].dtype == torch.float16
    assert (cast["a"][1][1], cast["b"], cast["c"]) == (None, "text", 1.5)


def test_safe_modules_are_found_by_class_and_shared_parameters_are_left_out() -> None:
    model = Tiny()
    found = params_of_safe_modules(model, ["torch.nn.Linear"])
    assert found == {id(p) for layer in (model.first, model.last) for p in layer.parameters()}
    model.norm.weight = model.first.bias
    assert id(model.first.bias) not in params_of_safe_modules(model, ["torch.nn.Linear"])
    for wrong in ("torch.nn.Liner", "Linear", "torch.pi"):
        with pytest.raises(ConfigError, match=wrong):
            params_of_safe_modules(model, [wrong])
