"""What ``hf-zero doctor`` looks at: one function per section, each a list of facts with a verdict."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import hf_zero_plugin
from hf_zero_plugin.host_limits import core_quota, memory_limit_bytes, usable_cores

__all__ = ["SECTIONS", "Fact"]

_DISTRIBUTION = "hf-zero-plugin"
_ALSO_SHOWN = ("tokenizers", "peft", "numpy")
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_USE_DEEPSPEED",
    "WORLD_SIZE",
    "LOCAL_RANK",
)
_PROBE_TIMEOUT_S = 120


Verdict = Literal["ok", "warning", "broken"]


@dataclass(frozen=True, slots=True)
class Fact:
    name: str
    value: Any
    """JSON-able; sizes in bytes."""
    remark: str = ""
    verdict: Verdict = "ok"
    text: str = ""
    """The value for people, where JSON's is not for them."""


def version_facts() -> list[Fact]:
    """Versions of python and of what we depend on, against the ranges of our own package metadata."""
    python_range = importlib.metadata.metadata(_DISTRIBUTION)["Requires-Python"] if _is_installed() else ""
    facts = [
        Fact("hf_zero_plugin", hf_zero_plugin.__version__),
        _judge("python", platform.python_version(), python_range, is_required=True, extras=[]),
    ]
    for name, (specifier, extras) in _requirements().items():
        facts.append(_judge(name, _version_of(name), specifier, is_required=not extras, extras=extras))
    shown = {fact.name for fact in facts}
    facts += [Fact(name, version) for name in _ALSO_SHOWN if name not in shown and (version := _version_of(name))]
    if not _is_installed():
        facts.append(Fact("package metadata", None, "not installed with pip, so tested ranges are unknown", "warning"))
    return facts


def device_facts() -> list[Fact]:
    """What torch sees, and what the driver says beside it."""
    torch = _torch()
    if torch is None:
        return []
    cards = _nvidia_smi()
    if not torch.cuda.is_available():
        facts = [Fact("gpus", 0, "runs on CPU")]
        if cards and os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
            facts = [Fact("gpus", 0, f"{len(cards)} hidden by CUDA_VISIBLE_DEVICES")]
        elif cards:
            build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
            why = f"the driver {cards[0]['driver']} has {len(cards)}, but torch {torch.__version__} ({build}) sees none"
            facts = [Fact("gpus", 0, why, "warning")]
        return facts
    facts = [Fact("gpus", torch.cuda.device_count(), f"torch built for {_toolkit(torch)}")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        card = cards[index] if len(cards) == torch.cuda.device_count() else None
        remark = f"{_gib(total_bytes)}, {_gib(free_bytes)} free, capability {capability}"
        if card:
            remark += f", driver {card['driver']}, PCIe {card['pcie_generation']} x{card['pcie_width']}"
        facts.append(Fact(f"cuda:{index}", properties.name, remark))
    return facts


def backend_facts() -> list[Fact]:
    """Ways in which processes can talk to each other."""
    torch = _torch()
    if torch is None:
        return []
    import torch.distributed as dist

    has_gloo = dist.is_available() and dist.is_gloo_available()
    has_nccl = dist.is_available() and dist.is_nccl_available()
    gpus_need_nccl = torch.cuda.is_available() and torch.cuda.device_count() > 1 and not has_nccl
    return [
        Fact("gloo", has_gloo, "for CPU processes", "ok" if has_gloo else "broken"),
        Fact("nccl", has_nccl, "for several GPUs", "warning" if gpus_need_nccl else "ok"),
    ]


def memory_facts() -> list[Fact]:
    """Host memory, where offloaded states live, and how much of it may be page-locked."""
    import psutil

    memory = psutil.virtual_memory()
    limit = memory_limit_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    facts = [
        Fact("host memory", memory.total, text=_gib(memory.total)),
        Fact("available", memory.available, text=_gib(memory.available)),
        Fact("container limit", limit, "cgroup", text="none" if limit is None else _gib(limit)),
    ]
    if soft == resource.RLIM_INFINITY:
        facts.append(Fact("pinned-memory limit", None, "ulimit -l", text="unlimited"))
    else:
        raisable = "" if hard == soft else f", can be raised to {_gib(hard) if hard > 0 else 'any size'}"
        facts.append(Fact("pinned-memory limit", soft, f"ulimit -l{raisable}", text=_gib(soft)))
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm")
        is_small = shared.total < 2**30
        remark = "/dev/shm" + (": small for data loader workers, who pass batches through it" if is_small else "")
        verdict: Verdict = "warning" if is_small else "ok"
        facts.append(Fact("shared memory", shared.total, remark, verdict, text=_gib(shared.total)))
    return facts


def processor_facts() -> list[Fact]:
    quota = core_quota()
    limits = f"of {os.cpu_count()} in the machine" + (f", quota {quota:g} (cgroup)" if quota is not None else "")
    return [Fact("usable cores", usable_cores(), limits), Fact("architecture", platform.machine())]


def engine_facts() -> list[Fact]:
    """Who answers ``import deepspeed``: asked in new processes, where nothing is loaded yet."""
    real = _version_of("deepspeed")
    ours = _probe("import hf_zero_plugin as h; h.activate(); import deepspeed; print(deepspeed.__version__)")
    plain = f"deepspeed {real}" if real else "nothing"
    plain_remark = "" if real else "transformers refuses it; hf-zero run or activate() make it work"
    ours_ok = ours.returncode == 0
    answer = f"hf_zero_plugin {hf_zero_plugin.__version__}" if ours_ok else "nothing"
    return [
        Fact("deepspeed installed", real, "the real one" if real else "not installed, not needed"),
        Fact(
            "--deepspeed, hf-zero run",
            answer,
            f"as deepspeed {ours.stdout.split()[-1]}" if ours_ok else _last_line(ours.stderr),
            "ok" if ours_ok else "broken",
        ),
        Fact("--deepspeed, plain python", plain, plain_remark),
    ]


def environment_facts() -> list[Fact]:
    facts = []
    for name in _VARIABLES:
        value = os.environ.get(name)
        if name == "ACCELERATE_USE_CPU" and value:
            facts.append(Fact(name, value, "accelerate ignores --deepspeed with it; hide the GPUs instead", "warning"))
        elif value is not None or name == "HF_HUB_OFFLINE":
            facts.append(Fact(name, value, "" if value is not None else "not set: the hub may be asked"))
    return facts


SECTIONS = {
    "versions": version_facts,
    "devices": device_facts,
    "process backends": backend_facts,
    "memory": memory_facts,
    "processors": processor_facts,
    "engine": engine_facts,
    "environment": environment_facts,
}


def _judge(name: str, version: str | None, specifier: str, *, is_required: bool, extras: list[str]) -> Fact:
    if version is None:
        if is_required:
            return Fact(name, None, f"missing: pip install '{name}{specifier}'", "broken")
        return Fact(name, None, f"not installed (extra: {', '.join(extras)})")
    from packaging.specifiers import SpecifierSet

    if specifier and not SpecifierSet(specifier).contains(version, prereleases=True):
        return Fact(name, version, f"outside the tested range {specifier}", "warning")
    if name == "torch" and isinstance(_torch_or_error(), Exception):
        return Fact(name, version, f"cannot be imported: {_torch_or_error()}", "broken")
    return Fact(name, version, f"tested: {specifier}" if specifier else "")


def _requirements() -> dict[str, tuple[str, list[str]]]:
    """Package -> (tested range, the extras that want it; none for what is always needed); no development tools."""
    found: dict[str, tuple[str, list[str]]] = {}
    always = ["torch", "transformers", "accelerate"]
    lines = (importlib.metadata.requires(_DISTRIBUTION) if _is_installed() else always) or always
    for line in lines:
        name, specifier = re.match(r"([\w.-]+)\s*([^;]*)", line).groups()  # type: ignore[union-attr]
        extra = re.search(r"""extra\s*==\s*["']([^"']+)["']""", line)
        if extra is None:
            found[name] = (_lower_bound_first(specifier), [])
        elif extra[1] == "examples" and name not in found:
            found[name] = (_lower_bound_first(specifier), [extra[1]])
    return found


def _lower_bound_first(specifier: str) -> str:
    return ",".join(sorted((part.strip() for part in specifier.split(",")), key=lambda part: part.startswith("<")))


def _is_installed() -> bool:
    return _version_of(_DISTRIBUTION) is not None


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_or_error() -> Any:
    try:
        import torch

        return torch
    except Exception as error:  # a broken build fails with OSError, ImportError, or worse
        return error


def _torch() -> Any:
    found = _torch_or_error()
    return None if isinstance(found, Exception) else found


def _toolkit(torch: Any) -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {getattr(torch.version, 'hip', '?')}"


def _nvidia_smi() -> list[dict[str, str]]:
    """Driver and PCIe link of every card that the driver knows; empty without nvidia-smi."""
    query = "--query-gpu=driver_version,pcie.link.gen.max,pcie.link.width.max"
    try:
        answer = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    return [dict(zip(("driver", "pcie_generation", "pcie_width"), row)) for row in rows if len(row) == 3]


def _probe(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {_PROBE_TIMEOUT_S} s")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["the check failed without a word"])[-1]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:.1f} MiB"
