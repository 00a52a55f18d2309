"""Where every parameter lies: no element is lost, doubled, or updated under another group's hyperparameters."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_zero_plugin.engine.buckets import (
    SLOT_ALIGNMENT,
    BucketLayout,
    ParamSpec,
    cut_pieces,
    cut_whole_parameters,
    even_numel,
    plan_buckets,
)
from hf_zero_plugin.engine.flat import FlatWeights, view_of

Plan = tuple[list[ParamSpec], int, int]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Parameters of two types and three groups, numel 0 and 1 included; a bucket size; a number of shards."""
    count = draw(st.integers(1, 12))
    specs = []
    for index in range(count):
        numel = draw(st.one_of(st.integers(0, 3), st.integers(0, 700)))
        dtype = draw(st.sampled_from(["half", "full"]))
        specs.append(ParamSpec(index, f"p{index}", (numel,), numel, dtype, draw(st.integers(0, 2))))
    return specs, draw(st.sampled_from([1, 50, 256, 1000, 10**6])), draw(st.sampled_from([1, 2, 3, 5]))


def _layouts(plan: Plan) -> list[BucketLayout]:
    specs, bucket_numel, num_shards = plan
    return plan_buckets(specs, bucket_numel=bucket_numel, num_shards=num_shards)


@given(plans())
def test_every_parameter_has_one_slot_and_slots_do_not_overlap(plan: Plan) -> None:
    layouts = _layouts(plan)
    seen = [slot.spec.index for layout in layouts for slot in layout.slots]
    assert sorted(seen) == list(range(len(plan[0])))
    for layout in layouts:
        position = 0
        for slot in layout.slots:
            assert slot.start >= position
            assert slot.end - slot.start == slot.spec.numel
            position = slot.end
        assert position <= layout.padded_numel


@given(plans())
def test_buckets_are_numbered_in_order_and_hold_one_type(plan: Plan) -> None:
    layouts = _layouts(plan)
    assert [layout.index for layout in layouts] == list(range(len(layouts)))
    for layout in layouts:
        assert {slot.spec.dtype for slot in layout.slots} == {layout.dtype}


@given(plans())
def test_a_bucket_exceeds_its_size_only_for_one_large_parameter(plan: Plan) -> None:
    for layout in _layouts(plan):
        filled = [slot.spec.numel for slot in layout.slots if slot.spec.numel]
        assert sum(filled) <= plan[1] or len(filled) == 1


@given(plans())
def test_slots_are_aligned_and_padding_is_bounded(plan: Plan) -> None:
    for layout in _layouts(plan):
        assert all(slot.start % SLOT_ALIGNMENT == 0 for slot in layout.slots)
        assert layout.padded_numel % (SLOT_ALIGNMENT * layout.num_shards) == 0
        used = sum(slot.spec.numel for slot in layout.slots)
        allowed = SLOT_ALIGNMENT * len(layout.slots) + SLOT_ALIGNMENT * layout.num_shards
        assert layout.padded_numel - used <= allowed


@given(plans())
def test_shards_are_equal_and_cover_the_bucket(plan: Plan) -> None:
    for layout in _layouts(plan):
        ranges = [layout.shard_range(shard) for shard in range(layout.num_shards)]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == layout.padded_numel
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
        assert {high - low for low, high in ranges} == {layout.shard_numel}


@given(plans(), st.sampled_from([None, 1, 64, 100]))
def test_pieces_cover_each_shard_once_and_never_cross_groups(plan: Plan, max_numel: int | None) -> None:
    for layout in _layouts(plan):
        group_at: dict[int, int] = {}
        for slot in layout.slots:
            group_at.update(dict.fromkeys(range(slot.start, slot.end), slot.spec.group))
        position = 0
        for shard in range(layout.num_shards):
            for piece in cut_pieces(layout, shard, max_numel=max_numel):
                assert piece.bucket == layout.index
                assert piece.start == position, "pieces follow each other without a gap"
                assert 0 < piece.numel <= (max_numel or piece.numel)
                assert {group_at.get(i, piece.group) for i in range(piece.start, piece.end)} == {piece.group}
                position = piece.end
            assert position == layout.shard_range(shard)[1]
        assert position == layout.padded_numel


@given(plans())
def test_slots_in_shards_join_up_to_whole_parameters(plan: Plan) -> None:
    for layout in _layouts(plan):
        parts: dict[int, list[tuple[int, int]]] = {}
        for shard in range(layout.num_shards):
            low, high = layout.shard_range(shard)
            for slot, start, end in layout.slots_in_shard(shard):
                assert low <= start < end <= high
                parts.setdefault(slot.spec.index, []).append((start, end))
        for slot in layout.slots:
            mine = parts.get(slot.spec.index, [])
            assert sum(end - start for start, end in mine) == slot.spec.numel
            if mine:
                assert mine[0][0] == slot.start
                assert mine[-1][1] == slot.end
                assert all(a[1] == b[0] for a, b in itertools.pairwise(mine))


@given(plans())
def test_whole_parameter_pieces_are_the_parameters(plan: Plan) -> None:
    specs, bucket_numel, _ = plan
    for layout in plan_buckets(specs, bucket_numel=bucket_numel, num_shards=1):
        pieces = cut_whole_parameters(layout)
        assert [(p.start, p.end, p.shape, p.group) for p in pieces] == [
            (s.start, s.end, s.spec.shape, s.spec.group) for s in layout.slots
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flat_weights_keep_identity_shape_and_value(dtype: torch.dtype) -> None:
    """A non-contiguous parameter and one of no dimension included."""
    params = [
        nn.Parameter(torch.randn(3, 5)),
        nn.Parameter(torch.randn(4, 6).t()),
        nn.Parameter(torch.tensor(1.5)),
        nn.Parameter(torch.randn(2, 3, 4)),
    ]
    before = [p.detach().clone() for p in params]
    specs = [ParamSpec(i, f"p{i}", tuple(p.shape), p.numel(), dtype, 0) for i, p in enumerate(params)]
    layouts = plan_buckets(specs, bucket_numel=30, num_shards=2)
    weights = FlatWeights(layouts, params, torch.device("cpu"))
    for layout in layouts:
        weights.allocate(layout, dtype)
        exact = weights.adopt(layout)
        assert exact.dtype == torch.float32
        assert (exact is weights.flats[-1]) == (dtype == torch.float32)
        for slot in layout.slots:
            assert torch.equal(view_of(exact, slot), before[slot.spec.index])
    for param, old in zip(params, before):
        assert param.shape == old.shape
        assert torch.equal(param, old.to(dtype))
    for layout, flat in zip(layouts, weights.flats):
        for slot in layout.slots:
            assert params[slot.spec.index].data_ptr() == view_of(flat, slot).data_ptr()
    assert weights.num_bytes == sum(layout.padded_numel for layout in layouts) * dtype.itemsize


@pytest.mark.parametrize(
    ("segments", "wanted"),
    [
        ([1000, 1000, 6400], 1024),  # the longest allowed is good enough
        ([1024] * 8 + [1088] * 40, 576),  # 1088 would be two pieces of 544 in buffers of 1024
        ([320] * 30 + [4096], 320),  # and a few long ones do not make short all others
        ([64], 64),
    ],
)
def test_pieces_of_even_length(segments: list[int], wanted: int) -> None:
    assert even_numel(segments, 1024) == wanted


@given(st.lists(st.integers(1, 10_000), max_size=20), st.integers(1, 40))
def test_an_even_length_is_one_that_may_be_asked_for(segments: list[int], units: int) -> None:
    longest = 64 * units
    numel = even_numel(segments, longest)
    assert 0 < numel <= longest
    assert numel % 64 == 0
