"""Reading and writing a configuration by path (``$.zero_optimization.stage``), and showing its values."""

from __future__ import annotations

from typing import Any

__all__ = ["is_present", "lookup", "put", "show"]


def lookup(config: dict[str, Any], path: str) -> Any:
    """The value at ``$.a.b``; None if there is none."""
    node: Any = config
    for part in path.split(".")[1:]:
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node


def is_present(config: dict[str, Any], path: str) -> bool:
    parent, _, name = path.rpartition(".")
    node = config if parent == "$" else lookup(config, parent)
    return isinstance(node, dict) and name in node


def put(config: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at ``$.a.b``, making sections as needed; None removes the key."""
    *sections, name = path.split(".")[1:]
    node = config
    for section in sections:
        node = node.setdefault(section, {})
    if value is None:
        node.pop(name, None)
    else:
        node[name] = value


def show(value: Any) -> str:
    """A value as the file would spell it, shortened."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, str):
        text = f'"{value}"'
    elif isinstance(value, dict):
        text = "{" + ", ".join(f'"{key}": {show(item)}' for key, item in value.items()) + "}"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(map(show, value)) + "]"
    else:
        text = plain_number(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain_number(number: Any) -> str:
    if isinstance(number, float) and number.is_integer() and abs(number) < 1e15:
        return str(int(number))
    return str(number)
