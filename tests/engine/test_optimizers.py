"""Update rules against torch.optim, per tensor and flat.

torch's fused CPU kernels compute 16 elements at a time, and round the remaining ``numel % 16`` differently in the last
bit now and then. A flat piece has its remainder elsewhere than the tensors it holds, so "to the bit" is promised (and
tested) for tensors of multiples of 16; for the others, to the last bit of a weight near 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_zero_plugin.config.settings import OptimizerSettings
from hf_zero_plugin.engine.buckets import Piece
from hf_zero_plugin.engine.optimizers import (
    AdagradRule,
    AdamRule,
    LionRule,
    SGDRule,
    TorchRule,
    UpdateRule,
    rule_for,
    rule_from_config,
)
from hf_zero_plugin.engine.piece_states import PieceStates
from hf_zero_plugin.errors import ConfigError

SHAPES = [(16, 5), (16,), (2, 8, 3)]
ODD_SHAPES = [(5, 7), (1,), (3, 2, 4), (), (17,)]
STEPS = 6

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def _start(shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _grads(step: int, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _by_torch(make: MakeOptimizer, shapes: list[tuple[int, ...]] = SHAPES) -> Tensor:
    params = [nn.Parameter(tensor) for tensor in _start(shapes)]
    optimizer = make(params)
    for step in range(STEPS):
        for param, grad in zip(params, _grads(step, shapes)):
            param.grad = grad
        optimizer.step()
    return torch.cat([param.detach().flatten() for param in params])


def _by_rule(
    rule: UpdateRule,
    cut: list[int] | None = None,
    group: dict[str, Any] | None = None,
    shapes: list[tuple[int, ...]] = SHAPES,
) -> Tensor:
    """One flat vector, cut into pieces at ``cut``."""
    flat = torch.cat([tensor.flatten() for tensor in _start(shapes)])
    edges = [0, *(cut or []), flat.numel()]
    pieces = [Piece(0, 0, start, end) for start, end in itertools.pairwise(edges)]
    states = PieceStates(rule, pieces)
    group = {**rule.defaults, **(group or {})}
    for index, piece in enumerate(pieces):
        states.start(index, flat[piece.start : piece.end], group)
    for step in range(STEPS):
        grads = torch.cat([grad.flatten() for grad in _grads(step, shapes)])
        for index, piece in enumerate(pieces):
            number = torch.tensor(float(step + 1))
            states.update(index, grads[piece.start : piece.end].clone(), group, number, None)
    return flat


def _config(type_name: str, **params: Any) -> UpdateRule:
    return rule_from_config(OptimizerSettings(type=type_name, params=params))


_ADAM = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
SAME_KERNEL: dict[str, tuple[UpdateRule, MakeOptimizer]] = {
    "AdamW": (_config("AdamW", **_ADAM), lambda p: torch.optim.AdamW(p, **_ADAM, fused=True)),
    "Adam means AdamW": (_config("Adam", **_ADAM), lambda p: torch.optim.AdamW(p, **_ADAM, fused=True)),
    "coupled Adam": (
        _config("Adam", **_ADAM, adam_w_mode=False),
        lambda p: torch.optim.Adam(p, **_ADAM, fused=True),
    ),
    "SGD": (_config("SGD", lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1, foreach=False)),
    "SGD momentum": (
        _config("SGD", lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=False),
    ),
    "SGD nesterov": (
        _config("SGD", lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=False),
    ),
    "RMSprop": (_config("RMSprop", lr=0.01), lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=False)),
    "RMSprop centered": (
        _config("RMSprop", lr=0.01, centered=True, momentum=0.5),
        lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5, foreach=False),
    ),
    "NAdam": (_config("NAdam", lr=0.01), lambda p: torch.optim.NAdam(p, lr=0.01, foreach=False)),
    "Adamax": (_config("adamax", lr=0.01), lambda p: torch.optim.Adamax(p, lr=0.01, foreach=False)),
    "RAdam": (_config("RAdam", lr=0.01), lambda p: torch.optim.RAdam(p, lr=0.01, foreach=False)),
    "Adadelta": (_config("Adadelta", lr=0.5), lambda p: torch.optim.Adadelta(p, lr=0.5, foreach=False)),
}


@pytest.mark.parametrize("name", SAME_KERNEL)
@pytest.mark.parametrize("cut", [[], [16, 48, 64]], ids=["whole", "cut"])
def test_flat_pieces_update_as_torch_updates_tensors_to_the_bit(name: str, cut: list[int]) -> None:
    rule, make = SAME_KERNEL[name]
    assert torch.equal(_by_rule(rule, cut), _by_torch(make))


@pytest.mark.parametrize("name", SAME_KERNEL)
def test_tensors_of_odd_sizes_agree_to_the_last_bit_or_so(name: str) -> None:
    rule, make = SAME_KERNEL[name]
    torch.testing.assert_close(
        _by_rule(rule, [1, 30, 64], shapes=ODD_SHAPES), _by_torch(make, ODD_SHAPES), rtol=1e-6, atol=5e-7
    )


CLOSE: dict[str, tuple[UpdateRule, MakeOptimizer]] = {
    "SGD dampening": (
        _config("SGD", lr=0.1, momentum=0.9, dampening=0.3),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    ),
    "Adagrad": (
        _config("Adagrad", lr=0.1, lr_decay=0.01, weight_decay=0.1, initial_accumulator_value=0.2),
        lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.01, weight_decay=0.1, initial_accumulator_value=0.2),
    ),
    "AdamW not fused": (_config("AdamW", **_ADAM), lambda p: torch.optim.AdamW(p, **_ADAM, foreach=False)),
}


@pytest.mark.parametrize("name", CLOSE)
def test_rules_with_another_order_of_operations_agree_to_rounding(name: str) -> None:
    """torch multiplies and adds in one instruction where these rules take two, or the other way round."""
    rule, make = CLOSE[name]
    torch.testing.assert_close(_by_rule(rule, [11]), _by_torch(make), rtol=2e-6, atol=2e-7)


def _lion_by_hand(lr: float, beta1: float, beta2: float, decay: float) -> Tensor:
    """Program 1 of arXiv:2302.06675, in double precision."""
    weight = torch.cat([tensor.flatten() for tensor in _start()]).double()
    momentum = torch.zeros_like(weight)
    for step in range(STEPS):
        grad = torch.cat([grad.flatten() for grad in _grads(step)]).double()
        weight = weight - lr * ((beta1 * momentum + (1 - beta1) * grad).sign() + decay * weight)
        momentum = beta2 * momentum + (1 - beta2) * grad
    return weight


def test_lion_follows_the_paper() -> None:
    rule = _config("Lion", lr=0.01, betas=[0.9, 0.98], weight_decay=0.1)
    expected = _lion_by_hand(0.01, 0.9, 0.98, 0.1).float()
    torch.testing.assert_close(_by_rule(rule, [3, 40]), expected, rtol=1e-6, atol=1e-7)


def test_adam_without_bias_correction_is_the_plain_recursion() -> None:
    rule = _config("AdamW", lr=0.01, bias_correction=False, weight_decay=0.0)
    weight = torch.cat([tensor.flatten() for tensor in _start()]).double()
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(STEPS):
        grad = torch.cat([grad.flatten() for grad in _grads(step)]).double()
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
        weight = weight - 0.01 * mean / (square.sqrt() + 1e-8)
    torch.testing.assert_close(_by_rule(rule), weight.float(), rtol=1e-5, atol=1e-6)


def test_found_inf_leaves_masters_and_moments_as_they_are() -> None:
    rule = _config("AdamW", lr=0.1)
    master = torch.randn(40)
    states = PieceStates(rule, [Piece(0, 0, 0, 40)])
    states.start(0, master, rule.defaults)
    states.update(0, torch.randn(40), rule.defaults, torch.tensor(1.0), torch.tensor(0.0))
    before = {name: tensor.clone() for name, tensor in states.tensors(0).items()}
    states.update(0, torch.full((40,), float("nan")), rule.defaults, torch.tensor(2.0), torch.tensor(1.0))
    for name, tensor in states.tensors(0).items():
        assert torch.equal(tensor, before[name]), name


def test_the_param_group_at_hand_sets_the_hyperparameters() -> None:
    """Schedules write to groups, not to the rule."""
    rule = _config("AdamW", lr=123.0)
    assert torch.equal(_by_rule(rule, group=_ADAM), _by_torch(SAME_KERNEL["AdamW"][1]))
    torch_rule = _config("RMSprop", lr=123.0)
    assert torch.equal(_by_rule(torch_rule, group={"lr": 0.01}), _by_torch(SAME_KERNEL["RMSprop"][1]))


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (lambda p: torch.optim.AdamW(p), AdamRule),
        (lambda p: torch.optim.Adam(p), AdamRule),
        (lambda p: torch.optim.SGD(p, lr=0.1), SGDRule),
        (lambda p: torch.optim.Adagrad(p), AdagradRule),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), TorchRule),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), TorchRule),
        (lambda p: torch.optim.RMSprop(p), TorchRule),
        (lambda p: torch.optim.LBFGS(p), type(None)),
    ],
)
def test_rule_for_knows_torchs_own_optimizers(optimizer: MakeOptimizer, kind: type) -> None:
    assert type(rule_for(optimizer([nn.Parameter(torch.zeros(3))]))) is kind


def test_a_subclass_is_not_taken_for_its_parent() -> None:
    class Mine(torch.optim.AdamW):
        pass

    assert rule_for(Mine([nn.Parameter(torch.zeros(3))])) is None


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}])
def test_amsgrad_and_maximize_objects_are_followed(options: dict[str, bool]) -> None:
    params = [nn.Parameter(torch.zeros(3))]
    rule = rule_for(torch.optim.AdamW(params, lr=0.01, foreach=False, **options))
    assert rule is not None
    expected = _by_torch(lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False, **options))
    assert torch.equal(_by_rule(rule, [32]), expected)


@pytest.mark.parametrize(
    ("type_name", "params", "words"),
    [
        ("AdamV", {}, ["$.optimizer.type", "AdamV", "Did you mean"]),
        ("SGD", {"momentun": 0.9}, ["$.optimizer.params.momentun", "Did you mean 'momentum'?"]),
        ("Lion", {"eps": 1e-8}, ["$.optimizer.params.eps", "lr"]),
        ("LBFGS", {}, ["$.optimizer.type", "LBFGS"]),
        ("RMSprop", {"beta": 1}, ["$.optimizer.params.beta", "RMSprop"]),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused(type_name: str, params: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(type_name, **params)
    for word in words:
        assert word in str(caught.value)


def test_defaults_are_deepspeeds() -> None:
    assert _config("Adam").defaults["weight_decay"] == 0.0
    assert _config("AdamW", torch_adam=True).defaults["weight_decay"] == 0.01
    assert isinstance(_config("Adam"), AdamRule)
    assert isinstance(_config("LION"), LionRule)
