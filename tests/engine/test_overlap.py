"""The update on its own thread changes nothing, however slow it is and wherever weights are looked at.

Adversarial: thin work over many weights, a bucket per matrix, and an update that sleeps, so that the main thread always
arrives first. A missing wait then gives stale weights with near certainty.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_zero_plugin.engine import assembly, readiness
from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.engine.optimizers import AdamRule
from hf_zero_plugin.errors import HfZeroError
from hf_zero_plugin.integration.tensor_access import safe_get_full_fp32_param, safe_get_full_optimizer_state
from hf_zero_plugin.integration.zero_api import GatheredParameters

from .harness import Tiny, batch, loss_of, make_engine, train, weights

STEPS = 4
THREAD = "hf-zero-host-optimizer"


class Deep(nn.Module):
    """Many thin layers; the first and the last share a weight, and one layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.norm = nn.LayerNorm(16)
        self.last = nn.Linear(16, 16)
        self.last.weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.layers, self.layers[2]]:
            x = x + torch.tanh(layer(x))
        return self.last(self.norm(x))


class Attention(nn.Module):
    """nn.MultiheadAttention reads ``out_proj.weight`` and never calls ``out_proj``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.MultiheadAttention(16, 2) for _ in range(3))
        self.table = nn.Embedding(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        # Read by the module above it, never called.
        return x + self.table.weight.mean(0)


@pytest.fixture(autouse=True)
def tiny_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "BUCKET_NUMEL", 256)


@pytest.fixture
def slow_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    update = AdamRule.update

    def slow(self: AdamRule, *args: Any) -> None:
        if threading.current_thread().name == THREAD:
            time.sleep(0.004)
        update(self, *args)

    monkeypatch.setattr(AdamRule, "update", slow)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    gc.collect()
    for _ in range(200):
        if not _threads():
            break
        time.sleep(0.01)


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def _threads_end() -> None:
    deadline = time.monotonic() + 30
    while _threads() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not _threads()


def _dropped(engine: ZeroEngine) -> weakref.ref[ZeroEngine]:
    """After a whole step: nobody holds it any more when this returns."""
    _one_step(engine)
    engine.synchronize()
    return weakref.ref(engine)


def _one_step(engine: ZeroEngine, step: int = 0) -> None:
    dtype = next(iter(engine.module._parameters.values()), None)
    x = batch(step).to(dtype.dtype if dtype is not None else engine.parts.params[0].dtype)
    engine.backward(loss_of(engine, x))
    engine.step()


@pytest.mark.usefixtures("slow_worker")
@pytest.mark.parametrize("make", [Deep, Attention, lambda: Tiny(tied=True)], ids=["deep", "attention", "tied"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_overlapped_updates_equal_inline_ones_to_the_bit(make: Callable[[], nn.Module], precision: str) -> None:
    threaded = make_engine(make(), offload="host thread", precision=precision)
    inline = make_engine(make(), offload="cpu", precision=precision)
    losses: list[list[float]] = []
    for engine in (threaded, inline):
        losses.append([])
        for step in range(STEPS):
            loss = loss_of(engine, batch(step).to(engine.parts.params[0].dtype))
            engine.backward(loss)
            engine.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    assert len(threaded.parts.layouts) > 1
    expected = weights(inline.module)
    assert all(torch.equal(w, expected[name]) for name, w in weights(threaded.module).items())
    threaded.destroy()


@pytest.mark.usefixtures("slow_worker")
def test_the_step_really_returns_before_the_update_is_done() -> None:
    """Without this the other tests here would prove nothing."""
    engine = make_engine(Deep(), offload="host thread")
    _one_step(engine)
    before = [flat.clone() for flat in engine.parts.weights.flats]  # type: ignore[union-attr]
    engine.synchronize()
    after = engine.parts.weights.flats  # type: ignore[union-attr]
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    engine.destroy()


def _pickled(model: nn.Module) -> list[Tensor]:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return list(torch.load(buffer, weights_only=False).parameters())


def _gathered(model: nn.Module) -> list[Tensor]:
    # The list of parameters was made before the step: only the context can wait.
    with GatheredParameters(_kept[id(model)]):
        return [p.detach().clone() for p in _kept[id(model)]]


def _shape_of_masters(model: nn.Module) -> list[Tensor]:
    return [master for p in _kept[id(model)] if (master := safe_get_full_fp32_param(p)) is not None]


_kept: dict[int, list[nn.Parameter]] = {}
LOOKS: dict[str, Callable[[nn.Module], list[Tensor]]] = {
    "parameters": lambda model: [p.detach().clone() for p in model.parameters()],
    "submodule parameters": lambda model: [
        *(p.detach().clone() for p in model.layers.parameters()),  # type: ignore[union-attr]
        *(p.detach().clone() for p in model.norm.parameters()),  # type: ignore[union-attr]
        *(p.detach().clone() for n, p in model.last.named_parameters() if n != "weight"),  # type: ignore[union-attr]
    ],
    "parameters of a wrapper": lambda model: [p.detach().clone() for p in nn.Sequential(model).parameters()],
    "state_dict": lambda model: [v.clone() for k, v in model.state_dict().items() if k != "last.weight"],
    "state_dict of a wrapper": lambda model: [
        v.clone() for k, v in nn.Sequential(model).state_dict().items() if k != "0.last.weight"
    ],
    "deepcopy": lambda model: list(copy.deepcopy(model).parameters()),
    "deepcopy of a wrapper": lambda model: list(copy.deepcopy(nn.Sequential(model)).parameters()),
    "pickle": _pickled,
    "GatheredParameters": _gathered,
    "safe_get_full_fp32_param": _shape_of_masters,
}


@pytest.mark.usefixtures("slow_worker")
@pytest.mark.parametrize("look", LOOKS)
def test_weights_seen_right_after_a_step_are_new(look: str) -> None:
    engine = make_engine(Deep(), offload="host thread")
    _kept[id(engine.module)] = list(engine.module.parameters())
    for step in range(3):
        _one_step(engine, step)
        seen = LOOKS[look](engine.module)
        engine.synchronize()
        later = list(engine.module.parameters())
        assert len(seen) == len(later)
        assert all(torch.equal(a, b) for a, b in zip(seen, later))
    del _kept[id(engine.module)]
    engine.destroy()


@pytest.mark.usefixtures("slow_worker")
def test_engine_parameters_and_state_dict_wait_too() -> None:
    engine = make_engine(Deep(), offload="host thread")
    for look in (
        lambda: [p.detach().clone() for _, p in engine.named_parameters()],
        lambda: [p.detach().clone() for p in engine.parameters()],
        lambda: [v.clone() for k, v in engine.state_dict().items() if k != "module.last.weight"],
    ):
        _one_step(engine)
        seen = look()
        engine.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(seen, engine.module.parameters()))
    engine.destroy()


@pytest.mark.usefixtures("slow_worker")
@pytest.mark.parametrize("part", ["model", "submodule", "wrapper"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_loaded_right_after_a_step_stay(part: str, precision: str) -> None:
    """The update must not overwrite them, and the next step must start from them."""
    engine = make_engine(Deep(), offload="host thread", precision=precision)
    torch.manual_seed(7)
    loaded = Deep().to(engine.parts.params[0].dtype)
    for param in loaded.parameters():
        nn.init.normal_(param)
    pick: Callable[[nn.Module], nn.Module] = {
        "model": lambda m: m,
        "submodule": lambda m: m.layers[4],
        "wrapper": lambda m: nn.Sequential(m),
    }[part]
    _one_step(engine)
    pick(engine.module).load_state_dict(pick(loaded).state_dict())
    for a, b in zip(pick(engine.module).parameters(), pick(loaded).parameters()):
        assert torch.equal(a, b)
    _one_step(engine, 1)
    for a, b in zip(pick(engine.module).parameters(), pick(loaded).parameters()):
        assert (a - b).float().abs().max() < 0.1, "one step away from what was loaded"
    engine.destroy()


@pytest.mark.usefixtures("slow_worker")
def test_changing_a_gathered_parameter_moves_its_master() -> None:
    engine = make_engine(Deep(), offload="host thread", precision="bf16")
    param = engine.module.layers[1].weight
    _one_step(engine)
    with GatheredParameters([param, None, param], modifier_rank=0), torch.no_grad():
        param.fill_(2.0)
    master = safe_get_full_fp32_param(param)
    assert master is not None
    assert torch.equal(master, torch.full((16, 16), 2.0))
    _one_step(engine, 1)
    engine.synchronize()
    assert (param.float() - 2.0).abs().max() < 0.1
    engine.destroy()


@pytest.mark.usefixtures("slow_worker")
def test_moments_can_be_read_right_after_a_step() -> None:
    engine, inline = make_engine(Deep(), offload="host thread"), make_engine(Deep())
    params = [list(e.module.parameters()) for e in (engine, inline)]
    for step in range(2):
        _one_step(engine, step)
        _one_step(inline, step)
    for a, b in zip(*params):
        for kind in ("exp_avg", "exp_avg_sq"):
            ours, theirs = safe_get_full_optimizer_state(a, kind), safe_get_full_optimizer_state(b, kind)
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours, theirs)
    engine.destroy()


def test_an_error_in_the_worker_surfaces_in_the_main_thread_and_nobody_goes_on_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = make_engine(Deep(), offload="host thread")
    _one_step(engine)
    engine.synchronize()

    def fail(*args: Any) -> None:
        raise ZeroDivisionError("in the worker")

    monkeypatch.setattr(AdamRule, "update", fail)
    _one_step(engine, 1)
    with pytest.raises(ZeroDivisionError, match="in the worker"):
        engine.synchronize()
    for use in (
        lambda: engine(batch(2)),
        lambda: list(engine.module.parameters()),
        lambda: engine.save_checkpoint(str(tmp_path)),
        engine.step,
    ):
        with pytest.raises(HfZeroError, match=r"interrupted by an error.*load a checkpoint"):
            use()
    assert not list(tmp_path.iterdir())
    engine.destroy()
    assert not _threads()
    assert not any(module._forward_pre_hooks for module in engine.module.modules())
    assert "named_parameters" in nn.Module.__dict__
    assert nn.Module.named_parameters.__name__ == "named_parameters"
    assert not hasattr(nn.Module.named_parameters, "__wrapped__")


def test_the_first_error_of_a_worker_is_the_one_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(Deep(), offload="host thread")
    calls: list[int] = []

    def fail(*args: Any) -> None:
        calls.append(1)
        raise ZeroDivisionError(f"number {len(calls)}")

    monkeypatch.setattr(AdamRule, "update", fail)
    _one_step(engine)
    with pytest.raises(ZeroDivisionError, match="number 1"):
        engine.synchronize()
    assert len(calls) == 1, "nothing further is begun"
    assert engine.memory_report()["host"]["moments"] > 0
    engine.destroy()


@pytest.mark.usefixtures("slow_worker")
def test_an_interrupted_wait_is_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(Deep(), offload="host thread", precision="bf16")
    _one_step(engine)
    home = engine.parts.masters.homes[0]  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        patch.setattr(home, "wait", lambda bucket: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            engine.module.state_dict()
    seen = [value.clone() for value in engine.module.state_dict().values()]
    engine.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(seen, engine.module.state_dict().values(), strict=True))
    engine.destroy()


def test_destroy_leaves_no_thread_no_hook_and_no_patch() -> None:
    plain = {name: nn.Module.__dict__.get(name) for name in ("named_parameters", "state_dict", "load_state_dict")}
    model = Deep()
    engine = make_engine(model, offload="host thread")
    other = make_engine(Tiny(), offload="host thread")
    _one_step(engine)
    assert len(_threads()) == 2
    engine.destroy()
    assert len(_threads()) == 1
    assert nn.Module.named_parameters is not plain["named_parameters"], "the other engine still lives"
    other.destroy()
    assert not _threads()
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._load_state_dict_post_hooks
    for param in model.parameters():
        assert not getattr(param, "_post_accumulate_grad_hooks", None)
    assert {name: nn.Module.__dict__.get(name) for name in plain} == plain
    assert "__reduce_ex__" not in nn.Module.__dict__
    assert not readiness._open


def test_an_engine_that_is_dropped_without_destroy_ends_its_thread() -> None:
    gone = _dropped(make_engine(Deep(), offload="host thread"))
    gc.collect()
    assert gone() is None
    _threads_end()


def test_the_garbage_collector_does_not_wait_for_a_thread() -> None:
    """It may run inside any lock, this one among them."""
    gone = _dropped(make_engine(Deep(), offload="host thread"))
    with threading._active_limbo_lock:  # type: ignore[attr-defined]
        gc.collect()
    assert gone() is None


@pytest.mark.usefixtures("slow_worker")
@pytest.mark.parametrize("offload", ["host thread", "cpu"])
def test_an_engine_that_is_dropped_right_after_a_step_has_taken_it(offload: str) -> None:
    model, other = Deep(), Deep()
    engine, wanted = make_engine(model, offload=offload), make_engine(other, offload="none")
    for one in (engine, wanted):
        _one_step(one)
    del engine, one
    _threads_end()  # not before their work is done
    wanted.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


SCRIPT = """
import time, torch
from hf_zero_plugin.engine.optimizers import AdamRule
from tests.engine.harness import Tiny, batch, loss_of, make_engine
update = AdamRule.update
def slow(self, *args):
    time.sleep(0.05)
    update(self, *args)
AdamRule.update = slow
engine = make_engine(Tiny(), offload="host thread", precision="bf16")
for step in range(2):
    engine.backward(loss_of(engine, batch(step).bfloat16()))
    engine.step()
print("DONE", flush=True)
"""


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "raise KeyError('x')"])
def test_interpreter_exits_cleanly_with_an_update_under_way(ending: str, repo_dir: Path) -> None:
    command = [sys.executable, "-c", SCRIPT + ending]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repo_dir)
    assert "DONE" in done.stdout
    expected = {"": 0, "raise SystemExit(3)": 3}.get(ending, 1)
    assert done.returncode == expected, done.stderr
    assert "Fatal" not in done.stderr
    assert ("KeyError" in done.stderr) == ("KeyError" in ending)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_the_module_do_not_drag_the_engine_along(way: str) -> None:
    engine = make_engine(Deep(), offload="host thread", precision="bf16")
    _one_step(engine)
    if way == "deepcopy":
        twin = copy.deepcopy(engine.module)
    else:
        packed = pickle.dumps(engine.module)
        assert b"ZeroEngine" not in packed
        assert b"MasterWeights" not in packed
        twin = pickle.loads(packed)
    before = weights(engine.module)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
    twin(batch(0).bfloat16()).float().sum().backward()
    optimizer.step()
    assert all(torch.equal(w, before[name]) for name, w in weights(engine.module).items())
    twin_again = copy.deepcopy(twin)
    assert len(list(twin_again.parameters())) == len(before)
    engine.destroy()
    train_twin = make_engine(twin_again)
    train(train_twin, 1)


@pytest.mark.usefixtures("slow_worker")
def test_backward_waits_until_the_last_gradients_were_consumed() -> None:
    """Gradients that do not depend on weights, from a graph that calls no module: only backward itself can wait."""
    results = []
    for offload in ("host thread", "cpu"):
        engine = make_engine(Deep(), offload=offload)
        kept = list(engine.module.parameters())
        for step in range(STEPS):
            loss = torch.stack([p.sum() * (step + 1 - index) for index, p in enumerate(kept)]).sum()
            engine.backward(loss)
            engine.step()
        results.append(weights(engine.module))
        engine.destroy()
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
