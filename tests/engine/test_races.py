"""States that stream through the device, without a device: every stream's order is checked, and nothing is changed.

The CPU stands in for the GPU; ``races.py`` holds every access to memory against what events and waits have ordered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_zero_plugin.config.settings import (
    EngineSettings,
    LossScaleSettings,
    OffloadOptimizerSettings,
    OptimizerSettings,
)
from hf_zero_plugin.engine import assembly, cut_copies, staging_room, state_homes
from hf_zero_plugin.engine.buckets import cut_pieces
from hf_zero_plugin.engine.cut_copies import CutCopies
from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.engine.leaving import LeavingBuffer, LeavingBuffers
from hf_zero_plugin.engine.offload_stream import StreamedHome
from hf_zero_plugin.errors import HfZeroError

from .races import RaceDetector

WIDTH, DEPTH = 16, 8
TAKE_FIRST = LeavingBuffers.take_first


class Model(nn.Module):
    """The first and the last layer share their weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.last = nn.Linear(WIDTH, WIDTH)
        self.last.weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.last(x)


class Room:
    """What the device's allocator is said to hold: less and less, as when a backward pass frees memory, or the same."""

    def __init__(self, is_there: bool) -> None:
        self._freed = 10**7 if is_there else 0
        self._allocated = 10**15

    def __call__(self, device: torch.device) -> int:
        self._allocated -= self._freed
        return self._allocated


@pytest.fixture(autouse=True)
def tiny_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "BUCKET_NUMEL", WIDTH * WIDTH)
    monkeypatch.setattr(cut_copies, "MOST_BYTES", 1000)  # several a piece


def _stream_on_the_cpu(monkeypatch: pytest.MonkeyPatch, *, room: bool) -> None:
    def home(context: Any, pieces: Any, **_: Any) -> StreamedHome:
        return StreamedHome(context, pieces, pin_memory=False)

    monkeypatch.setattr(state_homes, "HostHome", home)
    monkeypatch.setattr(staging_room, "allocated_bytes", Room(room))
    monkeypatch.setattr(staging_room, "capacity_bytes", lambda _: 2 * 10**15)


def _homes(engine: ZeroEngine) -> list[StreamedHome]:
    assert engine.parts.masters is not None
    return [home for home in engine.parts.masters.homes if isinstance(home, StreamedHome)]


def _engine(
    precision: str, device: str, micros: int = 1, grad_accum_dtype: str | None = None, **offload: Any
) -> ZeroEngine:
    settings = EngineSettings(
        stage=2,
        precision=precision,  # type: ignore[arg-type]
        loss_scale=LossScaleSettings(initial_scale_power=8, window=4) if precision == "fp16" else None,
        gradient_clipping=0.7,
        gradient_accumulation_steps=micros,
        grad_accum_dtype=grad_accum_dtype,  # type: ignore[arg-type]
        optimizer=OptimizerSettings(type="AdamW", params={"lr": 1e-2}),
        offload_optimizer=OffloadOptimizerSettings(device=device, **offload),  # type: ignore[arg-type]
    )
    model = Model()
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return ZeroEngine(model, settings, device=torch.device("cpu"), param_groups=groups)


def _train(
    engine: ZeroEngine,
    steps: int = 6,
    poison: int | None = None,
    after_step: Callable[[ZeroEngine], object] = lambda _: None,
    first: int = 0,
) -> list[Tensor]:
    micros = engine.gradient_accumulation_steps()
    dtype = next(engine.module.parameters()).dtype
    for step in range(first, first + steps):
        for micro in range(micros):
            generator = torch.Generator().manual_seed(step * micros + micro)
            loss = engine(torch.randn(3, WIDTH, generator=generator).to(dtype)).float().square().mean()
            engine.backward(loss * float("inf") if step == poison else loss)
            engine.step()
        after_step(engine)
    engine.synchronize()
    return [param.detach().clone() for param in engine.module.parameters()]


def _weights_are_read(engine: ZeroEngine) -> object:
    return [param.sum() for param in engine.module.parameters()]


AFTER_STEP: dict[str, Callable[[ZeroEngine], object]] = {
    "nothing": lambda _: None,
    "zero_grad": ZeroEngine.zero_grad,
    "weights are read": _weights_are_read,
    "states are read": lambda engine: (
        [home.tensors(0)["master"].sum() for home in engine.parts.masters.homes]
        if engine.synchronize() is None and engine.parts.masters is not None
        else None
    ),
    "weights are changed": lambda engine: (
        [param.data.mul_(0.5) for param in engine.module.parameters()],
        engine.refresh_master_weights(),
    ),
}


@pytest.mark.parametrize("room", [False, True], ids=["no room", "room"])
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"precision": "fp32"},
        {"precision": "fp16"},
        {"precision": "bf16", "ratio": 0.5},
        {"precision": "bf16", "micros": 2},
    ],
    ids=str,
)
def test_streams_are_ordered_and_change_nothing(
    options: dict[str, Any], room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = 2 if options["precision"] == "fp16" else None
    resident = {name: value for name, value in options.items() if name != "ratio"}
    wanted = _train(_engine(device="none", **resident), poison=poison)
    _stream_on_the_cpu(monkeypatch, room=room)
    with RaceDetector(sees_ends=not room) as detector:
        engine = _engine(device="cpu", **options)
        found = _train(engine, poison=poison)
        (home,) = _homes(engine)
        least = home._longest * (4 + home._bytes_each) * 2
        engine.destroy()
    assert detector.races == []
    assert detector.num_side_operations > 100
    assert (home.staging_bytes > least) == room
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("looks", AFTER_STEP)
def test_whoever_looks_after_a_step_waits(looks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = _train(_engine("bf16", "none"), after_step=AFTER_STEP[looks])
    _stream_on_the_cpu(monkeypatch, room=True)
    with RaceDetector() as detector:
        engine = _engine("bf16", "cpu")
        found = _train(engine, after_step=AFTER_STEP[looks])
        engine.destroy()
    assert detector.races == []
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_a_checkpoint_is_complete_right_after_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = _train(_engine("bf16", "none"), 4)
    _stream_on_the_cpu(monkeypatch, room=True)
    with RaceDetector() as detector:
        first = _engine("bf16", "cpu")
        _train(first, 3, after_step=lambda engine: engine.save_checkpoint(str(tmp_path)))
        second = _engine("bf16", "cpu")
        second.load_checkpoint(str(tmp_path))
        generator = torch.Generator().manual_seed(3)
        second.backward(second(torch.randn(3, WIDTH, generator=generator).bfloat16()).float().square().mean())
        second.step()
        second.synchronize()
    assert detector.races == []
    assert all(torch.equal(a, b) for a, b in zip(wanted, second.module.parameters(), strict=True))


def test_buffers_on_their_way_down_make_no_room_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that is slower than the step: what one step has staged is still there when the next backward begins."""
    _stream_on_the_cpu(monkeypatch, room=True)
    with RaceDetector(sees_ends=False):
        engine = _engine("bf16", "cpu")
        (home,) = _homes(engine)
        _train(engine, 2)
        leaving = home._leaving.num_bytes
        assert leaving > 0
        monkeypatch.setattr(staging_room, "allocated_bytes", lambda _: 5000 + leaving)
        home.start_backward()
        assert home._room.ceiling == 5000
        assert home._room.most_held == leaving > 0.2 * 5000, "they were there all the time"
        engine.destroy()


@pytest.mark.parametrize("room", [False, True], ids=["no room", "room"])
def test_a_slow_link_costs_the_memory_of_one_step(room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers on their way down are filled again before there are new ones."""
    _stream_on_the_cpu(monkeypatch, room=room)
    with RaceDetector(sees_ends=False) as detector:
        engine = _engine("bf16", "cpu")
        _train(engine, 1)
        (home,) = _homes(engine)
        after_one = home.staging_bytes
        _train(engine, 3)
        assert home.staging_bytes == after_one
        engine.destroy()
    assert detector.races == []


def _without_waiting_for_the_update(home: StreamedHome, bucket: int) -> None:
    return None


def _stage_all(home: StreamedHome) -> None:
    home._max_ahead = len(home.pieces)


@pytest.mark.parametrize("change", ["all are staged", "none is held", "the device is full"])
def test_other_amounts_of_memory_are_ordered_too(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = _train(_engine("bf16", "none"))
    _stream_on_the_cpu(monkeypatch, room=True)
    if change == "none is held":
        monkeypatch.setattr(staging_room, "HELD_SHARE", 0)
    if change == "the device is full":
        monkeypatch.setattr(staging_room, "capacity_bytes", lambda _: 10**15)
    with RaceDetector(sees_ends=False) as detector:
        engine = _engine("bf16", "cpu")
        (home,) = _homes(engine)
        if change == "all are staged":
            _stage_all(home)
        found = _train(engine)
        least = home._longest * (4 + home._bytes_each) * 2
        engine.destroy()
    assert detector.races == []
    assert (home.staging_bytes == least) == (change == "the device is full")
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


class Always:
    """An event that has always been."""

    def __init__(self) -> None:
        self.clock: dict[str, int] = {}

    def query(self) -> bool:
        return False


def _at_once(leaving: LeavingBuffers, num_bytes: int, among: set[int] | None = None, **_: Any) -> LeavingBuffer | None:
    """The last one that fits, without waiting."""
    fits = [one.numel() >= num_bytes and (among is None or id(one) in among) for one in leaving.buffers]
    at = max((at for at, it_fits in enumerate(fits) if it_fits), default=None)
    if at is None:
        return None
    one = leaving._buffers[at]
    del leaving._buffers[at]
    return one._replace(downloaded=Always())  # type: ignore[arg-type]


def _not_ahead(
    leaving: LeavingBuffers, num_bytes: int, among: set[int] | None = None, **_: Any
) -> LeavingBuffer | None:
    return TAKE_FIRST(leaving, num_bytes, among=among) if among is not None else None


def _at_once_ahead(leaving: LeavingBuffers, num_bytes: int, among: set[int] | None = None, **rest: Any) -> Any:
    if among is not None:
        return TAKE_FIRST(leaving, num_bytes, among=among)
    return _at_once(leaving, num_bytes, **rest)


def _at_once_after(leaving: LeavingBuffers, num_bytes: int, among: set[int] | None = None, **rest: Any) -> Any:
    if among is None:
        return TAKE_FIRST(leaving, num_bytes, **rest)
    return _at_once(leaving, num_bytes, among)


@pytest.mark.parametrize(
    "missing",
    [
        "the forward pass waits",
        "staged states have left",
        "slots wait for gradients",
        "slots wait for states",
        "memory is free before states come",
        "states are new before they leave",
        "cuts wait for each other",
        "buffers filled after the step are empty",
        "buffers filled ahead are empty",
    ],
)
def test_a_missing_wait_is_found(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the detector is worth: each wait of the engine, taken away, is a race."""
    _stream_on_the_cpu(monkeypatch, room=True)
    if missing == "the forward pass waits":
        monkeypatch.setattr(StreamedHome, "wait", _without_waiting_for_the_update)
    with RaceDetector() as detector:
        engine = _engine("bf16", "cpu")
        if missing == "slots wait for gradients":
            for slot in _homes(engine)[0]._slots:
                slot.wait_stream = lambda other: None  # type: ignore[method-assign]
        if missing == "slots wait for states":
            for slot in _homes(engine)[0]._slots:
                slot.wait_event = lambda event: None  # type: ignore[method-assign]
        if missing == "memory is free before states come":
            bring = StreamedHome._bring
            monkeypatch.setattr(StreamedHome, "_bring", lambda self, *args: bring(self, *args[:2], args[-1]))
        if missing == "staged states have left":
            after = StreamedHome._return

            def forget(self: StreamedHome, index: int, buffer: Tensor) -> None:
                after(self, index, buffer)
                del self._returned[index]

            monkeypatch.setattr(StreamedHome, "_return", forget)
            # Whoever is given a buffer that was downloaded from waits as well.
            monkeypatch.setattr(LeavingBuffers, "take_first", _not_ahead)
            _stage_all(_homes(engine)[0])
        if missing == "states are new before they leave":
            download = StreamedHome._download
            monkeypatch.setattr(StreamedHome, "_download", lambda *args: download(*args[:-1], Always()))  # type: ignore[arg-type]
        if missing == "cuts wait for each other":
            monkeypatch.setattr(CutCopies, "_last", property(lambda _: None, lambda *_: None), raising=False)
        if missing == "buffers filled after the step are empty":
            monkeypatch.setattr(LeavingBuffers, "take_first", _at_once_after)
        if missing == "buffers filled ahead are empty":
            monkeypatch.setattr(LeavingBuffers, "take_first", _at_once_ahead)
        _train(engine)
    assert detector.races


def _full(*_: Any, **__: Any) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_full_device_loses_no_buffer_that_is_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the two buffers that a step needs there is an error, and what is on its way down stays where it is."""
    _stream_on_the_cpu(monkeypatch, room=True)
    with RaceDetector(sees_ends=False) as detector:
        engine = _engine("bf16", "cpu")
        (home,) = _homes(engine)
        _train(engine, 1)
        leaving = [id(buffer) for buffer in home._leaving.buffers]
        home.start_backward()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", _full)
            patch.setattr(LeavingBuffers, "take_first", _not_ahead)
            with pytest.raises(torch.OutOfMemoryError):
                home.prefetch()
        assert [id(buffer) for buffer in home._leaving.buffers] == leaving and leaving
        assert not home._staged
        _train(engine, 2)
        engine.destroy()
    assert detector.races == []


def _have_ended(detector: RaceDetector, *streams: Any) -> bool:
    """Whether the host has waited for all that is queued."""
    return all(detector.host.get(name, 0) >= count for one in streams for name, count in one.clock.items())


@contextmanager
def _within_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RaceDetector, StreamedHome]]:
    """After three steps, with room. Three more follow, without races, and give the weights of six in a row."""
    wanted = _train(_engine("bf16", "none"))
    _stream_on_the_cpu(monkeypatch, room=True)
    with RaceDetector(sees_ends=False) as detector:
        engine = _engine("bf16", "cpu")
        (home,) = _homes(engine)
        _train(engine, 3)
        home.start_backward()
        yield detector, home
        found = _train(engine, 3, first=3)
        engine.destroy()
    assert detector.races == []
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_states_that_were_fetched_for_nothing_have_come_before_their_memory_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with _within_a_backward_pass(monkeypatch) as (detector, home):
        home.prefetch()
        assert home._staged and not _have_ended(detector, *home._uploads._streams)
        home.forget_prefetched()
        assert not home._staged and _have_ended(detector, *home._uploads._streams)


def test_an_error_while_states_are_fetched_frees_nothing_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with _within_a_backward_pass(monkeypatch) as (detector, home):
        upload = home._upload

        def interrupted(index: int, buffer: Tensor, *after: Any) -> Any:
            if index == 1:
                raise KeyboardInterrupt
            return upload(index, buffer, *after)

        home._upload = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            home.prefetch()
        assert not home._staged and _have_ended(detector, *home._uploads._streams, *home._downloads._streams)
        del home._upload


def test_a_device_whose_free_memory_is_in_pieces_stages_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    with _within_a_backward_pass(monkeypatch) as (_, home):
        _stage_all(home)
        there = len(home._leaving.buffers)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", _full)
            home.prefetch()
        assert 2 <= len(home._staged) <= there < len(home.pieces)


def test_an_interrupted_update_frees_nothing_that_is_in_use_and_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _stream_on_the_cpu(monkeypatch, room=False)
    with RaceDetector(sees_ends=False) as detector:
        engine = _engine("bf16", "cpu")
        (home,) = _homes(engine)
        _train(engine, 1)
        original, last = home._update, len(home.pieces) - 1

        def update(index: int, *rest: Any) -> None:
            if index == last:
                raise torch.OutOfMemoryError("CUDA out of memory")
            original(index, *rest)

        home._update = update  # type: ignore[method-assign]
        engine.backward(engine(torch.randn(3, WIDTH).bfloat16()).float().square().mean())
        engine.step()
        with pytest.raises(torch.OutOfMemoryError):
            engine.synchronize()
        assert _have_ended(detector, *home._slots, *home._uploads._streams, *home._downloads._streams)
        with pytest.raises(HfZeroError, match=r"interrupted by an error.*load a checkpoint"):
            engine(torch.randn(3, WIDTH).bfloat16())
        del home._update


def test_pieces_wait_for_buffers_in_the_order_in_which_these_become_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for a buffer that is empty late would hold up all that come after it, whatever their sizes."""
    monkeypatch.setattr(state_homes, "cut_pieces", lambda *args, **_: cut_pieces(*args, max_numel=200))
    _stream_on_the_cpu(monkeypatch, room=True)
    with RaceDetector(sees_ends=False):
        engine = _engine("bf16", "cpu")
        (home,) = _homes(engine)
        assert len({piece.numel for piece in home.pieces}) > 1
        _train(engine, 4)
        home.start_backward()
        place = {id(buffer): at for at, buffer in enumerate(home._leaving.buffers)}
        home.prefetch()
        places = [place.get(id(buffer)) for buffer in home._staged.values()]
        assert len(places) > 3 and places == sorted(places, key=lambda at: -1 if at is None else at)
        engine.destroy()


def test_the_buffer_that_is_empty_first_is_taken_within_bounds() -> None:
    leaving = LeavingBuffers()
    buffers = [torch.empty(size) for size in (4, 9, 6, 9)]
    for buffer in buffers:
        leaving.add(buffer, Always())  # type: ignore[arg-type]

    def take(*args: Any, **bounds: Any) -> int | None:
        one = leaving.take_first(*args, **bounds)
        return next((at for at, buffer in enumerate(buffers) if one is not None and one.buffer is buffer), None)

    assert take(5, below=9) == 2
    assert take(5, below=9) is None
    assert take(5, among={id(buffers[3])}) == 3
    assert take(5) == 1
    assert take(5) is None and take(4) == 0


def test_a_short_piece_takes_a_large_buffer_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = _train(_engine("bf16", "none"), 6)
    _stream_on_the_cpu(monkeypatch, room=True)
    with RaceDetector(sees_ends=False) as detector:
        engine = _engine("bf16", "cpu")
        (home,) = _homes(engine)
        whole = home._capacity(0)
        assert home._capacity(2) < whole, "pieces of this model are short beside its first"
        _train(engine, 3)
        _stage_all(home)
        home.start_backward()
        large = [one for one in home._leaving._buffers if one.buffer.numel() == whole]
        large += [one._replace(buffer=torch.empty(whole, dtype=torch.uint8)) for one in large]
        home._leaving = LeavingBuffers(deque(large))
        home._room.ceiling = 0
        home.prefetch()
        assert [buffer.numel() for buffer in home._staged.values()] == [whole] * 4
        found = _train(engine, 3, first=3)
        engine.destroy()
    assert detector.races == []
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
