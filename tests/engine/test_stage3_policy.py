"""Every key of the stage 3 policy changes what is gathered, and when, as it says it does. One and two gloo ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from hf_zero_plugin.engine.fsdp import groups_of
from tests.helpers import run_ranks

from .stage3 import Net, batch, engine_for, loss_of

pytestmark = pytest.mark.slow

DEPTH = 4
BLOCK = 660
"""Elements of a block of Net."""
REST = 7 * 10 + 110 + 20 + 1
"""Embeddings, the idle layer, the last norm, the scale: live all the time."""

POLICIES: dict[str, dict[str, int]] = {
    "defaults": {},
    "nothing ahead": {"max_live_parameters": 0, "prefetch_bucket_size": 0},
    "one ahead": {"max_live_parameters": 0, "prefetch_bucket_size": BLOCK},
    "two ahead": {"max_live_parameters": 0, "prefetch_bucket_size": 2 * BLOCK},
    "one stays": {"max_live_parameters": REST + BLOCK, "prefetch_bucket_size": 0},
    "three stay": {"max_live_parameters": REST + 4 * BLOCK - 1, "prefetch_bucket_size": 0},
    "two are used again soon": {"max_reuse_distance": 2 * BLOCK, "prefetch_bucket_size": 0},
}
THRESHOLDS: dict[str, dict[str, int]] = {
    "none whole": {"param_persistence_threshold": 0},
    "norms and biases whole": {"param_persistence_threshold": 30},
    "the first ones whole": {"param_persistence_threshold": 30, "model_persistence_threshold": 50},
}


class Seen(NamedTuple):
    """Numbers of the blocks that are gathered, or on their way."""

    in_forward: dict[int, list[int]]
    """By the block that runs."""
    between: list[int]
    in_backward: dict[int, list[int]]


def _watch(options: dict[str, int], **others: Any) -> Seen:
    model = Net(depth=DEPTH)
    assert sum(p.numel() for p in model.parameters()) == REST + DEPTH * BLOCK
    engine = engine_for(model, stage3=options, **others)
    seen = Seen({}, [], {})

    def gathered() -> list[int]:
        states = {i: groups_of(layer)[0] for i, layer in enumerate(model.layers)}  # type: ignore[arg-type]
        return [i for i, state in states.items() if state.is_unsharded or state._all_gather_result is not None]

    def watch(index: int, inside: nn.Module) -> None:
        def run(_: nn.Module, args: Any, out: torch.Tensor) -> None:
            seen.in_forward[index] = gathered()
            if out.requires_grad:
                out.register_hook(lambda grad: seen.in_backward.__setitem__(index, gathered()))

        inside.register_forward_hook(run)

    for index, layer in enumerate(model.layers):
        watch(index, layer.up)  # by then FSDP2 has done what it does before a block
    loss = loss_of(engine, batch(0))
    seen.between.extend(gathered())
    engine.backward(loss)
    return seen


def _sharded(options: dict[str, int]) -> list[str]:
    threshold = options["param_persistence_threshold"]
    others = {key: value for key, value in options.items() if key != "param_persistence_threshold"}
    engine = engine_for(Net(depth=2), whole=threshold, stage3=others)
    assert engine.parts.shards is not None
    return [item.name for item in engine.parts.shards.params]


def _play() -> dict[str, Any]:
    results: dict[str, Any] = {name: _watch(options) for name, options in POLICIES.items()}
    results |= {f"{name}, offloaded": _watch(options, params_on="cpu") for name, options in POLICIES.items()}
    return results | {name: _sharded(options) for name, options in THRESHOLDS.items()}


@pytest.fixture(scope="module", params=[1, 2])
def played(request: pytest.FixtureRequest) -> dict[str, Any]:
    return run_ranks(_play, request.param)[0]


@pytest.fixture(params=["", ", offloaded"])
def seen(request: pytest.FixtureRequest, played: dict[str, Any]) -> dict[str, Seen]:
    return {name: played[name + request.param] for name in POLICIES}


def test_prefetch_bucket_size_is_what_is_gathered_ahead(seen: dict[str, Seen]) -> None:
    for name, ahead in [("nothing ahead", 0), ("one ahead", 1), ("two ahead", 2)]:
        for block in range(DEPTH):
            assert seen[name].in_forward[block] == list(range(DEPTH))[block : block + ahead + 1], name
            assert seen[name].in_backward[block] == list(range(DEPTH))[max(0, block - ahead) : block + 1], name


def test_max_live_parameters_and_max_reuse_distance_are_what_stays_gathered(seen: dict[str, Seen]) -> None:
    """After the forward pass; the last blocks do, because the backward pass begins with them."""
    stays = {name: each.between for name, each in seen.items()}
    assert stays == {
        "defaults": [0, 1, 2, 3],
        "nothing ahead": [],
        "one ahead": [],
        "two ahead": [],
        "one stays": [3],
        "three stay": [1, 2, 3],
        "two are used again soon": [2, 3],
    }
    for each in seen.values():
        assert each.in_backward[0] == [0], "nothing stays behind the backward pass"


def test_thresholds_are_what_stays_whole(played: dict[str, Any]) -> None:
    named = {name: param for name, param in Net(depth=2).named_parameters() if param.ndim}
    small = [name for name, param in named.items() if param.numel() <= 30]
    assert played["none whole"] == list(named)
    assert played["norms and biases whole"] == [name for name in named if name not in small]
    first = ["layers.0.norm.weight", "layers.0.norm.bias", "layers.0.up.bias"]
    assert small[:3] == first
    assert played["the first ones whole"] == [name for name in named if name not in first]
