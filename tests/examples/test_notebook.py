"""The notebook runs from top to bottom in a fresh kernel, and was committed with what it showed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "translation" / "finetune.ipynb"


def _code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _texts(notebook: Any) -> str:
    parts: list[str] = []
    for cell in _code_cells(notebook):
        for output in cell.outputs:
            parts.append(output.get("text", ""))
            parts.extend(value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))
    return "\n".join(parts)


def _bleu(notebook: Any) -> float:
    line = next(line for line in _texts(notebook).splitlines() if line.startswith("BLEU on"))
    return float(line.rsplit(":", 1)[1])


def test_committed_notebook_shows_its_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = _code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run once, from top to bottom"
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    kinds = {kind for cell in cells for output in cell.outputs for kind in output.get("data", {})}
    assert {"image/png", "text/html"} <= kinds
    assert _bleu(notebook) > 50
    texts = _texts(notebook)
    assert "milliseconds a step" in texts
    assert all(f"'{key}'" in texts for key in ("step_ms", "hidden_share", "device/weights_gib", "host/moments_gib"))
    sources = "\n".join(cell.source for cell in notebook.cells)
    assert not re.search(r"/(home|root|tmp|work|mnt|Users)/", texts + sources), "a path of the machine it was run on"
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_notebook_runs_in_a_fresh_kernel() -> None:
    """As a reader runs it: the notebook's own folder, no launcher, no network."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=2000, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()  # raises at the first cell that fails
    texts = _texts(notebook)
    assert '"rank": 0, "of": 2' in texts
    assert '"rank": 1, "of": 2' in texts
    assert "model.safetensors" in texts
    assert _bleu(notebook) > 50
