"""What the folder promises about itself: versions that agree, a licence, commands that exist, small files."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_zero_plugin

REPO = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (REPO / "setup.cfg").is_file(), reason="not run from a checkout")

UNTESTED = {"pre-commit"}
"""Dependencies whose newest version will do."""

MAX_LINES = 350
"""Of a file of the package, as CONTRIBUTING.md says. A longer one holds more than one idea: give each a file."""


def _constraints() -> dict[str, Requirement]:
    lines = (REPO / "constraints.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def _dependencies() -> list[Requirement]:
    metadata = configparser.ConfigParser(interpolation=None)
    metadata.read(REPO / "setup.cfg")
    blocks = [metadata["options"]["install_requires"], *metadata["options.extras_require"].values()]
    lines = [line for block in blocks for line in block.splitlines()]
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("%(")]


def test_every_dependency_has_a_tested_version_inside_its_range() -> None:
    tested = _constraints()
    for dependency in _dependencies():
        name = canonicalize_name(dependency.name)
        if name in UNTESTED:
            continue
        assert name in tested, f"constraints.txt names no tested version of {name}"
        (pin,) = tested[name].specifier
        assert dependency.specifier.contains(pin.version), f"{tested[name]} is outside of {dependency}"


def test_constraints_are_names_and_plain_versions() -> None:
    """No place to fetch from, and no local version: any registry serves, CPU builds of torch match."""
    for requirement in _constraints().values():
        assert requirement.url is None
        assert re.fullmatch(r"==[0-9.]+", str(requirement.specifier)), requirement


def test_make_names_its_targets() -> None:
    help_text = subprocess.run(["make", "help"], cwd=REPO, check=True, capture_output=True, text=True).stdout
    for target in ("demo", "test", "lint", "format", "docs", "venv", "clean"):
        assert target in help_text
        subprocess.run(["make", "-n", target], cwd=REPO, check=True, capture_output=True)


def test_the_package_is_typed_and_licensed() -> None:
    assert (Path(hf_zero_plugin.__file__).parent / "py.typed").is_file()
    assert "Apache License" in (REPO / "LICENSE").read_text()


def test_no_file_of_the_package_is_too_long_to_hold_one_idea() -> None:
    package = Path(hf_zero_plugin.__file__).parent
    lengths = {
        str(path.relative_to(package)): len(path.read_text(encoding="utf-8").splitlines())
        for path in package.rglob("*.py")
    }
    assert len(lengths) > 100
    too_long = {path: length for path, length in lengths.items() if length > MAX_LINES}
    assert not too_long, f"longer than {MAX_LINES} lines: {too_long}"
