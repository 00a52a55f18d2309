"""The norm, the flag and the clip coefficient are those of torch.nn.utils.clip_grad_norm_."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_zero_plugin.engine.grad_norm import grad_stats
from tests.helpers import run_ranks

CPU = torch.device("cpu")


def _grads(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in [(7, 5), (1,), (33,), (2, 3, 4), ()]]


def _clip(grads: list[Tensor], max_norm: float) -> tuple[Tensor, list[Tensor]]:
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads):
        param.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    return norm, [param.grad for param in params if param.grad is not None]


@given(st.integers(0, 10_000), st.sampled_from([1e-6, 1e-2, 1.0, 1e3]), st.sampled_from([0.1, 1.0, 1e4]))
def test_norm_and_clipped_gradients_equal_torch_to_the_bit(seed: int, scale: float, max_norm: float) -> None:
    grads = _grads(seed, scale)
    norm, clipped = _clip(grads, max_norm)
    stats = grad_stats(grads, device=CPU, max_norm=max_norm)
    assert stats.multiplier is not None
    assert torch.equal(stats.norm, norm)
    assert stats.found_inf.item() == 0.0
    for grad, expected in zip(grads, clipped):
        assert torch.equal(grad * stats.multiplier, expected)


@pytest.mark.parametrize("power", [0, 1, 8, 16])
def test_a_power_of_two_loss_scale_changes_no_bit(power: int) -> None:
    grads = _grads(3)
    norm, clipped = _clip(grads, 0.5)
    scaled = [grad * 2.0**power for grad in grads]
    stats = grad_stats(scaled, device=CPU, loss_scale=2.0**power, max_norm=0.5)
    assert stats.multiplier is not None
    assert torch.equal(stats.norm, norm)
    for grad, expected in zip(scaled, clipped):
        assert torch.equal(grad * stats.multiplier, expected)


def test_any_loss_scale_is_taken_out() -> None:
    grads = _grads(4)
    plain = grad_stats(grads, device=CPU, max_norm=0.5)
    scaled = grad_stats([g * 3.7 for g in grads], device=CPU, loss_scale=3.7, max_norm=0.5)
    torch.testing.assert_close(scaled.norm, plain.norm, rtol=1e-6, atol=0)
    assert scaled.multiplier is not None
    torch.testing.assert_close(scaled.multiplier * 3.7, plain.multiplier, rtol=1e-6, atol=0)


def test_no_gradients_have_norm_zero_and_do_not_crash() -> None:
    stats = grad_stats([], device=CPU, max_norm=1.0)
    assert stats.norm.item() == 0.0
    assert stats.found_inf.item() == 0.0
    assert stats.multiplier is not None
    assert stats.multiplier.item() == 1.0


def test_all_zero_gradients_have_norm_zero() -> None:
    stats = grad_stats([torch.zeros(3, 3)], device=CPU, max_norm=1.0)
    assert stats.norm.item() == 0.0
    assert stats.multiplier is not None
    assert stats.multiplier.item() == 1.0


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_element_sets_the_flag(bad: float, dtype: torch.dtype) -> None:
    grads = [grad.to(dtype) for grad in _grads(5)]
    grads[2][17] = bad
    assert grad_stats(grads, device=CPU, loss_scale=4.0).found_inf.item() == 1.0


def test_fp16_squares_do_not_overflow() -> None:
    """300 ** 2 does not fit fp16."""
    stats = grad_stats([torch.full((1000,), 300.0, dtype=torch.float16)], device=CPU)
    assert stats.found_inf.item() == 0.0
    torch.testing.assert_close(stats.norm.item(), 300.0 * 1000**0.5, rtol=1e-6, atol=0)


def test_no_clipping_and_no_scale_need_no_multiplier() -> None:
    assert grad_stats(_grads(1), device=CPU).multiplier is None


def _sharded(bad: bool) -> tuple[float, float, float | None]:
    rank = dist.get_rank()
    whole = _grads(6)
    if bad:
        whole[3][0, 0, 0] = float("nan")
    mine = [grad.flatten()[rank::2] for grad in whole]
    mine = [grad for grad in mine if grad.numel()]
    stats = grad_stats(mine, device=CPU, max_norm=0.5, sharded=True)
    assert stats.multiplier is not None
    return stats.norm.item(), stats.found_inf.item(), stats.multiplier.item()


def _both() -> list[tuple[float, float, float | None]]:
    clean, poisoned = _sharded(False), _sharded(True)
    empty = grad_stats([] if dist.get_rank() else _grads(6), device=CPU, sharded=True)
    return [clean, poisoned, (empty.norm.item(), empty.found_inf.item(), None)]


def test_sharded_norm_and_flag_agree_on_all_ranks() -> None:
    """Sums of squares are rounded in another order than unsharded: 1e-6, not bits. A rank may own nothing."""
    first, second = run_ranks(_both, 2)
    norm = torch.stack([g.norm() for g in _grads(6)]).norm().item()
    assert first[0] == second[0]
    assert first[0][0] == pytest.approx(norm, rel=1e-6)
    assert first[1][1] == second[1][1] == 1.0
    assert first[2] == second[2]
    assert first[2][0] == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("numel", [0, 1, 2**20, 5 * 2**20 + 17])
def test_norms_of_many_half_precision_elements_lose_no_digits(numel: int, dtype: torch.dtype) -> None:
    """In blocks: one running sum in fp32 is off by a thousandth at twenty million elements."""
    grads = [torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(dtype), torch.ones(3)]
    found = grad_stats(grads, device=torch.device("cpu")).norm.item()
    wanted = torch.cat([grad.double() for grad in grads]).norm().item()
    assert found == pytest.approx(wanted, rel=2e-6)
