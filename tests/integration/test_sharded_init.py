"""``zero.Init`` in one process: where large weights are drawn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_zero_plugin.integration import sharded_init
from hf_zero_plugin.integration.sharded_init import Init
from hf_zero_plugin.integration.zero_api import GatheredParameters


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What was drawn on the other device, for which the CPU stands in."""
    monkeypatch.setattr(sharded_init, "_drawing_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(sharded_init, "DRAWN_ELSEWHERE_NUMEL", 1000)
    found: list[Tensor] = []
    empty_like = torch.empty_like

    def noted(*args: object, **kwargs: object) -> Tensor:
        found.append(empty_like(*args, **kwargs))  # type: ignore[call-overload]
        return found[-1]

    monkeypatch.setattr(torch, "empty_like", noted)
    had_group = dist.is_initialized()
    yield found
    if dist.is_initialized() and not had_group:
        dist.destroy_process_group()


def _weight(dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(40, 30, dtype=dtype))
    nn.init.normal_(weight, 1.0, 0.5, generator=generator)
    return weight.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_half_precision_weights_are_drawn_where_that_is_fast(dtype: torch.dtype, drawn: list[Tensor]) -> None:
    wanted = _weight(dtype)
    with Init():
        found = _weight(dtype)
    assert len(drawn) == 1
    assert torch.equal(found, wanted)
    assert torch.equal(_weight(dtype), wanted)
    assert len(drawn) == 1, "outside of the context nothing changes"


def test_first_values_that_are_drawn_after_init_too(drawn: list[Tensor]) -> None:
    """transformers builds a stage 3 model without values, and draws them when it is built."""
    wanted = _weight(torch.bfloat16)
    with Init():
        model = nn.Linear(30, 40, bias=False, dtype=torch.bfloat16)
    drawn.clear()
    with GatheredParameters(list(model.parameters()), modifier_rank=0):
        torch.manual_seed(0)
        nn.init.normal_(model.weight, 1.0, 0.5)
    assert len(drawn) == 1
    assert torch.equal(model.weight, wanted)


def test_other_draws_stay_where_they_are(drawn: list[Tensor]) -> None:
    with Init():
        _weight(torch.float32)
        _weight(torch.bfloat16, torch.Generator().manual_seed(3))
        torch.zeros(10, dtype=torch.bfloat16).normal_()
    assert drawn == []


def test_a_full_device_is_no_obstacle(drawn: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    wanted = _weight(torch.bfloat16)
    monkeypatch.setattr(torch, "empty_like", full)
    with Init():
        assert torch.equal(_weight(torch.bfloat16), wanted)
