"""Which share of the offloaded states host cores update."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Adafactor

from hf_zero_plugin.config.settings import OffloadOptimizerSettings
from hf_zero_plugin.engine import host_threads as host_threads_module
from hf_zero_plugin.engine import state_homes
from hf_zero_plugin.engine.buckets import ParamSpec, Piece, plan_buckets
from hf_zero_plugin.engine.host_threads import host_threads
from hf_zero_plugin.engine.optimizers import rule_from_config
from hf_zero_plugin.engine.sharding import sharding_for
from hf_zero_plugin.engine.state_homes import host_share, interleaved

from .harness import Tiny, make_engine, settings_for

ALONE: Any = SimpleNamespace(is_alone=True)


@pytest.mark.parametrize("sizes", [[1], [12, 4], [3, 12, 1]], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_the_host_gets_its_share_evenly_and_not_the_first_piece(share: float, sizes: list[int]) -> None:
    pieces: Any = [SimpleNamespace(numel=1000 * size) for size in 40 * sizes]
    hosted = interleaved(pieces, share)
    ids = {id(piece) for piece in hosted}
    assert id(pieces[0]) not in ids or share == 1
    seen = taken = 0
    for piece in pieces:
        seen += piece.numel
        taken += piece.numel * (id(piece) in ids)
        assert taken <= share * seen + 1
        assert taken > share * seen - 2 * 12_000, "never more than a piece or two behind"
    assert taken == sum(piece.numel for piece in hosted)


def test_the_share_follows_from_the_threads_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for threads in (1, 2, 4, 16, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        shares.append(host_share(OffloadOptimizerSettings(step_on="both"), ALONE))
        assert host_share(OffloadOptimizerSettings(step_on="both", host_share=0.25), ALONE) == 0.25
    assert shares[:2] == [0, 0], "no thread to spare"
    assert shares == sorted(shares)
    assert 0.25 < shares[3] < 0.4


def test_ranks_that_gather_leave_it_to_their_devices(caplog: pytest.LogCaptureFixture) -> None:
    offload = OffloadOptimizerSettings(step_on="both", host_share=0.5)
    with caplog.at_level(logging.WARNING, logger="hf_zero_plugin"):
        assert host_share(offload, SimpleNamespace(is_alone=False)) == 0  # type: ignore[arg-type]
    assert 'step_on: "both" is the same as "auto" here: there are several ranks' in caplog.text


@pytest.mark.parametrize(
    ("given", "told"), [(None, "The device updates everything"), (0.5, "One of them updates 50% of the states")]
)
def test_too_few_threads_are_told(
    given: float | None, told: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun lets each of several processes have one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with caplog.at_level(logging.WARNING, logger="hf_zero_plugin"):
        host_share(OffloadOptimizerSettings(step_on="both", host_share=given), ALONE)
    assert "there are only 1 threads" in caplog.text
    assert told in caplog.text


@pytest.mark.parametrize(
    ("omp", "ranks", "threads", "expected"),
    [(None, "4", 16, 2), ("8", "4", 8, 6), (None, None, 16, 14), (None, "40", 16, -1), (None, "2", 4, 2)],
)
def test_ranks_of_a_machine_divide_its_cores(
    omp: str | None, ranks: str | None, threads: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(host_threads_module, "usable_cores", lambda: 16)
    for name, value in (("OMP_NUM_THREADS", omp), ("LOCAL_WORLD_SIZE", ranks)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert host_threads(1.0, spared=2) == expected


@pytest.mark.parametrize(
    ("offload", "told"),
    [
        ({"ratio": 0.5}, "offload_optimizer.ratio: no effect here"),
        ({"ratio": "auto", "step_on": "both"}, "offload_optimizer.ratio and step_on: no effect here"),
        ({}, ""),
    ],
)
def test_whole_parameters_cannot_be_shared_out_and_that_is_told(
    offload: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Tiny()
    client = Adafactor(model.parameters(), lr=0.01, relative_step=False)
    with caplog.at_level(logging.WARNING, logger="hf_zero_plugin"):
        settings = settings_for(optimizer=None, offload={"device": "cpu", **offload})
        make_engine(model, settings, client_optimizer=client).destroy()
    assert told in caplog.text
    assert bool(told) == ("no effect" in caplog.text)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_states_stream_in_pieces_of_even_length(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor that is a little longer than a piece may be gives two that are a little longer than half of one; a
    long one beside it is cut like them, so that all buffers are alike."""
    monkeypatch.setattr(state_homes, "STREAM_PIECE_NUMEL", 64 * 16)
    made: dict[str, list[Piece]] = {}
    for name in ("DeviceHome", "StreamedHome"):
        monkeypatch.setattr(
            state_homes, name, lambda _, pieces, name=name, **__: made.__setitem__(name, pieces) or SimpleNamespace()
        )
    sizes = [64 * 100, *[64 * 18] * 30]
    specs = [ParamSpec(at, f"p{at}", (size,), size, torch.bfloat16, 0) for at, size in enumerate(sizes)]
    layouts = plan_buckets(specs, bucket_numel=64 * 16, num_shards=ranks)
    settings = settings_for(2, "bf16", {"device": "cpu"})
    parts: Any = SimpleNamespace(
        sharding=sharding_for(2, rank=ranks - 1, world_size=ranks), device=torch.device("cuda")
    )
    assert settings.optimizer is not None
    context: Any = SimpleNamespace(rule=rule_from_config(settings.optimizer), is_alone=ranks == 1)
    state_homes.make_homes(parts, settings, context, None, layouts)
    assert made["DeviceHome"] == []
    numels = [piece.numel for piece in made["StreamedHome"]]
    assert sum(numels) == sum(layout.shard_numel for layout in layouts)
    assert max(numels) <= 64 * 16
    assert min(numels) > 0.75 * max(numels)
