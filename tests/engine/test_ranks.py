"""Two gloo ranks against stock DistributedDataParallel, against one process with the whole batch, and each other.

Starting ranks costs seconds, so ``_everything`` runs all cases in one pair of processes and the tests look at results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import Adafactor

from hf_zero_plugin.config.settings import LossScaleSettings, OptimizerSettings
from hf_zero_plugin.engine import assembly
from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.errors import HfZeroError, LossScaleError, UnsupportedFeature
from hf_zero_plugin.integration.tensor_access import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
)
from hf_zero_plugin.integration.zero_api import GatheredParameters
from tests.helpers import run_ranks

from .harness import ADAMW, OFFLOADS, Reference, Tiny, batch, decay_groups, loss_of, make_engine, weights

STEPS = 4
Outcome = dict[str, Any]


def _train(engine: ZeroEngine, micros: int = 1, rows: Callable[[int, int], Tensor] = batch) -> Outcome:
    rank, losses, norms = dist.get_rank(), [], []
    for step in range(STEPS):
        for micro in range(micros):
            loss = loss_of(engine, rows(step, 2 * micro + rank).to(engine.parts.params[0].dtype))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norms.append(engine.get_global_grad_norm())
    result = {"losses": losses, "norms": norms, "weights": weights(engine.module)}
    engine.destroy()
    return result


def _ddp(clip: float, micros: int = 1) -> Outcome:
    """The stock way, with the gradients of unused parameters as zeros."""
    model = Tiny()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(decay_groups(model), **ADAMW, fused=True)  # type: ignore[arg-type]
    losses, norms = [], []
    for step in range(STEPS):
        for micro in range(micros):
            ddp.require_backward_grad_sync = micro == micros - 1
            loss = loss_of(ddp, batch(step, 2 * micro + dist.get_rank()))
            (loss / micros).backward()
            losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf")).item())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms, "weights": weights(model)}


def _half(reduce: Callable[[Tensor], None]) -> Outcome:
    reference = Reference(Tiny(), "bf16", reduce=reduce, clip=1.0)
    for step in range(STEPS):
        x = batch(step, dist.get_rank()).bfloat16()
        reference.step([lambda x=x: loss_of(reference.model, x)])  # type: ignore[misc]
    return {"norms": reference.norms, "weights": weights(reference.model)}


def _mean_in_bf16(grad: Tensor) -> None:
    grad.mul_(0.5)
    dist.all_reduce(grad)


def _mean_on_fp32_wire(grad: Tensor) -> None:
    wide = grad.mul_(0.5).float()
    dist.all_reduce(wide)
    grad.copy_(wide)


SAFE = ("torch.nn.Linear",)


def _safe_by_hand() -> Outcome:
    """Autocast in bf16; gradients of linear layers are averaged in bf16, the others in fp32."""
    model = Tiny()
    narrow = {id(p) for layer in (model.first, model.last) for p in layer.parameters()}
    optimizer = torch.optim.AdamW(decay_groups(model), **ADAMW, fused=True)  # type: ignore[arg-type]
    for step in range(STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(batch(step, dist.get_rank()))
        out.float().square().mean().backward()
        for param in model.parameters():
            assert param.grad is not None
            wire = (param.grad * 0.5).to(torch.bfloat16 if id(param) in narrow else torch.float32)
            dist.all_reduce(wire)
            param.grad.copy_(wire)
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": weights(model)}


class Uneven(nn.Module):
    """Rank 0 takes one branch, rank 1 the other; a third is never taken."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank() + 10 if dist.is_initialized() else 10)
        self.common = nn.Linear(16, 16)
        self.branches = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.register_buffer("table", torch.randn(3))
        self.branch = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.branches[self.branch](self.frozen(self.common(x)))


class Twice(nn.Module):
    """One layer in two re-entrant checkpoints: its gradient arrives twice in one backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 16)
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=True)
        return x


def _uneven(stage: int, offload: str) -> Outcome:
    model = Uneven()
    engine = make_engine(model, stage=stage, offload=offload)
    initial = {**weights(model), "table": model.table.clone()}
    model.branch = dist.get_rank()
    return {"initial": initial, **_train(engine)}


def _no_sync(stage: int) -> Outcome:
    engine = make_engine(Tiny(), stage=stage)
    for step in range(STEPS):
        with engine.no_sync():
            engine.backward(loss_of(engine, batch(step, dist.get_rank())) / 2)
            engine.step()
        engine.backward(loss_of(engine, batch(step, 2 + dist.get_rank())) / 2)
        engine.step()
    return {"weights": weights(engine.module), "steps": engine.global_steps}


def _memory(stage: int) -> Outcome:
    engine = make_engine(Tiny(), stage=stage, gradient_accumulation_steps=2)
    grads = engine.parts.grads
    assert grads is not None
    full = sum(layout.padded_numel for layout in engine.parts.layouts) * 4
    sizes = []
    for micro in range(2):
        engine.backward(loss_of(engine, batch(0, micro)))
        sizes.append(grads.num_bytes)
        if micro == 0:
            engine.step()
    kept = [p.grad is not None for p in engine.module.parameters()]
    name, param = next(iter(engine.module.named_parameters()))
    grad = safe_get_full_grad(param)
    engine.step()
    moments = engine.memory_report()["device"]["moments"]
    return {"full": full, "sizes": sizes, "kept": any(kept), "grad": {name: grad}, "moments": moments}


def _widths() -> dict[str, list[float]]:
    """Bytes of bf16 gradients an element of this rank's shards after each of three micro-steps, two of them summed."""
    found = {}
    for wire in (None, "fp32"):
        engine = make_engine(Tiny(), stage=2, precision="bf16", communication_dtype=wire)
        assert engine.parts.grads is not None
        elements = sum(layout.shard_numel for layout in engine.parts.layouts)
        sizes = []
        for is_last in (True, False, True):
            engine.set_gradient_accumulation_boundary(is_last)
            engine.backward(loss_of(engine, batch(0, dist.get_rank()).bfloat16()))
            sizes.append(engine.parts.grads.num_bytes / elements)
            engine.step()
        found[str(wire)] = sizes
    for name, micros, passes in (("two passes a step", 1, 2), ("accumulation", 2, 1)):
        engine = make_engine(Tiny(), stage=2, precision="bf16", gradient_accumulation_steps=micros)
        assert engine.parts.grads is not None
        found[name] = [engine.parts.grads.num_bytes / elements]
        for _ in range(passes):
            engine.backward(loss_of(engine, batch(0, dist.get_rank()).bfloat16()))
        found[name].append(engine.parts.grads.num_bytes / elements)
    return found


def _small_after_large(stage: int, offload: str) -> dict[str | None, set[float]]:
    """Values of the gradients when a micro-step of 256 and eight of 1 were added up; by ``grad_accum_dtype``."""
    found = {}
    for kept in (None, "fp32", "bf16"):
        options = {"precision": "bf16", "gradient_accumulation_steps": 9, "grad_accum_dtype": kept}
        engine = make_engine(Tiny(), stage=stage, offload=offload, **options)
        params = engine.parts.params
        for size in (256.0, *[1.0] * 8):
            engine.backward(size * sum(param.float().sum() for param in params), scale_wrt_gas=False)  # type: ignore[arg-type]
            grads = [safe_get_full_grad(param) for param in params]
            engine.step()
        found[kept] = {value for grad in grads if grad is not None for value in grad.unique().tolist()}
        engine.destroy()
    return found


def _overflow(stage: int, bad_rank: int) -> Outcome:
    rules = LossScaleSettings(initial_scale_power=1, hysteresis=1, min_scale=1.0)
    engine = make_engine(Tiny(), stage=stage, precision="fp16", loss_scale=rules)
    trace = []
    for step in range(3):
        bad = step == 1 and dist.get_rank() == bad_rank
        engine.backward(loss_of(engine, batch(step, dist.get_rank()).half()) * (float("inf") if bad else 1.0))
        engine.step()
        trace.append((engine.skipped_steps, engine.loss_scale))
    try:
        out = engine.module.last(batch(0).half()).float().square().mean()
        engine.backward(out * float("inf") if dist.get_rank() == bad_rank else out)
        engine.step()
    except LossScaleError as error:
        message = str(error)
    return {"trace": trace, "weights": weights(engine.module), "message": message}


def _client(stage: int) -> Outcome | str:
    model = Tiny()
    client = Adafactor(decay_groups(model), lr=0.01, relative_step=False)
    try:
        return _train(make_engine(model, stage=stage, client_optimizer=client))
    except UnsupportedFeature as error:
        return str(error)


def _states(stage: int) -> Outcome:
    engine = make_engine(Tiny(), stage=stage, precision="bf16")
    for step in range(2):
        engine.backward(loss_of(engine, batch(step, dist.get_rank()).bfloat16()))
        engine.step()
    params = dict(engine.module.named_parameters())
    seen = {
        kind: {name: safe_get_full_optimizer_state(param, kind) for name, param in params.items()}
        for kind in ("exp_avg", "exp_avg_sq")
    }
    seen["master"] = {name: safe_get_full_fp32_param(param) for name, param in params.items()}
    with GatheredParameters([params["last.weight"], params["first.bias"]], modifier_rank=1), torch.no_grad():
        params["last.weight"].fill_(float(dist.get_rank() + 3))
        params["first.bias"].fill_(float(dist.get_rank() + 5))
    seen["changed"] = {name: safe_get_full_fp32_param(params[name]) for name in ("last.weight", "first.bias")}
    seen["weights"] = weights(engine.module)
    return seen


def _reentrant(stage: int, overlap: bool) -> Outcome | str:
    try:
        return _train(make_engine(Twice(), stage=stage, overlap_comm=overlap), rows=_needing_grad)
    except HfZeroError as error:
        return str(error)


def _needing_grad(step: int, micro: int) -> Tensor:
    return batch(step, micro).requires_grad_()


def _everything() -> dict[Any, Any]:
    assembly.BUCKET_NUMEL = 256
    options: dict[str, Any]
    results: dict[Any, Any] = {"ddp": _ddp(0.0), "ddp clip": _ddp(0.5), "ddp micro": _ddp(0.0, 2)}
    results["bf16 by hand"] = _half(_mean_in_bf16)
    results["bf16 on fp32 wire by hand"] = _half(_mean_on_fp32_wire)
    results["safe by hand"] = _safe_by_hand()
    results["widths"] = _widths()
    for stage in (0, 1, 2):
        for name, modules in (("safe", SAFE), ("nothing safe", ())):
            options = {"stage": stage, "autocast": "bf16", "lower_precision_safe_modules": modules}
            results[name, stage] = _train(make_engine(Tiny(), gradient_clipping=0.0, **options))
        for offload in OFFLOADS:
            options = {"stage": stage, "offload": offload}
            results["plain", stage, offload] = _train(make_engine(Tiny(), gradient_clipping=0.0, **options))
            results["clip", stage, offload] = _train(make_engine(Tiny(), gradient_clipping=0.5, **options))
            micro = make_engine(Tiny(), gradient_clipping=0.0, gradient_accumulation_steps=2, **options)
            results["micro", stage, offload] = _train(micro, 2)
            results["bf16", stage, offload] = _train(make_engine(Tiny(), precision="bf16", **options))
            summed = make_engine(Tiny(), precision="bf16", gradient_accumulation_steps=2, **options)
            results["bf16 micro", stage, offload] = _train(summed, 2)
            results["uneven", stage, offload] = _uneven(stage, offload)
            results["small after large", stage, offload] = _small_after_large(stage, offload)
        wire = make_engine(Tiny(), stage=stage, precision="bf16", communication_dtype="fp32")
        results["fp32 wire", stage] = _train(wire)
        options = {"stage": stage, "prescale_gradients": True, "gradient_predivide_factor": 4.0}
        results["predivide", stage] = _train(make_engine(Tiny(), gradient_clipping=0.0, **options))
        sgd = OptimizerSettings(type="SGD", params={"lr": 0.1})
        summed = {"optimizer": sgd, "gradient_clipping": 0.0, "gradient_allreduce_op": "sum", "stage": stage}
        results["sum", stage] = _train(make_engine(Tiny(), **summed))
        results["no overlap", stage] = _train(
            make_engine(Tiny(), gradient_clipping=0.0, stage=stage, overlap_comm=False)
        )
        results["no_sync", stage] = _no_sync(stage)
        results["memory", stage] = _memory(stage)
        results["overflow", stage] = _overflow(stage, bad_rank=1)
        results["client", stage] = _client(stage)
        results["states", stage] = _states(stage)
        results["reentrant", stage] = _reentrant(stage, True)
        results["reentrant without overlap", stage] = _reentrant(stage, False)
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return run_ranks(_everything, 2)


STAGES = pytest.mark.parametrize("stage", [0, 1, 2])
OFFLOAD = pytest.mark.parametrize("offload", OFFLOADS)
Ranks = list[dict[Any, Any]]


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def _close(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float = 1e-6) -> None:
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=atol)


@STAGES
@OFFLOAD
def test_unclipped_training_equals_stock_ddp_to_the_bit(ranks: Ranks, stage: int, offload: str) -> None:
    for rank in ranks:
        ours = rank["plain", stage, offload]
        assert ours["losses"] == rank["ddp"]["losses"]
        _same(ours["weights"], rank["ddp"]["weights"])


@STAGES
@OFFLOAD
def test_clipped_training_equals_stock_ddp(ranks: Ranks, stage: int, offload: str) -> None:
    """To the bit at stage 0. Stages 1 and 2 add the squares of shards in another order: the norm's last bit."""
    for rank in ranks:
        ours, theirs = rank["clip", stage, offload], rank["ddp clip"]
        assert min(theirs["norms"]) > 0.5, "the clip must have had an effect"
        if stage == 0:
            assert ours["norms"] == theirs["norms"]
            _same(ours["weights"], theirs["weights"])
        else:
            assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
            _close(ours["weights"], theirs["weights"])


@STAGES
@OFFLOAD
def test_accumulation_equals_ddp_with_no_sync(ranks: Ranks, stage: int, offload: str) -> None:
    """To the bit where gradients are summed before the reduction; stage 2 reduces every micro-step."""
    for rank in ranks:
        ours, theirs = rank["micro", stage, offload], rank["ddp micro"]
        if stage < 2:
            assert ours["losses"] == theirs["losses"]
            _same(ours["weights"], theirs["weights"])
        else:
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
            _close(ours["weights"], theirs["weights"])


@STAGES
@OFFLOAD
@pytest.mark.parametrize("case", ["plain", "clip", "micro", "bf16", "uneven"])
def test_ranks_agree_on_weights_and_norm(ranks: Ranks, case: str, stage: int, offload: str) -> None:
    first, second = (rank[case, stage, offload] for rank in ranks)
    assert first["norms"] == second["norms"]
    _same(first["weights"], second["weights"])


@STAGES
@pytest.mark.parametrize("case", ["plain", "clip", "micro", "bf16", "uneven"])
@pytest.mark.parametrize("offload", ["cpu", "host thread"])
def test_offload_changes_no_bit(ranks: Ranks, case: str, stage: int, offload: str) -> None:
    for rank in ranks:
        assert rank[case, stage, offload]["losses"] == rank[case, stage, "none"]["losses"]
        _same(rank[case, stage, offload]["weights"], rank[case, stage, "none"]["weights"])


@STAGES
def test_two_ranks_equal_one_process_with_the_whole_batch(ranks: Ranks, stage: int) -> None:
    engine = make_engine(Tiny(), gradient_clipping=0.5)
    norms = []
    for step in range(STEPS):
        engine.backward(loss_of(engine, torch.cat([batch(step, 0), batch(step, 1)])))
        engine.step()
        norms.append(engine.get_global_grad_norm())
    ours = ranks[0]["clip", stage, "none"]
    assert ours["norms"] == pytest.approx(norms, rel=1e-5)
    _close(ours["weights"], weights(engine.module), atol=2e-6)


@STAGES
def test_bf16_equals_fp32_masters_by_hand(ranks: Ranks, stage: int) -> None:
    """Gradients are averaged in bf16 unless communication_data_type says otherwise. Stages 1 and 2: see the norm."""
    for case, reference in (
        (("bf16", stage, "none"), "bf16 by hand"),
        (("fp32 wire", stage), "bf16 on fp32 wire by hand"),
    ):
        for rank in ranks:
            ours, theirs = rank[case], rank[reference]
            if stage == 0:
                assert ours["norms"] == theirs["norms"]
                _same(ours["weights"], theirs["weights"])
            else:
                assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-2)
                _close(ours["weights"], theirs["weights"], atol=1e-2)


@STAGES
def test_predivision_sums_and_missing_overlap_change_only_the_order(ranks: Ranks, stage: int) -> None:
    plain = ranks[0]["plain", stage, "none"]["weights"]
    _close(ranks[0]["predivide", stage]["weights"], plain)
    _same(ranks[0]["no overlap", stage]["weights"], plain)


@STAGES
def test_gradients_of_safe_modules_travel_in_low_precision(ranks: Ranks, stage: int) -> None:
    """To the bit, and not what fp32 on the wire gives."""
    for rank in ranks:
        ours = rank["safe", stage]["weights"]
        _same(ours, rank["safe by hand"]["weights"])
        assert any(not torch.equal(w, rank["nothing safe", stage]["weights"][n]) for n, w in ours.items())


@STAGES
def test_sum_instead_of_mean_doubles_the_gradient_of_two_ranks(ranks: Ranks, stage: int) -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(decay_groups(model), lr=0.1)
    for step in range(STEPS):
        loss = loss_of(model, batch(step, 0)) + loss_of(model, batch(step, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _close(ranks[0]["sum", stage]["weights"], weights(model))


@STAGES
@OFFLOAD
def test_ranks_start_from_rank_zero(ranks: Ranks, stage: int, offload: str) -> None:
    """Trained and frozen parameters and buffers, although every rank drew its own."""
    torch.manual_seed(10)
    expected = Uneven()
    for rank in ranks:
        _same(rank["uneven", stage, offload]["initial"], {**weights(expected), "table": expected.table})


@STAGES
@OFFLOAD
def test_ranks_may_use_different_branches(ranks: Ranks, stage: int, offload: str) -> None:
    """The reference gives the mean of both ranks' losses to one process."""
    model = Uneven()
    optimizer = torch.optim.AdamW(decay_groups(model), **ADAMW, fused=True)  # type: ignore[arg-type]
    for step in range(STEPS):
        total = torch.zeros(())
        for rank in range(2):
            model.branch = rank
            total = total + loss_of(model, batch(step, rank)) / 2
        total.backward()
        for param in model.parameters():
            if param.requires_grad and param.grad is None:
                param.grad = torch.zeros_like(param)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _close(ranks[1]["uneven", stage, offload]["weights"], weights(model))


@STAGES
def test_no_sync_equals_accumulation(ranks: Ranks, stage: int) -> None:
    reference = Reference(Tiny())
    for step in range(STEPS):
        rows = [torch.cat([batch(step, 2 * micro), batch(step, 2 * micro + 1)]) for micro in range(2)]
        reference.step([lambda x=x: loss_of(reference.model, x) for x in rows])  # type: ignore[misc]
    assert ranks[0]["no_sync", stage]["steps"] == STEPS
    _close(ranks[0]["no_sync", stage]["weights"], weights(reference.model))
    _same(ranks[0]["no_sync", stage]["weights"], ranks[1]["no_sync", stage]["weights"])


@STAGES
def test_what_a_stage_keeps_in_memory(ranks: Ranks, stage: int) -> None:
    for rank in ranks:
        seen = rank["memory", stage]
        grads = seen["full"] // 2 if stage == 2 else seen["full"]
        assert seen["sizes"] == [grads, grads]
        assert seen["kept"] == (stage < 2), "no parameter keeps a gradient of its own at stage 2"
        assert seen["moments"] == (2 * seen["full"] if stage == 0 else seen["full"])


def test_shards_of_half_precision_gradients_widen_when_they_are_summed(ranks: Ranks) -> None:
    for rank in ranks:
        passes, planned = rank["widths"].pop("two passes a step"), rank["widths"].pop("accumulation")
        assert rank["widths"] == {"None": [2, 4, 4], "fp32": [4, 4, 4]}
        assert (passes, planned) == ([2, 4], [4, 4])


@pytest.mark.parametrize("offload", OFFLOADS)
def test_sums_of_half_precision_gradients_lose_no_more_than_a_rounding_on_the_wire(ranks: Ranks, offload: str) -> None:
    """Stage 1 sums in fp32 and rounds once for the wire, stage 2 rounds every micro-step for it, and sums in fp32."""
    for stage in (0, 1, 2):
        _close(ranks[0]["bf16 micro", stage, offload]["weights"], ranks[0]["bf16 micro", 0, "none"]["weights"], 2e-2)


@STAGES
@pytest.mark.parametrize("offload", OFFLOADS)
def test_small_gradients_are_not_lost_in_a_large_sum(ranks: Ranks, stage: int, offload: str) -> None:
    """256 and 1 is 256 in bf16, eight times over."""
    for rank in ranks:
        assert rank["small after large", stage, offload] == {None: {264.0}, "fp32": {264.0}, "bf16": {256.0}}


@STAGES
def test_full_gradient_is_the_mean_over_ranks(ranks: Ranks, stage: int) -> None:
    """Between backward and step, accumulated over two micro-steps that both ranks see alike."""
    model = Tiny()
    ((loss_of(model, batch(0, 0)) + loss_of(model, batch(0, 1))) / 2).backward()
    for rank in ranks:
        for name, grad in rank["memory", stage]["grad"].items():
            torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-6, atol=1e-7)


@STAGES
def test_overflow_on_one_rank_is_everybodys(ranks: Ranks, stage: int) -> None:
    first, second = (rank["overflow", stage] for rank in ranks)
    assert first["trace"] == second["trace"] == [(0, 2.0), (1, 1.0), (1, 1.0)]
    _same(first["weights"], second["weights"])


@STAGES
def test_every_rank_names_the_same_culprit(ranks: Ranks, stage: int) -> None:
    first, second = (rank["overflow", stage]["message"] for rank in ranks)
    assert first == second
    assert "non-finite gradient: last." in first


def test_optimizers_that_need_whole_parameters_work_at_stage_0(ranks: Ranks) -> None:
    reference = Reference(Tiny(), optimizer=lambda groups: Adafactor(groups, lr=0.01, relative_step=False))
    for step in range(STEPS):
        x = torch.cat([batch(step, 0), batch(step, 1)])
        reference.step([lambda x=x: loss_of(reference.model, x)])  # type: ignore[misc]
    for rank in ranks:
        _close(rank["client", 0]["weights"], weights(reference.model), atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_optimizers_that_need_whole_parameters_are_refused_where_they_are_cut(ranks: Ranks, stage: int) -> None:
    for rank in ranks:
        assert "Adafactor" in rank["client", stage]
        assert "stage 0" in rank["client", stage]


@STAGES
@pytest.mark.parametrize("kind", ["master", "exp_avg", "exp_avg_sq"])
def test_full_states_are_gathered_on_every_rank(ranks: Ranks, stage: int, kind: str) -> None:
    first, second = (rank["states", stage][kind] for rank in ranks)
    _same(first, second)
    assert all(tensor.abs().sum() > 0 for tensor in first.values())
    _close(first, ranks[0]["states", 0][kind], atol=1e-3)


@STAGES
def test_one_ranks_change_of_gathered_parameters_is_everybodys(ranks: Ranks, stage: int) -> None:
    for rank in ranks:
        seen = rank["states", stage]
        for name, value in (("last.weight", 4.0), ("first.bias", 6.0)):
            assert (seen["changed"][name] == value).all()
            assert (seen["weights"][name] == value).all()


@STAGES
def test_a_layer_in_two_reentrant_checkpoints_is_refused_with_a_remedy_that_works(ranks: Ranks, stage: int) -> None:
    model = Twice()
    optimizer = torch.optim.AdamW(decay_groups(model), **ADAMW, fused=True)  # type: ignore[arg-type]
    for step in range(STEPS):
        loss_of(model, torch.cat([batch(step, 0), batch(step, 1)]).requires_grad_()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for rank in ranks:
        assert "overlap_comm" in rank["reentrant", stage]
        assert "'layer." in rank["reentrant", stage]
        _close(rank["reentrant without overlap", stage]["weights"], weights(model))
