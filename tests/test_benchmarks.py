"""The tables in benchmarks/README.md are what the script makes of the committed raw lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_tables_of_the_readme_come_from_the_raw_lines() -> None:
    raw = sorted(str(path) for path in (ROOT / "benchmarks" / "raw").glob("*.jsonl"))
    script = str(ROOT / "benchmarks" / "table.py")
    tables = subprocess.run([sys.executable, script, *raw], capture_output=True, text=True, check=True).stdout
    assert tables.strip() in (ROOT / "benchmarks" / "README.md").read_text()
