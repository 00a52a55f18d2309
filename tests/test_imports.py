"""The import graph, read from the source: who may know whom. The tables are the rules; change them only on purpose."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import hf_zero_plugin

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "hf_zero_plugin"

ALLOWED_EDGES = {
    "errors": set(),
    "host_limits": set(),
    "config": {"errors"},
    "checkpoint": {"config", "errors"},
    "engine": {"checkpoint", "config", "errors", "host_limits"},
    "integration": {"checkpoint", "config", "engine", "errors"},
    "cli": {"checkpoint", "config", "engine", "errors", "host_limits", "integration"},
    "__main__": {"cli"},
    "__init__": {"engine", "errors", "integration"},
}
"""Part of the package -> parts it may import, wherever in the file. A part may always import itself."""

HOMES_OF_LIBRARIES = {
    "transformers": {"integration"},
    "accelerate": {"integration"},
    "deepspeed": {"integration"},
    "torch.distributed": {"engine", "checkpoint", "integration", "cli"},
    "datasets": set(),
    "evaluate": set(),
}
"""Library -> parts that may import it. The command line's launcher is torchrun's, in torch.distributed."""

LAZY_LIBRARIES = {("cli", "transformers"), ("cli", "accelerate")}
"""(part, library): allowed inside functions only, so that the command line starts fast and works without it."""

AUTO_KNOWN_TO = {"config", "integration", "cli"}
"""Parts in which the string "auto" may stand; the engine is told values."""

AUTO_ENGINE_FILES = {"engine/state_homes.py"}
"""Files elsewhere that interpret a setting of ours whose own value is "auto" (the share of the states to offload)."""

STAGE_COMPARED_IN = {"engine/sharding.py"}
"""Files that may compare a stage with a number; config/ and integration/ may as well (checks, DeepSpeed's contract)."""


class Import(NamedTuple):
    file: str
    """Relative to the package."""
    part: str
    module: str
    is_lazy: bool


def _sources() -> Iterator[tuple[str, str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        part = relative.parts[0].removesuffix(".py")
        yield relative.as_posix(), part, ast.parse(path.read_text(encoding="utf-8"), str(path))


def _walk(node: ast.AST, is_lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        never_at_import = isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING"
        lazy = is_lazy or never_at_import or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        yield child, lazy
        yield from _walk(child, lazy)


def _imports() -> Iterator[Import]:
    for file, part, tree in _sources():
        for node, is_lazy in _walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(file, part, alias.name, is_lazy)
            elif isinstance(node, ast.ImportFrom):
                if node.level and "/facade/" in file:
                    continue  # the facade is loaded under another name, and stays within itself
                assert node.level == 0, f"{file}:{node.lineno}: relative import; write the full name"
                for alias in node.names:
                    yield Import(file, part, f"{node.module}.{alias.name}", is_lazy)


IMPORTS = list(_imports())


def test_every_part_of_the_package_has_a_rule() -> None:
    assert {part for _, part, _ in _sources()} <= set(ALLOWED_EDGES)


def test_our_own_imports_point_one_way() -> None:
    wrong = []
    for item in IMPORTS:
        root, _, rest = item.module.partition(".")
        target = rest.split(".")[0]
        if root != "hf_zero_plugin" or target in (item.part, "__version__", ""):
            continue
        if target not in ALLOWED_EDGES[item.part]:
            wrong.append(f"{item.file} imports {item.module}")
    assert not wrong, f"against the direction of imports: {wrong}"


@pytest.mark.parametrize("library", HOMES_OF_LIBRARIES)
def test_library_is_known_only_where_it_belongs(library: str) -> None:
    wrong = [
        f"{item.file} imports {item.module}"
        for item in IMPORTS
        if f"{item.module}.".startswith(f"{library}.")
        and item.part not in HOMES_OF_LIBRARIES[library]
        and not (item.is_lazy and (item.part, library) in LAZY_LIBRARIES)
    ]
    assert not wrong


def test_auto_is_resolved_before_the_engine() -> None:
    wrong = [
        f"{file}:{getattr(node, 'lineno', '?')}"
        for file, part, tree in _sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and node.value == "auto"
        and part not in AUTO_KNOWN_TO
        and file not in AUTO_ENGINE_FILES
    ]
    assert not wrong, f'"auto" outside of config/: {wrong}'


def _is_stage(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name in ("stage", "zero_stage")


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return any(map(_is_number, node.elts))
    return isinstance(node, ast.Constant) and type(node.value) is int


def test_stage_numbers_are_compared_in_one_place() -> None:
    wrong = []
    for file, part, tree in _sources():
        if file in STAGE_COMPARED_IN or part in ("config", "integration"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                operands = [node.left, *node.comparators]
                if any(map(_is_stage, operands)) and any(map(_is_number, operands)):
                    wrong.append(f"{file}:{node.lineno}")
    assert not wrong, f"stage numbers compared outside of engine/sharding.py: {wrong}"


_IMPORT_IN_NEW_PROCESS = """
import json, sys, time
start = time.process_time()
import hf_zero_plugin
seconds = time.process_time() - start
heavy = [name for name in ("torch", "transformers", "accelerate", "pydantic", "numpy", "rich") if name in sys.modules]
print(json.dumps([seconds, heavy]))
"""


def _import_cost() -> tuple[float, list[str]]:
    process = [sys.executable, "-c", _IMPORT_IN_NEW_PROCESS]
    seconds, heavy = json.loads(subprocess.run(process, check=True, capture_output=True, text=True).stdout)
    return seconds, heavy


def test_importing_the_package_is_cheap() -> None:
    """Under 0.1 s of processor time, and nothing heavy comes along."""
    costs = [_import_cost() for _ in range(3)]
    assert costs[0][1] == []
    assert min(seconds for seconds, _ in costs) < 0.1


def test_public_names_exist_and_no_other() -> None:
    assert sorted(hf_zero_plugin.__all__) == sorted({*hf_zero_plugin._HOMES, "__version__"})
    assert dir(hf_zero_plugin) == sorted(hf_zero_plugin.__all__)
    for name in hf_zero_plugin.__all__:
        assert getattr(hf_zero_plugin, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hf_zero_plugin.nonsense  # noqa: B018


def _modules_with_all() -> list[str]:
    return [
        "hf_zero_plugin." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for file, _, tree in _sources()
        if "facade" not in file
        and file not in ("__init__.py", "__main__.py")
        and any(
            isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets)
            for node in tree.body
        )
    ]


@pytest.mark.parametrize("module_name", _modules_with_all())
def test_exports_match_what_the_module_defines(module_name: str) -> None:
    module = importlib.import_module(module_name)
    assert sorted(module.__all__) == sorted(set(module.__all__)), "a name stands twice in __all__"
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert not missing
