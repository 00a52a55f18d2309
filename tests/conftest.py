"""What every test may rely on: no network, one thread per process, and the real text only if it is there."""

from __future__ import annotations

import os

# Before torch or transformers is imported by any test: they read these once. Child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from pathlib import Path

import hypothesis
import pytest

# The same examples in every run, and no time limit on one: a busy machine is not a failure.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("house")

REPO = Path(__file__).resolve().parent.parent


def _cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _cuda_is_there():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and none is visible"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which every test was skipped has tested nothing: give it pytest's exit code for "no tests"."""
    if exitstatus == pytest.ExitCode.OK and not session.config.option.collectonly and not _tests_run:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


_tests_run: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and not report.skipped:
        _tests_run.append(report.nodeid)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Bit-for-bit comparisons need a fixed order of summation; small machines need the cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repo_dir() -> Path:
    """The checkout."""
    return REPO


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with wmt16_en_ro/ and tokenizer_t5/: $HF_ZERO_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("HF_ZERO_DATA") or REPO.parent / "shared" / "data")
    if not (folder / "wmt16_en_ro").is_dir():
        pytest.skip(f"no real text: {folder}/wmt16_en_ro does not exist (set HF_ZERO_DATA to its parent folder)")
    return folder
