"""A checkpoint resumes to the bit, at another world size, stage, place and precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Adafactor, get_linear_schedule_with_warmup

from hf_zero_plugin.config.settings import LossScaleSettings, OptimizerSettings, SchedulerSettings
from hf_zero_plugin.engine import assembly
from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.engine.tensor_access import full_state
from tests.engine.harness import OFFLOADS, Tiny, batch, decay_groups, loss_of, make_engine, train, weights
from tests.helpers import run_ranks

KINDS = ("master", "exp_avg", "exp_avg_sq")
States = dict[str, dict[str, Tensor]]


def states_of(engine: ZeroEngine, kinds: tuple[str, ...] = KINDS) -> States:
    params = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    found: States = {}
    for kind in kinds:
        found[kind] = {}
        for name, param in params.items():
            state = full_state(param, kind)
            assert state is not None
            found[kind][name] = state.clone()
    return found


def same_states(ours: States, theirs: States) -> None:
    for kind, tensors in theirs.items():
        for name, tensor in tensors.items():
            assert torch.equal(ours[kind][name], tensor), (kind, name)


class Mixed(nn.Module):
    """Odd sizes, a frozen layer, a buffer, a tied weight, one element, no dimension."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(16, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.second = nn.Linear(7, 1)
        self.again = nn.Linear(16, 7, bias=False)
        self.again.weight = self.first.weight
        self.gain = nn.Parameter(torch.tensor(1.25))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.second(self.frozen(self.first(x) + self.again(x))) * self.gain


MAKERS: dict[str, Any] = {
    "config AdamW": lambda m: {},
    "config SGD": lambda m: {
        "optimizer": OptimizerSettings(type="SGD", params={"lr": 0.1, "momentum": 0.9, "dampening": 0.2})
    },
    "config NAdam": lambda m: {"optimizer": OptimizerSettings(type="NAdam", params={"lr": 0.01})},
    "config Adafactor": lambda m: {"optimizer": OptimizerSettings(type="Adafactor", params={"lr": 0.01})},
    "config RMSprop": lambda m: {"optimizer": OptimizerSettings(type="RMSprop", params={"lr": 0.01, "centered": True})},
    "object AdamW": lambda m: {"client_optimizer": torch.optim.AdamW(decay_groups(m), lr=0.01)},
    "object Adafactor": lambda m: {"client_optimizer": Adafactor(decay_groups(m), lr=0.01, relative_step=False)},
    "object amsgrad": lambda m: {"client_optimizer": torch.optim.AdamW(decay_groups(m), lr=0.01, amsgrad=True)},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("how", MAKERS)
def test_resumed_run_equals_uninterrupted_run_to_the_bit(
    how: str, offload: str, precision: str, tmp_path: Path
) -> None:
    def make(seed: int) -> ZeroEngine:
        model = Mixed(seed)
        options = MAKERS[how](model)
        if "client_optimizer" in options:
            options["lr_scheduler"] = get_linear_schedule_with_warmup(options["client_optimizer"], 2, 12)
        else:
            params = {"warmup_num_steps": 4, "warmup_max_lr": 0.01, "total_num_steps": 12}
            options["scheduler"] = SchedulerSettings(type="WarmupDecayLR", params=params)
        return make_engine(model, precision=precision, offload=offload, **options)

    straight, first = make(0), make(0)
    losses = train(straight, 6)
    assert train(first, 3) == losses[:3]
    first.save_checkpoint(str(tmp_path), client_state={"note": [1, 2]})
    first.destroy()
    second = make(5)
    path, client_state = second.load_checkpoint(str(tmp_path))
    assert path == str(tmp_path / "global_step3")
    assert client_state == {"note": [1, 2]}
    assert second.global_steps == 3
    assert second.get_lr() == first.get_lr()
    assert train(second, 3, first=3) == losses[3:]
    for (name, ours), theirs in zip(second.module.named_parameters(), straight.module.parameters()):
        assert torch.equal(ours, theirs), name
    assert second.module.count == straight.module.count == 6
    second.destroy()
    straight.destroy()


def test_loss_scaler_and_skipped_steps_resume(tmp_path: Path) -> None:
    rules = LossScaleSettings(initial_scale_power=8, window=3, hysteresis=2)

    def events(engine: ZeroEngine, what: str, first: int = 0) -> list[float]:
        scales = []
        for step, event in enumerate(what, start=first):
            engine.backward(loss_of(engine, batch(step).half()) * (float("inf") if event == "o" else 1.0))
            engine.step()
            scales.append(engine.loss_scale)
        return scales

    straight, first = (make_engine(Tiny(), precision="fp16", loss_scale=rules) for _ in range(2))
    trace = events(straight, "..o.o.....o....")
    assert events(first, "..o.o.") == trace[:6]
    first.save_checkpoint(str(tmp_path))
    second = make_engine(Tiny(seed=3), precision="fp16", loss_scale=rules)
    second.load_checkpoint(str(tmp_path))
    assert second.skipped_steps == 2
    assert events(second, "....o....", 6) == trace[6:]
    assert all(torch.equal(a, b) for a, b in zip(second.module.parameters(), straight.module.parameters()))


@pytest.mark.parametrize("old", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("new", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("offload", ["none", "host thread"])
def test_precision_and_place_may_change(old: str, new: str, offload: str, tmp_path: Path) -> None:
    """Masters and moments come over to the bit; weights are the masters narrowed."""
    first = make_engine(Tiny(), precision=old)
    train(first, 3)
    first.save_checkpoint(str(tmp_path))
    second = make_engine(Tiny(seed=4), precision=new, offload=offload)
    second.load_checkpoint(str(tmp_path))
    same_states(states_of(second), states_of(first))
    for name, param in second.module.named_parameters():
        assert torch.equal(param, states_of(first)["master"][name].to(param.dtype))
    train(second, 1)
    second.destroy()


def test_module_only_leaves_steps_and_moments(tmp_path: Path) -> None:
    first = make_engine(Tiny(), precision="bf16")
    train(first, 3)
    first.save_checkpoint(str(tmp_path))
    second = make_engine(Tiny(seed=4), precision="bf16")
    second.load_checkpoint(str(tmp_path), load_module_only=True)
    same_states(states_of(second, ("master",)), states_of(first, ("master",)))
    assert all((moment == 0).all() for moment in states_of(second)["exp_avg"].values())
    assert second.global_steps == 0


def test_loading_right_after_a_step_is_not_overtaken_by_its_update(tmp_path: Path) -> None:
    engine = make_engine(Tiny(), offload="host thread")
    engine.save_checkpoint(str(tmp_path))
    before = weights(engine.module)
    train(engine, 1)
    engine.load_checkpoint(str(tmp_path))
    assert all(torch.equal(w, before[name]) for name, w in weights(engine.module).items())
    assert train(engine, 1) == train(make_engine(Tiny()), 1)
    engine.destroy()


def test_frozen_parameters_may_be_left_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    engine = make_engine(Mixed())
    train(engine, 1)
    engine.save_checkpoint(str(tmp_path / "all"))
    engine.save_checkpoint(str(tmp_path / "some"), exclude_frozen_parameters=True)
    names = {
        which: set(load_file(tmp_path / which / "global_step1" / "zero_module.safetensors"))
        for which in ("all", "some")
    }
    assert names["all"] - names["some"] == {"frozen.weight", "frozen.bias"}
    other = make_engine(Mixed(seed=8))
    own = other.module.frozen.weight.clone()
    other.load_checkpoint(str(tmp_path / "some"))
    assert torch.equal(other.module.frozen.weight, own)
    assert torch.equal(other.module.first.weight, engine.module.first.weight)
    other.load_checkpoint(str(tmp_path / "all"))
    assert torch.equal(other.module.frozen.weight, engine.module.frozen.weight)


# ---------------------------------------------------------------- world sizes and stages

SAVED = [
    (stage, offload, precision) for stage in (0, 1, 2) for offload in ("none", "cpu") for precision in ("fp32", "bf16")
]


def _save_at(root: str) -> dict[Any, Any]:
    assembly.BUCKET_NUMEL = 256
    results = {}
    for stage, offload, precision in SAVED:
        engine = make_engine(Mixed(), stage=stage, offload=offload, precision=precision)
        for step in range(3):
            x = batch(step, dist.get_rank()).to(engine.parts.params[0].dtype)
            engine.backward(loss_of(engine, x))
            engine.step()
        engine.save_checkpoint(f"{root}/{stage}-{offload}-{precision}")
        results[stage, offload, precision] = states_of(engine)
        engine.destroy()
    return results


def _load_at(root: str) -> dict[Any, Any]:
    """Every checkpoint into another stage, place and precision."""
    assembly.BUCKET_NUMEL = 400
    results = {}
    for stage, offload, precision in SAVED:
        for new_stage in (0, 1, 2):
            options: dict[str, Any] = {"stage": new_stage, "precision": "fp32" if precision == "bf16" else "bf16"}
            options["offload"] = "cpu" if offload == "none" else "none"
            engine = make_engine(Mixed(seed=dist.get_rank() if dist.is_initialized() else 6), **options)
            path, _ = engine.load_checkpoint(f"{root}/{stage}-{offload}-{precision}")
            assert path is not None
            assert engine.global_steps == 3
            results[(stage, offload, precision), new_stage] = states_of(engine)
            for name, weight in engine.module.named_parameters():
                if weight.requires_grad:
                    assert torch.equal(weight, states_of(engine, ("master",))["master"][name].to(weight.dtype)), name
            loss = loss_of(engine, batch(9).to(engine.parts.params[0].dtype))
            engine.backward(loss)
            engine.step()
            engine.destroy()
    return results


def _resume_at(root: str) -> list[Any]:
    """Uninterrupted and resumed at the same world size."""
    outcome = []
    for stage in (0, 1, 2):
        for offload in ("none", "host thread"):

            def run(engine: ZeroEngine, first: int, last: int) -> list[float]:
                losses = []
                for step in range(first, last):
                    loss = loss_of(engine, batch(step, dist.get_rank()).bfloat16())
                    engine.backward(loss)
                    engine.step()
                    losses.append(loss.item())
                return losses

            options: dict[str, Any] = {"stage": stage, "offload": offload, "precision": "bf16"}
            straight, first, second = (make_engine(Mixed(seed), **options) for seed in (0, 0, 4))
            losses = run(straight, 0, 6)
            run(first, 0, 3)
            first.save_checkpoint(f"{root}/resume-{stage}-{offload}")
            second.load_checkpoint(f"{root}/resume-{stage}-{offload}")
            same = run(second, 3, 6) == losses[3:]
            equal = all(torch.equal(a, b) for a, b in zip(second.module.parameters(), straight.module.parameters()))
            outcome.append((stage, offload, same, equal))
            for engine in (straight, first, second):
                engine.destroy()
    return outcome


def _two_ranks(root: str) -> tuple[dict[Any, Any], list[Any]]:
    return _save_at(root), _resume_at(root)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, Any], list[Any]]:
    root = tmp_path_factory.mktemp("two_ranks")
    results = run_ranks(_two_ranks, 2, str(root))
    for key, states in results[0][0].items():
        same_states(states, results[1][0][key])
    return root, results[0][0], results[0][1] + results[1][1]


Saved = tuple[Path, dict[Any, Any], list[Any]]


def test_resume_at_two_ranks_equals_uninterrupted_to_the_bit(saved: Saved) -> None:
    assert len(saved[2]) == 12
    for stage, offload, same, equal in saved[2]:
        assert same, (stage, offload)
        assert equal, (stage, offload)


def test_two_ranks_resume_as_one_in_any_stage_to_the_bit(saved: Saved) -> None:
    root, states, _ = saved
    loaded = _load_at(str(root))
    assert len(loaded) == 36
    for (key, _), found in loaded.items():
        same_states(found, states[key])


@pytest.mark.slow
def test_two_ranks_resume_as_three_in_any_stage_to_the_bit(saved: Saved) -> None:
    root, states, _ = saved
    for rank in run_ranks(_load_at, 3, str(root)):
        assert len(rank) == 36
        for (key, _), found in rank.items():
            same_states(found, states[key])
