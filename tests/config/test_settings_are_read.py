"""A key may be called "applied" only if something reads the setting that it becomes."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

from hf_zero_plugin.config import settings as settings_module

PACKAGE = Path(settings_module.__file__).resolve().parents[1]


def setting_names() -> set[str]:
    classes = [item for item in vars(settings_module).values() if dataclasses.is_dataclass(item)]
    return {field.name for cls in classes for field in dataclasses.fields(cls)}


def names_read_outside_config() -> set[str]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] == "config":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
    return found


def test_every_setting_is_read_by_somebody() -> None:
    unread = setting_names() - names_read_outside_config()
    assert not unread, f"nothing reads {sorted(unread)}: call their keys inert, or read them"
