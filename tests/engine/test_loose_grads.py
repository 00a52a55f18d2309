"""LooseGrads against the flat buffer that it stands for, laid out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_zero_plugin.engine.buckets import BucketLayout, ParamSpec, plan_buckets
from hf_zero_plugin.engine.gradients import ReduceOptions
from hf_zero_plugin.engine.loose_grads import LooseGrads
from hf_zero_plugin.engine.sharding import sharding_for

SHAPES = [(16, 8), (5,), (64, 64), (7, 3), (128,)]


def _store(accumulate_fp32: bool = False) -> tuple[LooseGrads, list[nn.Parameter], list[BucketLayout]]:
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in SHAPES]
    specs = [
        ParamSpec(i, f"p{i}", tuple(p.shape), p.numel(), torch.bfloat16, group=i % 2) for i, p in enumerate(params)
    ]
    layouts = plan_buckets(specs, bucket_numel=3000, num_shards=1)
    sharding = sharding_for(2, rank=0, world_size=1)
    store = LooseGrads(layouts, params, sharding, ReduceOptions(1), accumulate_fp32=accumulate_fp32)
    return store, params, layouts


def _backward(store: LooseGrads, params: list[nn.Parameter], seed: int, *, boundary: bool, without: int = -1) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(p.shape, generator=generator).bfloat16() for p in params]
    store.begin_backward(boundary=boundary)
    sum((p * v).sum() for i, (p, v) in enumerate(zip(params, values)) if i != without).backward()  # type: ignore[union-attr]
    store.end_backward()


def _flat_by_hand(layout: BucketLayout, grads: dict[int, Tensor]) -> Tensor:
    flat = torch.zeros(layout.padded_numel)
    for slot in layout.slots:
        if slot.spec.index in grads:
            flat[slot.start : slot.end] = grads[slot.spec.index].float().reshape(-1)
    return flat


@pytest.mark.parametrize("without", [-1, 2, 4])
def test_every_part_is_what_a_flat_buffer_would_hold(without: int) -> None:
    """Whole buckets, parts between parameters, and parts that cut one; a missing gradient is zero."""
    store, params, layouts = _store()
    for seed in range(2):  # the second time with views that were made the first time
        _backward(store, params, seed, boundary=True, without=without if seed else -1)
        held = {i: g for bucket in store._held.values() for i, g in bucket.items()}
        assert all(p.grad is None for p in params)
        out = torch.full((max(layout.padded_numel for layout in layouts),), float("nan"))
        for layout in layouts:
            wanted = _flat_by_hand(layout, held)
            for start, end in [(0, layout.padded_numel), (layout.slots[0].start, layout.slots[0].end), (3, 60)]:
                end = min(end, layout.padded_numel)
                store.widen(layout.index, start, end, out[: end - start])
                assert torch.equal(out[: end - start], wanted[start:end])
                assert torch.equal(store.part(layout.index, start, end).float(), wanted[start:end])
            store.release(layout.index)


def test_a_second_backward_pass_before_the_step_adds() -> None:
    store, params, layouts = _store()
    _backward(store, params, 0, boundary=True)
    first = [store.shard(layout.index).clone() for layout in layouts]
    _backward(store, params, 0, boundary=True)
    assert all(torch.equal(store.shard(layout.index), 2 * one) for layout, one in zip(layouts, first))


def test_sums_are_fp32_and_are_cleared_part_by_part() -> None:
    store, params, layouts = _store(accumulate_fp32=True)
    alone = []
    for seed in range(3):
        other, other_params, _ = _store()
        _backward(other, other_params, seed, boundary=True)
        alone.append([other.shard(layout.index).float() for layout in layouts])
        _backward(store, params, seed, boundary=seed == 2)
    for layout in layouts:
        assert torch.equal(store.shard(layout.index), sum(one[layout.index] for one in alone))
        store.clear_part(layout.index, 0, layout.padded_numel)
        assert not store.shard(layout.index).any()
