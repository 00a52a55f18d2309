"""Host updates of a device's weights, without a device: every stream's order is checked, alone and beside streaming.

As ``test_races.py``; here the host's own arithmetic has a place in the order too. It runs inside ``step``, where a
thread of its own would run it later, so what it waits for is all that orders it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_zero_plugin.engine import assembly, cut_copies, staging_room
from hf_zero_plugin.engine.buckets import cut_pieces
from hf_zero_plugin.engine.device_home import DeviceHome
from hf_zero_plugin.engine.loose_grads import LooseGrads
from hf_zero_plugin.engine.master_weights import Home
from hf_zero_plugin.engine.offload_host import HostHome, Job
from hf_zero_plugin.engine.offload_stream import StreamedHome
from hf_zero_plugin.engine.state_homes import interleaved
from hf_zero_plugin.errors import HfZeroError

from .races import RaceDetector
from .test_races import AFTER_STEP, WIDTH, Room, _engine, _train


class Beside(HostHome):
    """As if the weights were on a device and the arithmetic on a thread of its own."""

    detector: RaceDetector
    _on_cuda = True

    def run(self, job: Job) -> None:
        with torch.cuda.stream(self.detector.on_host):  # type: ignore[arg-type]
            super().run(job)


def _split(monkeypatch: pytest.MonkeyPatch, detector: RaceDetector, share: float, kept: int = 0) -> None:
    """Let the host have ``share`` of the pieces after the first ``kept``, which the device keeps; the rest streams."""
    monkeypatch.setattr(assembly, "BUCKET_NUMEL", WIDTH * WIDTH)
    monkeypatch.setattr(cut_copies, "MOST_BYTES", 1000)  # several a piece
    monkeypatch.setattr(staging_room, "allocated_bytes", Room(is_there=True))
    monkeypatch.setattr(staging_room, "capacity_bytes", lambda _: 2 * 10**15)

    def homes(parts: Any, settings: Any, context: Any, client: Any, layouts: Any) -> list[Home]:
        shards = [(layout, parts.sharding.shard_of(layout)) for layout in layouts]
        pieces = [piece for layout, shard in shards for piece in cut_pieces(layout, shard, max_numel=100)]
        hosted = interleaved(pieces[kept:], share)
        streamed = [piece for piece in pieces[kept:] if piece not in hosted]
        made: list[Home] = [DeviceHome(context, pieces[:kept]), StreamedHome(context, streamed, pin_memory=False)]
        beside = Beside(context, hosted, pin_memory=False, threaded=False)
        beside.detector = detector
        detector.harmless += [beside._tick]
        return [*made, beside]

    monkeypatch.setattr(assembly, "make_homes", homes)


def _beside(engine: Any) -> Beside:
    return next(home for home in engine.parts.masters.homes if isinstance(home, Beside))


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("kept", [0, 5])
@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16"}, {"precision": "fp32"}, {"precision": "fp16"}, {"precision": "bf16", "micros": 2}],
    ids=str,
)
def test_both_update_their_shares_and_change_nothing(
    options: dict[str, Any], kept: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = 2 if options["precision"] == "fp16" else None
    with RaceDetector() as detector:
        _split(monkeypatch, detector, 0.0, kept=10**6)  # the same pieces: kernels treat the ends of a tensor otherwise
        resident = _engine(device="none", **options)
        wanted = _train(resident, poison=poison)
        _split(monkeypatch, detector, share, kept)
        engine = _engine(device="cpu", **options)
        found = _train(engine, poison=poison)
        assert engine.skipped_steps == resident.skipped_steps == (poison is not None)
        assert len(_beside(engine).pieces) > 5
        engine.destroy()
    assert detector.races == []
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("looks", AFTER_STEP)
def test_whoever_looks_after_a_step_waits_for_both(looks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = _train(_engine("bf16", "none"), after_step=AFTER_STEP[looks])
    with RaceDetector() as detector:
        _split(monkeypatch, detector, 0.5)
        engine = _engine("bf16", "cpu")
        found = _train(engine, after_step=AFTER_STEP[looks])
        engine.destroy()
    assert detector.races == []
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_gradients_that_rest_on_the_host_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = _train(_engine("bf16", "none"))
    monkeypatch.setattr(LooseGrads, "is_on_host", True)  # as with weights that are offloaded too
    with RaceDetector() as detector:
        _split(monkeypatch, detector, 0.5)
        engine = _engine("bf16", "cpu")
        monkeypatch.setattr(_beside(engine), "_download", None)
        found = _train(engine)
        engine.destroy()
    assert detector.races == []
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_sums_that_nobody_announced_widen_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-steps by ``no_sync`` instead of gradient_accumulation_steps: in fp16 their sum would overflow."""
    results = []
    for device in ("none", "cpu"):
        with RaceDetector() as detector:
            _split(monkeypatch, detector, 0.5, kept=10**6 if device == "none" else 0)
            engine = _engine("fp16", device, grad_accum_dtype="fp32")
            generator = torch.Generator().manual_seed(0)
            for _ in range(3):
                x = torch.randn(3, WIDTH, generator=generator).half()
                with engine.no_sync():
                    engine.backward(engine(x).float().square().mean() * 40)
                engine.backward(engine(x).float().square().mean() * 40)
                engine.step()
                assert engine.skipped_steps == 0
            engine.synchronize()
            results.append([param.detach().clone() for param in engine.module.parameters()])
            engine.destroy()
        assert detector.races == []
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_error_while_a_step_is_launched_ends_the_training_and_hangs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with RaceDetector() as detector:
        _split(monkeypatch, detector, 0.5)
        engine = _engine("bf16", "cpu")
        _train(engine, 1)
        home = _beside(engine)
        download, last = home._download, len(home.pieces) - 1

        def fails(index: int, grad: Tensor) -> None:
            if index == last:
                raise torch.OutOfMemoryError("CUDA out of memory")
            download(index, grad)

        monkeypatch.setattr(home, "_download", fails)
        engine.backward(engine(torch.ones(3, WIDTH).bfloat16()).float().square().mean())
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
        for use in (engine.synchronize, engine.step, lambda: engine(torch.ones(3, WIDTH).bfloat16())):
            with pytest.raises(HfZeroError, match=r"interrupted by an error.*load a checkpoint"):
                use()
        slabs = _streamed(engine)._slabs
        before = [slab.numpy().copy() for slab in slabs]
        engine.destroy()
        assert all((a == b.numpy()).all() for a, b in zip(before, slabs, strict=True)), "nothing further is begun"
    assert detector.races == []


def _streamed(engine: Any) -> StreamedHome:
    return next(home for home in engine.parts.masters.homes if isinstance(home, StreamedHome))


def _nothing(*_: Any, **__: Any) -> None:
    return None


@pytest.mark.parametrize(
    "missing", ["gradients are computed", "gradients are down", "the numbers are down", "the forward pass waits"]
)
def test_a_missing_wait_is_found(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with RaceDetector() as detector:
        _split(monkeypatch, detector, 0.5)
        engine = _engine("fp16", "cpu")
        home = _beside(engine)
        if missing == "gradients are computed":
            home._copies.wait_stream = _nothing  # type: ignore[method-assign]
        if missing == "gradients are down":
            record = home._copies.record_event

            def unwaited(*args: Any) -> Any:
                event = record(*args)
                event.synchronize = _nothing  # type: ignore[method-assign]
                return event

            home._copies.record_event = unwaited  # type: ignore[method-assign]
        if missing == "the numbers are down":
            send = home._send_numbers

            def late(inputs: Any) -> None:
                copies, home._copies = home._copies, torch.cuda.Stream()
                send(inputs)
                home._copies = copies
                copies.wait_stream(torch.cuda.current_stream())

            home._send_numbers = late  # type: ignore[method-assign]
        if missing == "the forward pass waits":
            monkeypatch.setattr(Beside, "wait", _nothing)
        _train(engine, 3)
    assert detector.races


def test_sums_of_micro_steps_cross_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """And weights go up in their own type, in the same memory."""
    with RaceDetector() as detector:
        _split(monkeypatch, detector, 1.0)
        engines = {micros: _engine("bf16", "cpu", micros) for micros in (1, 2)}
        down: dict[int, Tensor] = {micros: _beside(engine)._carriers.down[0] for micros, engine in engines.items()}
        up = {micros: _beside(engine)._carriers.up[0] for micros, engine in engines.items()}
    assert [down[micros].dtype for micros in (1, 2)] == [torch.bfloat16, torch.float32]
    assert all(up[n].dtype == torch.bfloat16 and up[n].data_ptr() == down[n].data_ptr() for n in (1, 2))
    assert all(up[n].shape == down[n].shape for n in (1, 2))
