"""Stage 3 on one and two gloo ranks: the same training as stage 0, whatever is sharded, offloaded or kept whole.

Starting ranks costs seconds, so ``_cases`` and ``_resume`` run everything in one go and the tests look at results.
"""

from __future__ import annotations

import itertools
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_zero_plugin.config.settings import Stage3Settings
from hf_zero_plugin.engine.fsdp import _num_kept, find_units, fsdp_modules
from hf_zero_plugin.engine.sharded_assembly import _names_to_cut
from hf_zero_plugin.engine.shards import span_of
from hf_zero_plugin.errors import CollectiveError, HfZeroError
from hf_zero_plugin.integration.sharded_init import Init
from hf_zero_plugin.integration.tensor_access import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_set_full_fp32_param,
    safe_set_local_optimizer_state,
)
from hf_zero_plugin.integration.zero_api import GatheredParameters, ZeroParamStatus, set_z3_leaf_modules
from tests.helpers import run_ranks

from .stage3 import Block, Net, batch, engine_for, loss_of, rank_and_size, train

BIG = 10**6
CASES: dict[str, dict[str, Any]] = {
    "all sharded": {},
    "small ones whole": {"whole": 25},
    "all whole": {"whole": BIG},
    "states offloaded": {"states_on": "cpu", "whole": 25},
    "weights offloaded": {"params_on": "cpu"},
    "both offloaded": {"params_on": "cpu", "states_on": "cpu", "whole": 25},
    "both offloaded, host thread": {"params_on": "cpu", "states_on": "cpu", "offload": {"step_on": "host"}},
    "nothing stays gathered": {"stage3": {"max_live_parameters": 0}},
    "far prefetch": {"stage3": {"prefetch_bucket_size": BIG, "max_live_parameters": 0}},
    "tiny buckets": {"reduce_bucket_size": 64},
    "one unit": {"stage3": {"leaf_module_classes": ("Net",)}},
}
PAIRS: dict[str, dict[str, Any]] = {
    "accumulation": {"micros": 3},
    "no clipping": {"gradient_clipping": 0.0},
    "frozen": {"frozen": True},
    "sum": {"gradient_allreduce_op": "sum"},
    "bf16": {"precision": "bf16"},
    "bf16 accumulation": {"precision": "bf16", "micros": 2},
}


def _cases() -> dict[str, Any]:
    results: dict[str, Any] = {"stage 0": train(engine_for(stage=0))}
    for name, options in CASES.items():
        results[name] = train(engine_for(**options))
    for name, options in PAIRS.items():
        results[name] = train(engine_for(**options)), train(engine_for(stage=0, **options))
        results[f"{name}, offloaded"] = train(engine_for(params_on="cpu", states_on="cpu", whole=25, **options))
    results["overflow"] = (
        train(engine_for(precision="fp16"), poison=2),
        train(engine_for(stage=0, precision="fp16"), poison=2),
    )
    results["second engine"] = _second_engine()
    results["evaluation"] = _evaluation()
    results["gathering"] = _gathering()
    results["states"] = _states()
    results["init"] = _init()
    return results


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return run_ranks(_cases, 1, timeout_s=300.0)[0]


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    return run_ranks(_cases, 2, timeout_s=400.0)[0]


def _assert_same(found: dict[str, Any], wanted: dict[str, Any], atol: float = 2e-6, rtol: float = 1e-6) -> None:
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, tensor in wanted["weights"].items():
        torch.testing.assert_close(
            found["weights"][name], tensor, atol=atol, rtol=rtol, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert found["norms"] == pytest.approx(wanted["norms"], rel=max(rtol, 1e-5), nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equals_stage_0(name: str, one: dict[str, Any]) -> None:
    _assert_same(one[name], one["stage 0"])
    assert one[name]["losses"] == pytest.approx(one["stage 0"]["losses"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(name: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    _assert_same(two[name], one["stage 0"])


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_stage_0_with(name: str, world_size: int, one: dict[str, Any], two: dict[str, Any]) -> None:
    """With bf16 the ranks' gradients are rounded when they are summed, in another order than at stage 0."""
    results = one if world_size == 1 else two
    stage3, stage0 = results[name]
    atol = 2e-6 if "bf16" not in name else 2e-2
    _assert_same(stage3, stage0, atol, 1e-6 if "bf16" not in name else 1e-2)
    _assert_same(results[f"{name}, offloaded"], stage3, atol, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_overflow_is_skipped_by_all(world_size: int, one: dict[str, Any], two: dict[str, Any]) -> None:
    stage3, stage0 = (one if world_size == 1 else two)["overflow"]
    assert stage3["skipped"] == stage0["skipped"] == 1
    _assert_same(stage3, stage0, 1e-3, 1e-3)


def _second_engine() -> dict[str, Any]:
    """The model stays sharded when its engine ends; the next engine goes on from its weights."""
    model = Net()
    first = engine_for(model, whole=25)
    train(first, 2)
    first.destroy()
    between = loss_of(model, batch(0)).item()
    again = train(engine_for(model, whole=25), 2)

    plain = Net()
    reference = engine_for(plain, stage=0)
    train(reference, 2)
    reference.destroy()
    return {"sharded": again, "plain": train(engine_for(plain, stage=0), 2), "between": between}


@pytest.mark.slow
def test_a_second_engine_takes_over(one: dict[str, Any], two: dict[str, Any]) -> None:
    for results in (one, two):
        _assert_same(results["second engine"]["sharded"], results["second engine"]["plain"])
    assert one["second engine"]["between"] > 0


def _evaluation() -> dict[str, Any]:
    """Forward passes of the bare model, without an optimizer, in training mode and under no_grad."""
    model, plain = Net(), Net()
    engine = engine_for(model, trains=False)
    with torch.no_grad():
        first, second = loss_of(model, batch(0)).item(), loss_of(model, batch(1)).item()
    stays = [name for name, param in model.named_parameters() if type(param) is nn.Parameter and param.ndim]
    engine.destroy()
    trained = train(engine_for(model), 2)
    return {
        "found": (first, second),
        "wanted": (loss_of(plain, batch(0)).item(), loss_of(plain, batch(1)).item()),
        "gathered": stays,
        "trained": trained,
        "reference": train(engine_for(stage=0), 2),
    }


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_before_training(world_size: int, one: dict[str, Any], two: dict[str, Any]) -> None:
    result = (one if world_size == 1 else two)["evaluation"]
    assert result["found"] == pytest.approx(result["wanted"], abs=1e-6)
    assert result["gathered"] == []
    _assert_same(result["trained"], result["reference"])


def _changes_of_untrained(changer: int) -> dict[str, bool]:
    """Whole parameters that no engine trains: of a model that is only evaluated, and frozen ones at any stage."""
    engines = {"evaluated": engine_for(whole=25, trains=False)}
    engines |= {f"frozen at stage {stage}": engine_for(stage=stage, whole=25, frozen=True) for stage in (1, 2, 3)}
    taken = {}
    for what, engine in engines.items():
        norm = dict(engine.module.named_parameters())["layers.0.norm.weight"]
        with GatheredParameters(norm, modifier_rank=changer):
            norm.data.fill_(float(rank_and_size()[0] + 3))
        taken[f"whole parameters, {what}"] = bool((norm == changer + 3).all())
        engine.destroy()
    return taken


def _seen_while_running() -> set[tuple[str, Any, int]]:
    """(kind, ds_status, ds_numel) of parameters, whole and sharded, inside the forward pass that uses them."""
    seen: set[tuple[str, Any, int]] = set()
    engine = engine_for(whole=25)
    layer = engine.module.layers[1]

    def look(module: Block, *_: Any) -> None:
        for kind, param in (("whole", module.norm.weight), ("sharded", module.up.weight)):
            assert param.shape.numel() == param.ds_numel
            seen.add((kind, param.ds_status, param.ds_numel))

    layer.norm.register_forward_hook(lambda *_: look(layer))
    train(engine, 2)
    return seen


def _gathering() -> dict[str, bool]:
    rank, world_size = rank_and_size()
    model, plain = Net(), dict(Net().named_parameters())
    held = list(model.parameters())
    engine = engine_for(model, whole=25)
    named = dict(model.named_parameters())
    in_some_order = list(named.values())[:: 1 if rank == 0 else -1]
    with GatheredParameters([None, *in_some_order, in_some_order[0]]):
        equal = all(torch.equal(named[name].data, plain[name].data) for name in named)
        computes = torch.equal(model.layers[0].up.weight @ torch.ones(10), plain["layers.0.up.weight"] @ torch.ones(10))
        shapes = all(param.shape == plain[name].shape for name, param in named.items())
    param = named["layers.1.down.weight"]
    changer = world_size - 1
    with GatheredParameters(param), GatheredParameters([param], modifier_rank=changer):
        available = param.ds_status is ZeroParamStatus.AVAILABLE
        if rank == changer:
            param.data.fill_(7.0)
            with torch.no_grad():
                param[0, 0] += 1
    original = held[list(named).index("layers.1.down.weight")]
    with GatheredParameters(original):
        by_old_object = original[0, 0].item() == 8.0 and original[9, 29].item() == 7.0
    with GatheredParameters(param):
        param.data.zero_()
    with GatheredParameters(param):
        dropped = bool(param.sum() > 7)
    try:
        with GatheredParameters(param, modifier_rank=0):
            param.data.zero_()
            raise KeyError
    except KeyError:
        pass
    master = safe_get_full_fp32_param(param)
    assert master is not None
    result = {
        "whole values": equal,
        "takes part in computing": computes,
        "whole shapes": shapes,
        "marked available": available,
        "found by the parameter as it was": by_old_object,
        "unmodified contexts drop changes": dropped,
        "errors drop changes": master[0, 0].item() == 8.0,
        "attributes": param.ds_numel == 300 and param.ds_shape == (10, 30),
        "sharded again": world_size == 1 or param.data.to_local().numel() == 150,
        "trains on": train(engine, 1)["losses"][0] > 0,
        "unavailable between uses": param.ds_status is ZeroParamStatus.NOT_AVAILABLE,
        "available while it is used": _seen_while_running()
        == {("whole", ZeroParamStatus.AVAILABLE, 10), ("sharded", ZeroParamStatus.AVAILABLE, 300)},
    }
    result |= _changes_of_untrained(changer)
    try:
        with GatheredParameters(param, modifier_rank=0):
            param.data = torch.zeros(3)
    except HfZeroError as error:
        result["another shape is refused"] = "layers.1.down.weight" in str(error)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_gathered_parameters(world_size: int, one: dict[str, Any], two: dict[str, Any]) -> None:
    result = (one if world_size == 1 else two)["gathering"]
    assert all(result.values()), [what for what, holds in result.items() if not holds]
    assert "another shape is refused" in result


def _states() -> dict[str, Any]:
    model = Net()
    engine = engine_for(model, params_on="cpu")
    param = dict(model.named_parameters())["embed.weight"]
    engine.backward(loss_of(engine, batch(0)))
    grad, local = safe_get_full_grad(param), safe_get_local_grad(param)
    engine.step()
    moment = safe_get_full_optimizer_state(param, "exp_avg")
    safe_set_full_fp32_param(param, torch.full((7, 10), 2.0))
    with GatheredParameters(param):
        written = param.data.eq(2.0).all().item()
    part = safe_get_local_fp32_param(param)
    assert part is not None
    safe_set_local_optimizer_state(param, torch.ones_like(part), "exp_avg")
    ones = safe_get_full_optimizer_state(param, "exp_avg")
    assert grad is not None and local is not None and moment is not None and ones is not None
    return {"grad": grad, "local": local.numel(), "moment": moment, "written": written, "ones": ones.mean().item()}


@pytest.mark.slow
def test_states_by_parameter(one: dict[str, Any], two: dict[str, Any]) -> None:
    torch.testing.assert_close(one["states"]["grad"], two["states"]["grad"])
    torch.testing.assert_close(one["states"]["moment"], two["states"]["moment"], atol=1e-6, rtol=1e-4)
    assert (one["states"]["local"], two["states"]["local"]) == (70, 40)  # 4 of 7 rows on rank 0
    for results in (one, two):
        assert results["states"]["written"]
        assert results["states"]["ones"] == 1.0


def _init() -> dict[str, Any]:
    """Other ranks build another model, without memory: rank 0's values count, buffers are real."""
    rank, world_size = rank_and_size()
    with Init():
        model = Net(seed=rank)
    absent = all(param.is_meta for param in model.parameters())
    seen = torch.zeros(7, 10)
    with GatheredParameters(model.embed.weight):
        seen.copy_(model.embed.weight.data)
    with GatheredParameters(model.embed.weight, modifier_rank=world_size - 1):
        if rank == world_size - 1:
            model.embed.weight.data[0] = 3.0
    with GatheredParameters(model.embed.weight, modifier_rank=0):
        if rank == 0:
            model.embed.weight.data[1] = 4.0
    again = all(param.is_meta for param in model.parameters())
    offset = model.offset.sum().item()
    weights = engine_for(model)._zero3_consolidated_16bit_state_dict()
    flags = [torch.tensor([float(absent), float(again), offset])]
    if world_size > 1:
        flags = [torch.zeros(3) for _ in range(world_size)]
        dist.all_gather(flags, torch.tensor([float(absent), float(again), offset]))
    return {"seen": seen, "weights": weights, "flags": [flag.tolist() for flag in flags]}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_init_keeps_values_on_rank_0_only(world_size: int, one: dict[str, Any], two: dict[str, Any]) -> None:
    result, plain = (one if world_size == 1 else two)["init"], Net()
    assert result["flags"] == [[float(rank > 0), float(rank > 0), 2.5] for rank in range(world_size)]
    torch.testing.assert_close(result["seen"], plain.embed.weight.data)
    plain.embed.weight.data[0], plain.embed.weight.data[1] = 3.0, 4.0
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(result["weights"][name], tensor, atol=0, rtol=0)


SAVES = {
    "stage 3": {},
    "stage 3 offloaded": {"params_on": "cpu", "whole": 25},
    "stage 2": {"stage": 2},
    "stage 0": {"stage": 0},
}


def _save(root: str) -> dict[str, Any]:
    _, world_size = rank_and_size()
    results = {}
    for name, options in SAVES.items():
        engine = engine_for(frozen=True, **options)
        train(engine, 2)
        engine.save_checkpoint(f"{root}/{name} x{world_size}")
        results[name] = train(engine, 2, first=2)
    return results


def _resume(root: str) -> dict[str, Any]:
    results = {}
    for saved in sorted(Path(root).iterdir()):
        for name, options in SAVES.items():
            engine = engine_for(Net(seed=5, frozen=True), **options)
            path, _ = engine.load_checkpoint(str(saved))
            assert path is not None
            results[saved.name, name] = train(engine, 2, first=2)
    return results


@pytest.mark.slow
def test_resume_across_stages_and_world_sizes(tmp_path: Path) -> None:
    wanted = run_ranks(_save, 1, str(tmp_path))[0]["stage 0"]
    run_ranks(_save, 2, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2 * len(SAVES)
    for world_size in (1, 2):
        found = run_ranks(_resume, world_size, str(tmp_path), timeout_s=300.0)[0]
        assert len(found) == 2 * len(SAVES) ** 2
        for how, result in found.items():
            try:
                _assert_same(result, wanted)
            except AssertionError as error:
                raise AssertionError(f"saved as {how[0]}, resumed at {how[1]} on {world_size}: {error}") from error


def _missing_rank() -> str:
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))
    engine = engine_for()
    train(engine, 1)
    if dist.get_rank() == 1:
        time.sleep(6)
        return ""
    with pytest.raises(CollectiveError) as caught:
        loss_of(engine, batch(0))
    return str(caught.value)


@pytest.mark.slow
def test_a_missing_rank_is_named() -> None:
    """Who waits says where and when, and for which part of the model and which parameters."""
    text = run_ranks(_missing_rank, 2, init_process_group=False)[0]
    assert "rank 0 of 2, step 2, gathering the root (parameters embed.weight to scale" in text.replace(
        "norm.bias", "scale"
    )
    assert "HF_ZERO_COLLECTIVE_TIMEOUT" in text


# ------------------------------------------------------------------ without processes


def test_span_is_rows_rounded_up_and_covers_all() -> None:
    for rows in range(1, 12):
        for world_size in range(1, 7):
            spans = [span_of((rows, 3), rank, world_size) for rank in range(world_size)]
            assert spans[0].start == 0
            assert spans[-1].end == 3 * rows
            assert all(a.end == b.start for a, b in itertools.pairwise(spans))
            assert {span.end - span.start + span.padding for span in spans} == {3 * -(-rows // world_size)}
            chunks = torch.arange(3 * rows).view(rows, 3).chunk(world_size)
            assert [chunk.numel() for chunk in chunks] == [s.end - s.start for s in spans if s.end > s.start]


class _Shares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(4) for _ in range(3))
        self.layers[1].up.weight = self.layers[0].up.weight


def test_units_are_blocks_that_share_nothing() -> None:
    model = Net()
    assert find_units(model) == list(model.layers)
    shared = _Shares()
    assert find_units(shared) == [shared.layers[2]]


def test_units_are_what_the_model_calls_indivisible() -> None:
    model = Net()
    model._no_split_modules = ["LayerNorm"]  # type: ignore[assignment]
    assert find_units(model) == [layer.norm for layer in model.layers] + [model.norm]


def test_leaf_modules_are_units() -> None:
    model = Net()
    assert set_z3_leaf_modules(model, ["Linear"])[0] is model.layers[0].up
    assert model.idle in find_units(model)
    assert find_units(Net(), Stage3Settings(leaf_module_classes=("LayerNorm",)))[-1] is not None
    assert list(fsdp_modules(model)) == []


def test_leaf_modules_may_be_named() -> None:
    model = Net()
    named = find_units(model, Stage3Settings(leaf_module_names=("layers.0.up",)))
    assert named == find_units(model), "the block around it is a unit already"
    assert model.norm in find_units(model, Stage3Settings(leaf_module_names=("norm",)))
    suffixed = find_units(model, Stage3Settings(leaf_module_name_suffixes=("norm", "idle")))
    assert [model.norm in suffixed, model.idle in suffixed] == [True, True]


def test_units_stay_gathered_while_they_fit_and_are_used_again_soon() -> None:
    sizes, total = [10, 20, 30], 100

    def kept(**limits: int) -> int:
        return _num_kept(sizes, total, Stage3Settings(**limits))

    assert kept() == 3
    assert [kept(max_live_parameters=n) for n in (0, 69, 70, 90, 100)] == [0, 0, 1, 2, 3]
    # Between its two uses stand the forward and backward passes of what is behind it: 0, 60 and 100 elements.
    assert [kept(max_reuse_distance=n) for n in (0, 59, 60, 99, 100)] == [1, 1, 2, 2, 3]


def test_small_parameters_stay_whole_up_to_a_limit_for_all_of_them() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def cut(**limits: int) -> set[str]:
        return _names_to_cut(model, Stage3Settings(**limits))

    assert cut(param_persistence_threshold=16) == set()
    assert cut(param_persistence_threshold=4) == {"0.weight", "1.weight"}
    assert cut(param_persistence_threshold=16, model_persistence_threshold=20) == {"1.weight", "1.bias"}
