"""On a GPU: offloaded states, streamed through the device or updated by host threads, change nothing.

The model has terrible arithmetic density (large layers, two rows of input) and tiny buckets, so that the next forward
pass overtakes the update by far: one missing wait and the weights differ.
"""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_zero_plugin.config.settings import (
    EngineSettings,
    LossScaleSettings,
    OffloadOptimizerSettings,
    OptimizerSettings,
)
from hf_zero_plugin.engine import assembly, cut_copies, state_homes
from hf_zero_plugin.engine.engine import ZeroEngine

pytestmark = pytest.mark.gpu

WIDTH, DEPTH = 1024, 12


class Wide(nn.Module):
    """Thin work over many weights; the first and the last layer share theirs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.last.weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.last(self.norm(x))


def _groups(model: nn.Module) -> list[dict]:
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _engine(
    precision: str,
    device: str,
    step_on: str = "auto",
    optimizer: str = "AdamW",
    types: dict[str, str] | None = None,
    **offload: object,
) -> ZeroEngine:
    settings = EngineSettings(
        stage=2,
        precision=precision,  # type: ignore[arg-type]
        loss_scale=LossScaleSettings(initial_scale_power=12, window=8) if precision == "fp16" else None,
        gradient_clipping=0.7,
        optimizer=OptimizerSettings(type=optimizer, params={"lr": 1e-2}),
        offload_optimizer=OffloadOptimizerSettings(device=device, step_on=step_on, **offload),  # type: ignore[arg-type]
        **(types or {}),  # type: ignore[arg-type]
    )
    model = Wide()
    return ZeroEngine(model, settings, device=torch.device("cuda"), param_groups=_groups(model))


def _train(engine: ZeroEngine, steps: int = 12, poison: int | None = None) -> list[float]:
    dtype = next(engine.module.parameters()).dtype
    losses = []
    for step in range(steps):
        x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(step)).to("cuda", dtype)
        loss = engine(x).float().square().mean()
        if step == poison:
            loss = loss * float("inf")
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.synchronize()
    return losses


def _weights(engine: ZeroEngine) -> list[Tensor]:
    return [p.detach().clone() for p in engine.module.parameters()]


@pytest.fixture(autouse=True)
def tiny_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "BUCKET_NUMEL", 2 * WIDTH * WIDTH)
    monkeypatch.setattr(state_homes, "STREAM_PIECE_NUMEL", WIDTH * WIDTH // 2)
    monkeypatch.setattr(cut_copies, "MOST_BYTES", 10**6)  # several a piece


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("poison", [None, 4])
def test_streamed_equals_resident_to_the_bit(precision: str, poison: int | None) -> None:
    resident, streamed = _engine(precision, "none"), _engine(precision, "cpu")
    assert _train(resident, poison=poison) == pytest.approx(_train(streamed, poison=poison), nan_ok=True, abs=0)
    for a, b in zip(_weights(resident), _weights(streamed)):
        assert torch.equal(a, b)
    assert resident.skipped_steps == streamed.skipped_steps == (0 if poison is None else 1)
    streamed.destroy()


@pytest.mark.parametrize("poison", [None, 4])
@pytest.mark.parametrize("step_on", ["host", "both"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_host_update_agrees_with_resident(precision: str, step_on: str, poison: int | None) -> None:
    """Host and device kernels round differently in the last bit, so not to the bit."""
    resident, host = _engine(precision, "none"), _engine(precision, "cpu", step_on)
    _train(resident, 6, poison)
    _train(host, 6, poison)
    assert resident.skipped_steps == host.skipped_steps == (0 if poison is None else 1)
    for a, b in zip(_weights(resident), _weights(host)):
        assert (a.float() - b.float()).abs().mean() < 1e-3
    host.destroy()


@pytest.mark.parametrize("step_on", ["device", "host", "both"])
def test_overlapped_host_equals_inline_host(step_on: str) -> None:
    """The same update with a full barrier after every step gives the same bits."""
    free, barred = _engine("bf16", "cpu", step_on), _engine("bf16", "cpu", step_on)
    step = barred.step

    def step_and_wait() -> None:
        step()
        barred.synchronize()

    barred.step = step_and_wait  # type: ignore[method-assign]
    assert _train(free) == _train(barred)
    for a, b in zip(_weights(free), _weights(barred)):
        assert torch.equal(a, b)
    free.destroy()
    barred.destroy()


@pytest.mark.parametrize("step_on", ["device", "host", "both"])
@pytest.mark.parametrize("look", ["parameters", "state_dict", "deepcopy"])
def test_weights_read_right_after_step_are_new(step_on: str, look: str) -> None:
    engine = _engine("bf16", "cpu", step_on)
    for step in range(4):
        x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(step)).to("cuda", torch.bfloat16)
        engine.backward(engine(x).float().square().mean())
        engine.step()
        if look == "parameters":
            seen = [p.detach().clone() for p in engine.module.parameters()]
        elif look == "state_dict":
            seen = [v.clone() for k, v in engine.module.state_dict().items() if k != "last.weight"]
        else:
            list(engine.module.parameters())
            seen = [p.detach() for p in copy.deepcopy(engine.module).parameters()]
        engine.synchronize()
        later = list(engine.module.parameters())
        assert len(seen) == len(later)
        assert all(torch.equal(a, b) for a, b in zip(seen, later))
    engine.destroy()


@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_ratio_changes_nothing(ratio: float) -> None:
    whole, split = _engine("fp16", "cpu"), _engine("fp16", "cpu", ratio=ratio)
    assert _train(whole) == _train(split)
    for a, b in zip(_weights(whole), _weights(split)):
        assert torch.equal(a, b)
    assert split.memory_report()["device"].get("moments", 0) > 0
    whole.destroy()
    split.destroy()


@pytest.mark.parametrize(("master", "state"), [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
def test_narrow_masters_and_states_stream_too(master: str, state: str) -> None:
    types = {"master_dtype": master, "optimizer_state_dtype": state}
    resident, streamed = _engine("bf16", "none", types=types), _engine("bf16", "cpu", types=types)
    assert _train(resident, 6) == _train(streamed, 6)
    for a, b in zip(_weights(resident), _weights(streamed)):
        assert torch.equal(a, b)
    each = {"bf16": 2, "fp32": 4}
    host = streamed.memory_report()["host"]
    assert host["moments"] / host["master weights"] == 2 * each[state] / each[master]
    streamed.destroy()


def test_states_on_nvme_equal_states_in_host_memory(tmp_path: Path) -> None:
    on_disk = {"nvme_path": str(tmp_path), "pipeline_read": True, "pipeline_write": True}
    memory, disk = _engine("bf16", "cpu", "host"), _engine("bf16", "nvme", **on_disk)
    assert _train(memory, 6) == _train(disk, 6)
    for a, b in zip(_weights(memory), _weights(disk)):
        assert torch.equal(a, b)
    memory.destroy()
    disk.destroy()


@pytest.mark.parametrize("optimizer", ["Lion", "Adagrad", "SGD"])
def test_other_rules_stream_too(optimizer: str) -> None:
    resident, streamed = _engine("bf16", "none", optimizer=optimizer), _engine("bf16", "cpu", optimizer=optimizer)
    assert _train(resident, 6) == _train(streamed, 6)
    for a, b in zip(_weights(resident), _weights(streamed)):
        assert torch.equal(a, b)
    streamed.destroy()


def test_bf16_with_fp32_masters_equals_a_plain_reference() -> None:
    """torch AdamW on fp32 copies, gradients from the bf16 model: the same bits."""
    engine = _engine("bf16", "cpu")
    model = Wide().cuda().bfloat16()
    masters = [p.detach().clone().float() for p in Wide().cuda().parameters()]
    for p, master in zip(model.parameters(), masters):
        p.data.copy_(master)
    groups = _groups(model)
    by_id = {id(p): nn.Parameter(m) for p, m in zip(model.parameters(), masters)}
    reference = torch.optim.AdamW(
        [{**g, "params": [by_id[id(p)] for p in g["params"]]} for g in groups], lr=1e-2, fused=True
    )
    for step in range(8):
        x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(step)).to("cuda", torch.bfloat16)
        loss = model(x).float().square().mean()
        loss.backward()
        for p in model.parameters():
            by_id[id(p)].grad = p.grad.float()
            p.grad = None
        torch.nn.utils.clip_grad_norm_(list(by_id.values()), 0.7)
        reference.step()
        for p in model.parameters():
            p.data.copy_(by_id[id(p)])
        engine.backward(engine(x).float().square().mean())
        engine.step()
    engine.synchronize()
    for (name, a), b in zip(engine.module.named_parameters(), model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    engine.destroy()


def test_checkpoint_of_streamed_states_resumes_to_the_bit(tmp_path) -> None:
    first, second = _engine("bf16", "cpu"), _engine("bf16", "none")
    _train(first, 5)
    first.save_checkpoint(str(tmp_path))
    second.load_checkpoint(str(tmp_path))
    assert _train(first, 3) == _train(second, 3)
    for a, b in zip(_weights(first), _weights(second)):
        assert torch.equal(a, b)
    first.destroy()


def test_peak_memory_is_weights_gradients_and_slots() -> None:
    """Device memory by formula: 2 + 2 bytes a parameter, two slots, activations of two rows."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine = _engine("bf16", "cpu")
    torch.cuda.reset_peak_memory_stats()
    _train(engine, 3)
    num = sum(layout.padded_numel for layout in engine.parts.layouts)
    slots = 2 * 4 * (WIDTH * WIDTH // 2) * 4
    allowed = before + 4 * num + slots + 16 * 2**20
    assert torch.cuda.max_memory_allocated() <= allowed
    report = engine.memory_report()
    assert report["host"]["master weights"] == 4 * num
    assert report["host"]["moments"] == 8 * num
    engine.destroy()


@pytest.mark.parametrize("waits", [True, False])
def test_states_staged_in_the_memory_of_activations_change_nothing_and_cost_no_peak(waits: bool) -> None:
    """Many rows: the backward pass frees far more than the states take, so half of them are on the device in time.

    Without waiting, what is still on its way down while the next forward pass runs comes on top, and nothing else.
    """

    def train(device: str) -> tuple[list[Tensor], int, int]:
        gc.collect()  # what others have left would be counted now and freed later
        torch.cuda.empty_cache()
        engine = _engine("bf16", device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for step in range(6):
            x = torch.randn(16384, WIDTH, generator=torch.Generator().manual_seed(step)).to("cuda", torch.bfloat16)
            engine.backward(engine(x).float().square().mean())
            engine.step()
            if waits:
                engine.synchronize()
        engine.synchronize()
        staged = engine.memory_report()["device"].get("buffers", 0)
        weights, peak = _weights(engine), torch.cuda.max_memory_allocated() - before
        engine.destroy()
        return weights, peak, staged

    resident, peak_resident, _ = train("none")
    streamed, peak_streamed, staged = train("cpu")
    assert all(torch.equal(a, b) for a, b in zip(resident, streamed))
    num_states = 3 * 4 * sum(p.numel() for p in Wide().parameters())
    assert staged > 0.4 * num_states
    slot = 3 * 4 * WIDTH * WIDTH // 2
    on_its_way = 0 if waits else num_states // 2
    assert peak_streamed <= peak_resident + on_its_way + 4 * slot
