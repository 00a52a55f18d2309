"""One process: the engine against the same training written out by hand with torch, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Adafactor, get_linear_schedule_with_warmup

from hf_zero_plugin.config.settings import LossScaleSettings, OptimizerSettings, SchedulerSettings
from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.engine.loss_scaler import LossScaler
from hf_zero_plugin.errors import ConfigError, LossScaleError

from .harness import ADAMW, OFFLOADS, Reference, Tiny, batch, loss_of, make_engine, train, weights

STEPS = 5


def _assert_same(module: nn.Module, reference: nn.Module) -> None:
    expected = weights(reference)
    for name, weight in weights(module).items():
        assert torch.equal(weight, expected[name]), name


def _masters(engine: ZeroEngine) -> list[Tensor]:
    from hf_zero_plugin.engine.tensor_access import full_state

    masters = [full_state(param, "master") for param in engine.module.parameters() if param.requires_grad]
    return [master for master in masters if master is not None]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_losses_norms_and_weights_equal_torch_to_the_bit(stage: int, offload: str, precision: str) -> None:
    """Half precision against a reference with fp32 masters."""
    scale = 2.0**8 if precision == "fp16" else 1.0
    options: dict[str, Any] = {"loss_scale": LossScaleSettings(static_scale=scale)} if precision == "fp16" else {}
    engine = make_engine(Tiny(), stage=stage, offload=offload, precision=precision, gradient_clipping=0.5, **options)
    reference = Reference(Tiny(), precision, clip=0.5, scale=scale)
    for step in range(STEPS):
        assert train(engine, 1, first=step) == reference.train(1, first=step)
        assert engine.get_global_grad_norm() == reference.norms[-1]
    _assert_same(engine.module, reference.model)
    for master, expected in zip(_masters(engine), reference.masters, strict=True):
        assert torch.equal(master, expected)
    assert reference.norms[0] > 0.5, "the clip must have had an effect"
    engine.destroy()


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_clipping_weights_equal_torch_to_the_bit(precision: str, offload: str) -> None:
    engine = make_engine(Tiny(), precision=precision, offload=offload, gradient_clipping=0.0)
    reference = Reference(Tiny(), precision, clip=0.0)
    assert train(engine, STEPS) == reference.train(STEPS)
    _assert_same(engine.module, reference.model)
    engine.destroy()


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_accumulation_equals_fp32_sums_of_micro_steps_to_the_bit(precision: str, stage: int, offload: str) -> None:
    """bf16 gradients of micro-steps are summed in fp32."""
    options: dict[str, Any] = {"precision": precision, "gradient_accumulation_steps": 3}
    engine = make_engine(Tiny(), stage=stage, offload=offload, **options)
    reference = Reference(Tiny(), precision)
    assert train(engine, STEPS, micros=3) == reference.train(STEPS, micros=3)
    assert engine.global_steps == STEPS
    _assert_same(engine.module, reference.model)
    engine.destroy()


def test_accumulation_dtype_can_be_told() -> None:
    """With grad_accum_dtype bf16 autograd adds in bf16, which is not the same; fp32 buffers are not made."""
    wide = make_engine(Tiny(), precision="bf16", gradient_accumulation_steps=4)
    narrow = make_engine(Tiny(), precision="bf16", gradient_accumulation_steps=4, grad_accum_dtype="bf16")
    train(wide, 2, micros=4)
    train(narrow, 2, micros=4)
    assert any(not torch.equal(a, b) for a, b in zip(_masters(wide), _masters(narrow)))
    assert wide.parts.grads is not None
    assert narrow.parts.grads is not None
    assert wide.parts.grads.num_bytes == 3 * narrow.parts.grads.num_bytes


@pytest.mark.parametrize("micros", [2, 4])
def test_accumulation_equals_the_large_batch(micros: int) -> None:
    engine = make_engine(Tiny(), gradient_accumulation_steps=micros)
    whole = make_engine(Tiny())
    for step in range(STEPS):
        rows = [batch(step, micro) for micro in range(micros)]
        for x in rows:
            engine.backward(loss_of(engine, x))
            engine.step()
        whole.backward(loss_of(whole, torch.cat(rows)))
        whole.step()
    for a, b in zip(engine.module.parameters(), whole.module.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_caller_that_divides_the_loss_itself_is_not_divided_twice() -> None:
    engine = make_engine(Tiny(), gradient_accumulation_steps=2)
    reference = Reference(Tiny())
    for step in range(STEPS):
        for micro in range(2):
            loss = loss_of(engine, batch(step, micro))
            assert engine.backward(loss / 2, scale_wrt_gas=False).item() == loss.item() / 2
            engine.step()
    reference.train(STEPS, micros=2)
    _assert_same(engine.module, reference.model)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_no_sync_defers_the_step(stage: int) -> None:
    engine = make_engine(Tiny(), stage=stage)
    reference = Reference(Tiny())
    for step in range(STEPS):
        with engine.no_sync():
            assert not engine.is_gradient_accumulation_boundary()
            engine.backward(loss_of(engine, batch(step, 0)) / 2)
            engine.step()
        assert engine.global_steps == step
        engine.backward(loss_of(engine, batch(step, 1)) / 2)
        engine.step()
    reference.train(STEPS, micros=2)
    _assert_same(engine.module, reference.model)


def test_no_sync_ends_after_an_error() -> None:
    engine = make_engine(Tiny())
    with pytest.raises(KeyError), engine.no_sync():
        raise KeyError
    assert engine.is_gradient_accumulation_boundary()


def test_forced_boundary_overrides_the_count() -> None:
    """What accelerate does: it knows when the data ends before the count is full."""
    engine = make_engine(Tiny(), gradient_accumulation_steps=4)
    engine.set_gradient_accumulation_boundary(is_boundary=False)
    engine.backward(loss_of(engine, batch(0)))
    engine.step()
    assert engine.global_steps == 0
    engine.set_gradient_accumulation_boundary(is_boundary=True)
    engine.backward(loss_of(engine, batch(1)))
    engine.step()
    assert engine.global_steps == 1


# ---------------------------------------------------------------- models of all kinds


class Branches(nn.Module):
    """A frozen layer, a layer that only some steps use, one that none uses, and a parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(16, 16)
        self.always = nn.Linear(16, 16)
        self.sometimes = nn.Linear(16, 16)
        self.never = nn.Linear(16, 16)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.tensor([0.25]))
        self.use = True
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(self.frozen(x))
        return (self.sometimes(x) if self.use else x) * self.gain + self.shift


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_unused_and_one_element_parameters(precision: str, offload: str) -> None:
    """A parameter without a gradient counts as zero, as in DeepSpeed: the reference gives zeros to torch's optimizer.

    Stock torch skips it, which also skips its weight decay and momentum. The one-element parameters may differ in the
    last bit (test_optimizers.py says why), and through them everything else.
    """
    engine = make_engine(Branches(), precision=precision, offload=offload)
    model = engine.module
    reference = Reference(Branches(), precision)
    frozen = weights(model)["frozen.weight"]
    for step in range(STEPS):
        model.use = reference.model.use = step % 2 == 0
        ours, theirs = train(engine, 1, first=step), reference.train(1, first=step)
        assert ours == pytest.approx(theirs, rel=1e-6 if precision == "fp32" else 1e-2)
    assert torch.equal(weights(model)["frozen.weight"], frozen)
    close = {"rtol": 1e-6, "atol": 1e-6} if precision == "fp32" else {"rtol": 1e-2, "atol": 1e-2}
    for (name, ours_), theirs_ in zip(model.named_parameters(), reference.model.parameters()):
        torch.testing.assert_close(ours_, theirs_, **close, msg=name)
    engine.destroy()


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tied_weights_stay_one_parameter_and_get_both_gradients(precision: str, offload: str) -> None:
    engine = make_engine(Tiny(tied=True), precision=precision, offload=offload)
    reference = Reference(Tiny(tied=True), precision)
    assert train(engine, STEPS) == reference.train(STEPS)
    assert engine.module.last.weight is engine.module.first.weight
    _assert_same(engine.module, reference.model)
    engine.destroy()


class TwoTypes(nn.Module):
    """A bf16 layer inside an fp32 model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(16, 16)
        self.narrow = nn.Linear(16, 16, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x).bfloat16())


@pytest.mark.parametrize("offload", OFFLOADS)
def test_two_types_in_one_model_keep_their_types(offload: str) -> None:
    """Reference: AdamW over fp32 masters for both; the bf16 layer is narrowed after every step."""
    engine, model = make_engine(TwoTypes(), offload=offload), TwoTypes()
    masters = [nn.Parameter(p.detach().float().clone()) for p in model.parameters()]
    groups = [
        {"params": [m for m in masters if m.ndim > 1], "weight_decay": 0.1},
        {"params": [m for m in masters if m.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **{**ADAMW, "fused": True})  # type: ignore[arg-type]
    for step in range(STEPS):
        losses = [loss_of(m, batch(step)) for m in (engine, model)]
        engine.backward(losses[0])
        engine.step()
        losses[1].backward()
        for master, param in zip(masters, model.parameters()):
            assert param.grad is not None
            master.grad, param.grad = param.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, param in zip(masters, model.parameters()):
                param.copy_(master)
        assert losses[0].item() == losses[1].item()
    assert {p.dtype for p in engine.module.narrow.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in engine.module.wide.parameters()} == {torch.float32}
    _assert_same(engine.module, model)
    engine.destroy()


class Checkpointed(Tiny):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__(tied=True)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.requires_grad_())
        for _ in range(2):  # the same layers twice: their gradients arrive in two pieces
            x = checkpoint(lambda x: torch.tanh(self.last(self.norm(x))), x, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("offload", ["none", "host thread"])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool, stage: int, offload: str) -> None:
    engine = make_engine(Checkpointed(use_reentrant), stage=stage, offload=offload)
    reference = Reference(Checkpointed(use_reentrant))
    assert train(engine, STEPS) == reference.train(STEPS)
    _assert_same(engine.module, reference.model)
    engine.destroy()


def test_model_without_anything_to_train_is_refused() -> None:
    model = Tiny().requires_grad_(False)
    with pytest.raises(ConfigError, match="requires_grad_"):
        make_engine(model, param_groups=[{"params": list(model.parameters())}])


def test_engine_without_an_optimizer_evaluates_and_says_so_in_backward() -> None:
    from hf_zero_plugin.config.settings import EngineSettings

    engine = ZeroEngine(Tiny(), EngineSettings(precision="bf16"), device=torch.device("cpu"))
    loss = loss_of(engine, batch(0).bfloat16())
    with pytest.raises(RuntimeError, match="evaluation only"):
        engine.backward(loss)
    engine.destroy()


# ---------------------------------------------------------------- zero_grad in all its forms


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("whose", ["engine", "model", "optimizer"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_grad_after_the_step_is_harmless(whose: str, set_to_none: bool, precision: str) -> None:
    engine = make_engine(Tiny(), precision=precision, offload="host thread")
    reference = Reference(Tiny(), precision)
    target = {"engine": engine, "model": engine.module, "optimizer": engine.optimizer}[whose]
    assert target is not None
    for step in range(STEPS):
        train(engine, 1, first=step)
        target.zero_grad(set_to_none=set_to_none)
        reference.train(1, first=step)
    _assert_same(engine.module, reference.model)
    engine.destroy()


@pytest.mark.parametrize("whose", ["engine", "optimizer"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_engine_and_optimizer_zero_grad_between_micro_steps_keep_the_sum(whose: str, precision: str) -> None:
    """Accelerate's loops call optimizer.zero_grad at every micro-step."""
    engine = make_engine(Tiny(), gradient_accumulation_steps=2, precision=precision)
    reference = Reference(Tiny(), precision)
    for step in range(STEPS):
        for micro in range(2):
            engine.backward(loss_of(engine, batch(step, micro).to(next(engine.parameters()).dtype)))
            engine.step()
            (engine if whose == "engine" else engine.optimizer).zero_grad()  # type: ignore[union-attr]
    reference.train(STEPS, micros=2)
    _assert_same(engine.module, reference.model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_model_zero_grad_between_micro_steps_forgets_the_sum(precision: str) -> None:
    """As with plain torch: the model's own zero_grad drops what was summed, in whatever type it was kept."""
    engine = make_engine(Tiny(), gradient_accumulation_steps=2, precision=precision)
    reference = Reference(Tiny(), precision)
    dtype = next(engine.parameters()).dtype
    for step in range(STEPS):
        engine.backward(loss_of(engine, batch(step, 0).to(dtype)))
        engine.step()
        engine.module.zero_grad()
        engine.backward(loss_of(engine, batch(step, 1).to(dtype)))
        engine.step()
        reference.step([lambda step=step: loss_of(reference.model, batch(step, 1).to(dtype)) / 2])  # type: ignore[misc]
    _assert_same(engine.module, reference.model)


# ---------------------------------------------------------------- fp16 and overflows


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("stage", [0, 2])
def test_scale_trace_through_overflows_is_the_state_machines(stage: int, offload: str) -> None:
    rules = LossScaleSettings(initial_scale_power=8, window=3, hysteresis=2)
    engine = make_engine(
        Tiny(),
        stage=stage,
        offload=offload,
        precision="fp16",
        loss_scale=rules,
        scheduler=SchedulerSettings(type="WarmupLR", params={"warmup_min_lr": 0.01, "warmup_num_steps": 50}),
    )
    assert engine.optimizer is not None
    expected, events = LossScaler(rules), "oo....o....oo......"
    for step, event in enumerate(events):
        assert engine.loss_scale == expected.scale, step
        before, schedule_step = weights(engine.module), engine.lr_scheduler.last_batch_iteration
        moments = _masters(engine)
        loss = loss_of(engine, batch(step).half()) * (float("inf") if event == "o" else 1.0)
        engine.backward(loss)
        engine.step()
        expected.update(event == "o")
        assert engine.optimizer.overflow == (event == "o")
        assert engine.was_step_applied == (event != "o")
        if event == "o":
            assert engine.lr_scheduler.last_batch_iteration == schedule_step
            assert all(torch.equal(a, b) for a, b in zip(_masters(engine), moments))
            assert all(torch.equal(w, before[name]) for name, w in weights(engine.module).items())
        else:
            assert engine.lr_scheduler.last_batch_iteration == schedule_step + 1
            assert any(not torch.equal(w, before[name]) for name, w in weights(engine.module).items())
    assert engine.global_steps == len(events)
    assert engine.skipped_steps == events.count("o")
    engine.destroy()


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("kind", [float("inf"), float("nan")])
def test_overflowing_steps_leave_no_trace_in_later_ones(offload: str, kind: float) -> None:
    """A run with skipped steps equals one that never saw those batches: the scale is a power of two, so exactly."""
    rules = LossScaleSettings(initial_scale_power=8, window=1000, hysteresis=100)
    engine = make_engine(Tiny(), offload=offload, precision="fp16", loss_scale=rules)
    clean = make_engine(Tiny(), precision="fp16", loss_scale=rules)
    for step in range(6):
        if step in (1, 4):
            engine.backward(loss_of(engine, batch(99).half()) * kind)
            engine.step()
            assert engine.optimizer is not None
            assert engine.optimizer.overflow
        train(engine, 1, first=step)
        train(clean, 1, first=step)
    _assert_same(engine.module, clean.module)
    engine.destroy()


def test_overflow_in_one_micro_step_skips_the_whole_step() -> None:
    engine = make_engine(Tiny(), precision="fp16", gradient_accumulation_steps=3)
    before = weights(engine.module)
    for micro in range(3):
        engine.backward(loss_of(engine, batch(0, micro).half()) * (float("inf") if micro == 0 else 1.0))
        engine.step()
    assert engine.skipped_steps == 1
    assert all(torch.equal(w, before[name]) for name, w in weights(engine.module).items())
    train(engine, 1, micros=3)
    assert engine.was_step_applied


@pytest.mark.parametrize("offload", OFFLOADS)
def test_error_at_the_smallest_scale_names_the_first_bad_parameter(offload: str) -> None:
    rules = LossScaleSettings(initial_scale_power=1, window=3, hysteresis=1, min_scale=1.0)
    engine = make_engine(Tiny(), offload=offload, precision="fp16", loss_scale=rules)

    def poison() -> None:
        out = engine.module.norm(torch.tanh(engine.module.first(batch(0).half()))).detach()
        engine.backward((engine.module.last(out).float().square().mean()) * float("inf"))
        engine.step()

    poison()
    assert engine.loss_scale == 1.0
    with pytest.raises(LossScaleError, match=r"First parameter with a non-finite gradient: last\.") as caught:
        poison()
    assert "bf16" in str(caught.value)
    engine.destroy()


@pytest.mark.parametrize("offload", OFFLOADS)
def test_bf16_steps_with_a_bad_gradient_are_skipped(offload: str) -> None:
    engine = make_engine(Tiny(), offload=offload, precision="bf16")
    clean = make_engine(Tiny(), precision="bf16")
    train(engine, 2)
    engine.backward(loss_of(engine, batch(7).bfloat16()) * float("nan"))
    engine.step()
    train(engine, 2, first=2)
    train(clean, 4)
    assert engine.skipped_steps == 1
    _assert_same(engine.module, clean.module)
    engine.destroy()


def test_overflow_check_can_be_switched_off() -> None:
    engine = make_engine(Tiny(), precision="bf16", check_grad_overflow=False)
    engine.backward(loss_of(engine, batch(0).bfloat16()) * float("nan"))
    engine.step()
    assert engine.skipped_steps == 0
    assert all(w.isnan().any() for w in weights(engine.module).values())


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_autocast_keeps_fp32_weights_and_casts_the_forward(kind: str) -> None:
    scale = LossScaleSettings(static_scale=256.0) if kind == "fp16" else None
    engine = make_engine(Tiny(), autocast=kind, loss_scale=scale)
    reference = Reference(Tiny(), scale=256.0 if kind == "fp16" else 1.0)
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    for step in range(STEPS):
        loss = loss_of(engine, batch(step))
        engine.backward(loss)
        engine.step()

        def theirs(step: int = step) -> Tensor:
            with torch.autocast("cpu", dtype=dtype):
                out = reference.model(batch(step))
            return out.float().square().mean()

        assert reference.step([theirs]) == [loss.item()]
    _assert_same(engine.module, reference.model)


# ---------------------------------------------------------------- optimizers and schedules


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "make",
    [
        lambda g: torch.optim.AdamW(g, **ADAMW, fused=True),
        lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9, foreach=False),
        lambda g: torch.optim.RMSprop(g, lr=0.01, foreach=False),
        lambda g: torch.optim.AdamW(g, lr=0.01, amsgrad=True, foreach=False),
        lambda g: Adafactor(g, lr=0.01, relative_step=False),
    ],
    ids=["AdamW", "SGD", "RMSprop", "amsgrad", "Adafactor"],
)
def test_optimizer_objects_do_what_they_do_alone(make: Any, precision: str, offload: str) -> None:
    model = Tiny()
    from .harness import decay_groups

    engine = make_engine(model, client_optimizer=make(decay_groups(model)), precision=precision, offload=offload)
    reference = Reference(Tiny(), precision, optimizer=make)
    assert train(engine, STEPS) == reference.train(STEPS)
    _assert_same(engine.module, reference.model)
    engine.destroy()


def test_param_groups_of_an_optimizer_object_stay_live() -> None:
    """A scheduler built before the engine writes to the client's groups."""
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    engine = make_engine(model, client_optimizer=optimizer, lr_scheduler=schedule)
    rates = []
    for step in range(4):
        rates.append(engine.get_lr()[0])
        train(engine, 1, first=step)
    assert rates == [0.01, 0.005, 0.0025, 0.00125]


@pytest.mark.parametrize("given", ["object", "callable", "config"])
def test_schedules_of_every_kind_drive_the_update(given: str) -> None:
    def linear(optimizer: torch.optim.Optimizer) -> Any:
        return get_linear_schedule_with_warmup(optimizer, 2, 10)

    model = Tiny()
    if given == "config":
        params = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.02, "warmup_num_steps": 4, "warmup_type": "linear"}
        engine = make_engine(model, scheduler=SchedulerSettings(type="WarmupLR", params=params))
    elif given == "callable":
        engine = make_engine(model, lr_scheduler=linear)
    else:
        from .harness import decay_groups

        client = torch.optim.AdamW(decay_groups(model), **ADAMW, fused=True)  # type: ignore[arg-type]
        engine = make_engine(model, client_optimizer=client, lr_scheduler=linear(client))
    reference = Reference(Tiny())
    if given == "config":
        # WarmupLR, linear: rate of step i (from 0) is that of index i - 1, the minimum before the first step.
        theirs: Any = torch.optim.lr_scheduler.LambdaLR(
            reference.optimizer, lambda step: 0.0 if step == 0 else min(1.0, (step - 1) / 4) * 2
        )
    else:
        theirs = linear(reference.optimizer)
    for step in range(6):
        assert engine.get_lr() == pytest.approx([g["lr"] for g in reference.optimizer.param_groups], rel=1e-12)
        train(engine, 1, first=step)
        reference.train(1, first=step)
        theirs.step()
    for a, b in zip(engine.module.parameters(), reference.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("RMSprop", {"lr": 0.01}),
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("Lion", {"lr": 0.001}),
        ("Adagrad", {"lr": 0.01}),
        ("Adafactor", {"lr": 0.01}),
    ],
)
def test_optimizers_of_the_config_give_the_same_with_and_without_offload(
    name: str, params: dict[str, Any], offload: str
) -> None:
    settings = OptimizerSettings(type=name, params=params)
    engine = make_engine(Tiny(), precision="bf16", optimizer=settings, offload=offload)
    plain = make_engine(Tiny(), precision="bf16", optimizer=settings)
    assert train(engine, STEPS) == train(plain, STEPS)
    _assert_same(engine.module, plain.module)
    engine.destroy()


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_ratio_changes_nothing(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_zero_plugin.engine import assembly

    monkeypatch.setattr(assembly, "BUCKET_NUMEL", 300)
    offload = {"device": "cpu", "step_on": "host", "ratio": ratio}
    engine, plain = make_engine(Tiny(), offload=offload), make_engine(Tiny())
    assert train(engine, STEPS) == train(plain, STEPS)
    _assert_same(engine.module, plain.module)
    engine.destroy()


# ---------------------------------------------------------------- looking in from outside


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loading_a_state_dict_moves_the_masters(precision: str, offload: str) -> None:
    engine = make_engine(Tiny(), precision=precision, offload=offload)
    train(engine, 2)
    other = Tiny(seed=5).to(next(engine.parameters()).dtype)
    engine.module.load_state_dict(other.state_dict())
    _assert_same(engine.module, other)
    for master, param in zip(_masters(engine), other.parameters()):
        # Where the loaded weight happens to be the old master's narrowing, the master keeps its further bits.
        assert torch.equal(master.to(param.dtype), param)
        if precision == "bf16":
            assert (master == param.float()).float().mean() > 0.9
    engine.destroy()


@pytest.mark.parametrize("offload", OFFLOADS)
def test_loading_a_state_dict_into_a_submodule_moves_its_masters(offload: str) -> None:
    engine = make_engine(Tiny(), precision="bf16", offload=offload)
    train(engine, 2)
    other = Tiny(seed=5).bfloat16()
    engine.module.first.load_state_dict(other.first.state_dict())
    train(engine, 1, first=2)
    moved = (engine.module.first.weight - other.first.weight).abs().max().item()
    assert moved < 0.05, "one step from the loaded weights, not from the old masters"
    engine.destroy()


def test_masters_keep_their_extra_bits_where_weights_were_not_changed() -> None:
    engine = make_engine(Tiny(), precision="bf16")
    train(engine, 3)
    before = _masters(engine)
    engine.module.load_state_dict({k: v.clone() for k, v in engine.module.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(_masters(engine), before))


def test_a_copy_of_the_module_has_no_part_in_the_engine() -> None:
    engine = make_engine(Tiny(), offload="host thread")
    train(engine, 2)
    twin = copy.deepcopy(engine.module)
    before = weights(engine.module)
    twin.load_state_dict(Tiny(seed=9).state_dict())
    loss_of(twin, batch(0)).backward()
    assert all(torch.equal(w, before[name]) for name, w in weights(engine.module).items())
    assert not any(
        torch.equal(w, before[name]) for name, w in weights(twin).items() if "bias" not in name and "norm" not in name
    )
    engine.destroy()


def test_engine_answers_for_its_module() -> None:
    engine = make_engine(Tiny())
    assert engine.first is engine.module.first
    assert [id(p) for p in engine.parameters()] == [id(p) for p in engine.module.parameters()]
    assert engine.to("cpu", torch.float64) is engine
    assert next(engine.parameters()).dtype == torch.float32
    with pytest.raises(AttributeError):
        _ = engine.nothing_of_this_name


def test_after_destroy_the_module_trains_with_plain_torch_and_in_a_new_engine() -> None:
    engine = make_engine(Tiny(), offload="host thread")
    train(engine, 2)
    engine.destroy()
    engine.destroy()
    model = engine.module
    assert all(p.grad is None for p in model.parameters())
    twin = copy.deepcopy(model)
    reference = Reference(twin)
    again = make_engine(model)
    assert train(again, 3) == reference.train(3)
    _assert_same(again.module, twin)


@pytest.mark.parametrize(
    ("offload", "precision", "device", "host"),
    [
        ("none", "fp32", {"weights": 4, "gradients": 4, "master weights": 0, "moments": 8}, {}),
        ("none", "bf16", {"weights": 2, "gradients": 2, "master weights": 4, "moments": 8}, {}),
        ("cpu", "bf16", {"weights": 2, "gradients": 2}, {"master weights": 4, "moments": 8}),
    ],
)
def test_memory_report_counts_bytes_per_element(
    offload: str, precision: str, device: dict[str, int], host: dict[str, int]
) -> None:
    model = nn.Linear(64, 64, bias=False)
    engine = make_engine(model, offload=offload, precision=precision)
    report = engine.memory_report()
    assert report["device"] == {kind: size * 4096 for kind, size in device.items()}
    assert {kind: report["host"][kind] for kind in host} == {kind: size * 4096 for kind, size in host.items()}


def test_a_module_attached_later_is_put_into_evaluation_too() -> None:
    engine = make_engine(Tiny())
    engine.train()
    engine.module.adapter = nn.Dropout()
    engine.eval()
    assert not engine.module.adapter.training
    engine.train()
    assert all(module.training for module in engine.module.modules())
    engine.destroy()
