"""Stage 3 on a GPU: offloaded weights and states change nothing, waits are where they must be, memory is bounded.

Layers are wide and batches thin, so that gathers overtake updates by far: one missing wait and the weights differ.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_zero_plugin.engine import assembly, cut_copies, sharded_assembly, sharded_wiring, state_homes
from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.engine.offload_stream import StreamedHome
from hf_zero_plugin.integration.zero_api import GatheredParameters

from .stage3 import engine_for

pytestmark = pytest.mark.gpu

WIDTH, DEPTH = 1024, 10
LR = 1e-3
"""Of a training that stays in bounds: one that diverges makes a difference of any size out of one rounding."""
PLACES: dict[str, dict[str, Any]] = {
    "all on the device": {},
    "states streamed": {"states_on": "cpu"},
    "states on host threads": {"states_on": "cpu", "offload": {"step_on": "host"}},
    "weights offloaded": {"params_on": "cpu"},
    "both offloaded": {"params_on": "cpu", "states_on": "cpu"},
    "both offloaded, gradients too": {"params_on": "cpu", "states_on": "cpu", "gradients_on": "cpu"},
    "states updated by both": {"states_on": "cpu", "offload": {"step_on": "both", "host_share": 0.4}},
    "both offloaded, updated by both": {
        "params_on": "cpu",
        "states_on": "cpu",
        "offload": {"step_on": "both", "host_share": 0.4},
    },
    "both offloaded, gradients too, updated by both": {
        "params_on": "cpu",
        "states_on": "cpu",
        "gradients_on": "cpu",
        "offload": {"step_on": "both", "host_share": 0.4},
    },
    "both offloaded, host threads": {"params_on": "cpu", "states_on": "cpu", "offload": {"step_on": "host"}},
    "weights offloaded, half of the states": {"params_on": "cpu", "states_on": "cpu", "offload": {"ratio": 0.5}},
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self._gradient_checkpointing_func: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self._gradient_checkpointing_func is not None and self.training:
            return self._gradient_checkpointing_func(self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Wide(nn.Module):
    """The first and the last layer share their weight."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last.weight = self.first.weight
        if checkpointed:
            for layer in self.layers:
                layer._gradient_checkpointing_func = lambda *args: checkpoint(*args, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def _engine(
    precision: str = "bf16",
    *,
    whole: int = 4096,
    checkpointed: bool = False,
    gradients_on: str = "cuda",
    **options: Any,
) -> ZeroEngine:
    model = Wide(checkpointed=checkpointed)
    share = sharded_wiring.DEVICE_SHARE if gradients_on == "cuda" else 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_wiring, "DEVICE_SHARE", share)
        return engine_for(model, precision=precision, whole=whole, device="cuda", **{"lr": LR, **options})


def _train(engine: ZeroEngine, steps: int = 8, rows: int = 2) -> list[float]:
    dtype = engine.parts.params[-1].dtype
    losses = []
    for step in range(steps):
        x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(step)).to("cuda", dtype)
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.synchronize()
    return losses


def _weights(engine: ZeroEngine) -> dict[str, Tensor]:
    return engine._zero3_consolidated_16bit_state_dict()


@pytest.fixture(autouse=True)
def tiny_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "BUCKET_NUMEL", 2 * WIDTH * WIDTH)
    monkeypatch.setattr(sharded_assembly, "BUCKET_NUMEL", 2 * WIDTH * WIDTH)
    monkeypatch.setattr(state_homes, "STREAM_PIECE_NUMEL", WIDTH * WIDTH // 2)
    monkeypatch.setattr(cut_copies, "MOST_BYTES", 10**6)  # several a piece


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("place", PLACES)
def test_equals_stage_2(place: str, precision: str) -> None:
    """Host kernels round otherwise than the device's: like is held against like."""
    asked = PLACES[place].get("offload", {})
    oracle = {"states_on": "cpu", "offload": asked} if "step_on" in asked else {}
    wanted, found = _engine(precision, stage=2, **oracle), _engine(precision, **PLACES[place])
    losses = _train(wanted)
    assert _train(found) == pytest.approx(losses, rel=2e-2 if precision != "fp32" else 1e-4)
    for name, tensor in _weights(wanted).items():
        difference = (tensor.float() - _weights(found)[name].float()).abs().mean()
        assert difference < (1e-5 if precision == "fp32" else 2e-3), name
    found.destroy()


@pytest.mark.parametrize("place", PLACES)
def test_overlapped_equals_a_barrier_after_every_step(place: str) -> None:
    """To the bit: the same kernels in the same order, with and without waiting in between."""
    free, barred = _engine(**PLACES[place]), _engine(**PLACES[place])
    step = barred.step

    def step_and_wait() -> None:
        step()
        barred.synchronize()
        torch.cuda.synchronize()

    barred.step = step_and_wait  # type: ignore[method-assign]
    assert _train(free) == _train(barred)
    ours, theirs = _weights(free), _weights(barred)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("place", PLACES)
def test_weights_read_right_after_a_step_are_new(place: str) -> None:
    engine = _engine(**PLACES[place])
    for step in range(3):
        x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(step)).to("cuda", torch.bfloat16)
        engine.backward(engine(x).float().square().mean())
        engine.step()
        weight = engine.module.layers[3].linear.weight
        with GatheredParameters(weight):
            seen = weight.data.clone()
        engine.synchronize()
        torch.cuda.synchronize()
        with GatheredParameters(weight):
            assert torch.equal(weight.data, seen)
    engine.destroy()


@pytest.mark.parametrize("place", PLACES)
def test_accumulation_in_fp32_over_bf16_micro_steps(place: str) -> None:
    wanted, found = _engine(stage=2, micros=3), _engine(micros=3, **PLACES[place])
    assert _train(found, 9) == pytest.approx(_train(wanted, 9), rel=2e-2)
    assert found.global_steps == 3
    found.destroy()


def test_checkpoint_moves_between_places(tmp_path: Any) -> None:
    first = _engine(params_on="cpu", states_on="cpu")
    _train(first, 4)
    first.save_checkpoint(str(tmp_path))
    wanted = _train(first, 3)
    for place in PLACES.values():
        second = _engine(**place)
        second.load_checkpoint(str(tmp_path))
        assert _train(second, 3) == pytest.approx(wanted, rel=1e-2)
        second.destroy()


@pytest.mark.parametrize("place", ["both offloaded", "both offloaded, gradients too", "both offloaded, host threads"])
def test_offloaded_weights_leave_the_device(place: str) -> None:
    """Between steps nothing of the layers is on the device but what is meant to be; in training, a few at a time."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine = _engine(**PLACES[place], stage3={"max_live_parameters": 0, "prefetch_bucket_size": 0})
    _train(engine, 2)
    torch.cuda.synchronize()
    num = sum(layout.padded_numel for layout in engine.parts.layouts)
    stays = 2 * num if place == "both offloaded" else 0
    assert torch.cuda.memory_allocated() - before < stays + 2 * num // 4
    torch.cuda.reset_peak_memory_stats()
    _train(engine, 2)
    one = 2 * WIDTH * (WIDTH + 1)
    homes = engine.parts.masters.homes if engine.parts.masters is not None else []
    staging = sum(home.staging_bytes for home in homes if isinstance(home, StreamedHome))
    assert torch.cuda.max_memory_allocated() - before < stays + staging + 9 * one + 16 * 2**20
    engine.destroy()


@pytest.mark.parametrize("place", ["both offloaded", "both offloaded, gradients too"])
def test_no_pass_waits_on_the_host(place: str) -> None:
    """Forward and backward queue everything; the host looks at the device once, when the step reads the norm."""
    engine = _engine(**PLACES[place])
    _train(engine, 2)
    x = torch.randn(2, WIDTH, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.backward(engine(x).float().square().mean())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        engine.step()
    engine.destroy()


def test_weights_of_a_unit_are_up_before_the_unit_in_front_of_it_ends() -> None:
    engine = _engine(params_on="cpu", states_on="cpu")
    _train(engine, 2)
    engine.synchronize()
    assert engine.parts.shards is not None
    stream = engine.parts.shards.transfers._stream
    arrived, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    second = engine.module.layers[1]

    def note(*_: Any) -> None:
        arrived.record(stream)  # behind the copies of the third layer, which were queued before this hook

    def slow(*_: Any) -> None:
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        ended.record()

    handles = [second.register_forward_pre_hook(note), second.linear.register_forward_hook(slow)]
    engine(torch.randn(2, WIDTH, device="cuda", dtype=torch.bfloat16))
    torch.cuda.synchronize()
    for handle in handles:
        handle.remove()
    assert arrived.elapsed_time(ended) > 20
    engine.destroy()


def test_checkpointed_inputs_rest_on_the_host() -> None:
    wanted = _engine(checkpointed=True)
    found = _engine(checkpointed=True, cpu_checkpointing=True)
    assert _train(found, 4, rows=4096) == _train(wanted, 4, rows=4096)
    assert found._activations is not None
    assert found._activations.num_packed > 0
    peaks = []
    for engine in (wanted, found):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        _train(engine, 2, rows=16384)
        peaks.append(torch.cuda.max_memory_allocated() - base)
    one_input = 16384 * WIDTH * 2
    assert peaks[1] < peaks[0] - (DEPTH - 4) * one_input
    found.destroy()
