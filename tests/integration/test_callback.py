"""ZeroCallback: the engine switched on from Python, and a training watched. Each scene is a process of its own, because
activation must come before transformers is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_zero_plugin.integration.monitor import Monitor, matmul_parameters, peak_flops
from hf_zero_plugin.integration.summary import Summary

REPO = Path(__file__).resolve().parents[2]

SETTING = """
import json, sys, tempfile
import hf_zero_plugin
hf_zero_plugin.activate()
import torch
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments
from hf_zero_plugin import ZeroCallback
from hf_zero_plugin.errors import ActivationError
CONFIG = "configs/zero2_offload.json"
FOLDER = tempfile.mkdtemp()
def model():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_ff=32, d_kv=4, num_layers=1, num_heads=4,
        decoder_start_token_id=0, dropout_rate=0.0))
rows = [{"input_ids": torch.arange(3, 13) + i % 5, "labels": torch.arange(4, 12) + i % 3} for i in range(64)]
def arguments(**changes):
    options = dict(output_dir=FOLDER, max_steps=6, per_device_train_batch_size=4, logging_steps=2, save_strategy="no",
        report_to=[], learning_rate=1e-3, dataloader_pin_memory=False, log_level="error")
    return TrainingArguments(**{**options, **changes})
class Reporter(TrainerCallback):
    def __init__(self):
        self.seen = []
    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))
def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
def fails(call):
    try:
        call()
    except ActivationError as error:
        return str(error)
    return ""
out = {}
"""


def _play(scene: str, **env: str) -> dict[str, Any]:
    code = f"{SETTING}\n{textwrap.dedent(scene)}\nprint('OUT ' + json.dumps(out))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("OUT "))
    return {**json.loads(last[4:]), "printed": done.stdout, "stderr": done.stderr}


@pytest.fixture(scope="module")
def enabled() -> dict[str, Any]:
    """Trained by callback, and for comparison by ``deepspeed=``."""
    return _play(
        """
        args = arguments()
        callback, reporter = ZeroCallback(CONFIG, args), Reporter()
        twin = arguments(deepspeed=CONFIG)
        objects = ("hf_deepspeed_config", "deepspeed_plugin")
        out["differs"] = sorted(
            name for name in {*vars(args), *vars(twin)}
            if repr(vars(args).get(name)) != repr(vars(twin).get(name)) and name not in objects)
        out["config_differs"] = args.hf_deepspeed_config.config != twin.hf_deepspeed_config.config
        args = arguments()
        callback = ZeroCallback(CONFIG, args)
        trainer = Trainer(model=model(), args=args, train_dataset=rows, callbacks=[reporter, callback])
        trainer.train()
        out["engine"], out["losses"] = type(trainer.model_wrapped).__name__, losses(trainer)
        out["reported"], out["history"] = reporter.seen, trainer.state.log_history
        out["own"] = callback.history
        out["summary"], out["html"] = str(callback.summary), callback.summary._repr_html_()
        trainer.train()
        out["second"] = len(callback.history)
        other = Trainer(model=model(), args=arguments(deepspeed=CONFIG), train_dataset=rows)
        other.train()
        out["twin_losses"] = losses(other)
        """
    )


@pytest.mark.slow
def test_arguments_are_as_if_the_flag_had_been_given(enabled: dict[str, Any]) -> None:
    assert enabled["differs"] == []
    assert not enabled["config_differs"]
    assert enabled["engine"] == "ZeroEngine"
    assert enabled["losses"] == enabled["twin_losses"]
    assert enabled["losses"][-1] < enabled["losses"][0]


@pytest.mark.slow
def test_reporters_and_history_get_the_same_values(enabled: dict[str, Any]) -> None:
    wanted = {"step_ms", "tokens_per_second", "hidden_share", "host_memory_gib", "skipped_steps"}
    wanted |= {"device/weights_gib", "host/master_weights_gib", "host/moments_gib"}
    first, entry = enabled["reported"][0], enabled["history"][0]
    assert wanted <= set(first)
    assert wanted <= set(entry)
    assert {name: entry[name] for name in wanted} == {name: first[name] for name in wanted}
    assert enabled["own"][0]["step"] == 2
    assert "step_ms" not in enabled["reported"][-1], "the last entry is the Trainer's own summary"
    assert enabled["second"] == 3, "a second train() starts a history of its own"


@pytest.mark.slow
def test_loss_scale_and_skipped_steps_are_told_as_they_are() -> None:
    """Every step overflows and halves a scale of 2^40; the history has the exact powers, not rounded ones."""
    out = _play(
        """
        from pathlib import Path
        config = json.loads(Path(CONFIG).read_text())
        config["fp16"]["initial_scale_power"], config["fp16"]["hysteresis"] = 40, 1
        args = arguments(fp16=True)
        callback, reporter = ZeroCallback(config, args), Reporter()
        trainer = Trainer(model=model(), args=args, train_dataset=rows, callbacks=[callback, reporter])
        trainer.train()
        wanted = ("loss_scale", "skipped_steps")
        for name, entries in (("history", trainer.state.log_history), ("reported", reporter.seen)):
            out[name] = [[entry[key] for key in wanted] for entry in entries if "loss" in entry]
        out["summary"] = str(callback.summary)
        """
    )
    assert out["history"] == [[2.0 ** (40 - skipped), skipped] for skipped in (2, 4, 6)]
    assert out["reported"] == out["history"]
    assert "6 (6 skipped)" in out["summary"]
    assert "loss scale" in out["summary"]


@pytest.mark.slow
def test_summary_and_progress_bar_are_shown(enabled: dict[str, Any]) -> None:
    assert "ZeRO stage 2, optimizer states on cpu" in enabled["printed"]
    assert "milliseconds a step" in enabled["summary"]
    assert "master weights, host" in enabled["summary"]
    assert enabled["html"].startswith("<table>")
    assert "ms/step" in enabled["stderr"]
    assert "tok/s" in enabled["stderr"]


@pytest.mark.slow
def test_too_late_is_told_and_the_stock_trainer_can_be_watched() -> None:
    out = _play(
        """
        args = arguments(use_cpu=True)
        reporter, callback = Reporter(), ZeroCallback()
        trainer = Trainer(model=model(), args=args, train_dataset=rows, callbacks=[reporter, callback])
        trainer.train()
        out["engine"], out["reported"] = type(trainer.model_wrapped).__name__, reporter.seen
        out["late"] = fails(lambda: ZeroCallback(CONFIG, args))
        out["deepspeed"] = args.deepspeed

        prepared = ZeroCallback(CONFIG, arguments())
        second = arguments()
        out["other_args"] = fails(
            lambda: Trainer(model=model(), args=second, train_dataset=rows, callbacks=[prepared]))

        stock = Trainer(model=model(), args=second, train_dataset=rows)
        stock.add_callback(prepared)
        out["added_late"] = fails(stock.train)

        unrelated = arguments()
        ZeroCallback(CONFIG, unrelated)
        out["own_config"] = fails(lambda: ZeroCallback({"zero_optimization": {"stage": 1}}, unrelated))
        for given in ({"config": CONFIG}, {"args": args}, {"config": args, "args": CONFIG}):
            try:
                ZeroCallback(**given)
            except TypeError as error:
                out.setdefault("halves", []).append(str(error))
        """
    )
    assert out["engine"] == "T5ForConditionalGeneration"
    assert {"step_ms", "tokens_per_second"} <= set(out["reported"][0])
    assert "hidden_share" not in out["reported"][0]
    assert "came too late" in out["late"]
    assert "callbacks=[callback]" in out["late"]
    assert out["deepspeed"] is None
    assert "other TrainingArguments" in out["other_args"]
    assert "came too late" in out["added_late"]
    assert "another one" in out["own_config"]
    assert ["args is missing" in half or "config is missing" in half for half in out["halves"][:2]] == [True, True]
    assert "not TrainingArguments and str" in out["halves"][2]


@pytest.mark.slow
def test_without_activation_the_error_says_what_to_write() -> None:
    code = (
        "from transformers import Trainer, TrainingArguments\nfrom hf_zero_plugin import ZeroCallback\n"
        "args = TrainingArguments('/tmp/none', report_to=[])\nZeroCallback('configs/zero2_offload.json', args)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "hf_zero_plugin.activate()" in done.stderr.splitlines()[-1]


def test_peaks_are_found_by_the_name_of_the_device() -> None:
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    assert peak_flops("NVIDIA H200", brain) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", half) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", brain) == 312e12
    assert peak_flops("NVIDIA L40S", half) == 362e12
    assert peak_flops("Tesla T4", half) == 65e12
    assert peak_flops("Tesla T4", brain) is None
    assert peak_flops("NVIDIA H200", single) is None
    assert peak_flops("Some Future Device", half) is None


def test_parameters_that_multiply_tokens_of_a_t5() -> None:
    """By hand: attention 4 d^2 (here heads times d_kv is d), feed-forward 2 d f, two attentions in the decoder, and the
    output's table."""
    from transformers import T5Config, T5ForConditionalGeneration

    d, f, vocabulary, layers = 16, 32, 64, 2
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=vocabulary, d_model=d, d_ff=f, d_kv=4, num_heads=4, num_layers=layers)
    )
    source, target = matmul_parameters(model)
    assert source == layers * (4 * d * d + 2 * d * f)
    assert target == layers * (8 * d * d + 2 * d * f) + vocabulary * d


def test_monitor_counts_training_tokens_only() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.zeros(4))

    model, monitor = Model(), Monitor()
    monitor.attach(model, torch.float32, torch.device("cpu"))
    monitor.step_begins()
    model(input_ids=torch.zeros(3, 5, dtype=torch.long))
    monitor.step_ends()
    model.eval()
    model(input_ids=torch.zeros(9, 9, dtype=torch.long))
    monitor.pause()
    monitor.detach()
    window = monitor.take_window()
    assert (window.num_steps, window.num_tokens, window.flops) == (1, 15, 6 * 16 * 15)
    assert monitor.take_window().num_steps == 0
    assert monitor.total.num_tokens == 15
    assert monitor.utilisation(window) is None, "a peak that is not known"
    monitor.peak, window.seconds = 1000.0, 2.0
    assert monitor.utilisation(window) == 6 * 16 * 15 / 2.0 / 1000.0
    assert not model._forward_pre_hooks


def test_hidden_share_is_a_mean_over_the_steps_of_an_entry() -> None:
    monitor = Monitor()
    for shares in ([0.5, 1.0], [0.0]):
        for share in shares:
            monitor.update_timed(share, 10 * share)
        window = monitor.take_window()
        assert (window.num_updates, window.hidden_share) == (len(shares), sum(shares))
    assert (monitor.total.num_updates, monitor.total.hidden_share, monitor.total.wait_ms) == (3, 1.5, 15.0)


def test_summary_escapes_and_skips_what_is_not_there() -> None:
    summary = Summary("a < b")
    summary.add("one", "1")
    summary.add("none", None)
    assert "a &lt; b" in summary._repr_html_()
    assert summary.rows == [("one", "1")]
    assert str(summary) == "a < b\n  one  1"


def test_summary_is_html_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_zero_plugin.integration.summary import is_notebook

    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[misc]
    assert is_notebook()
