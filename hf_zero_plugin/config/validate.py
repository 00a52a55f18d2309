"""A configuration against the schema: every mistake, in words of our own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hf_zero_plugin.config.fields import AUTO, VARIANTS, Section
from hf_zero_plugin.config.paths import lookup, plain_number, show
from hf_zero_plugin.config.problems import Problem, did_you_mean
from hf_zero_plugin.config.schema import (
    DsConfig,
    known_keys,
    params_model,
    section_models,
)
from hf_zero_plugin.config.schema_optim import (
    OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    REFUSED_SCHEDULERS,
    SCHEDULERS,
)

__all__ = ["refusals", "schema_problems"]

_TABLES = {"optimizer": OPTIMIZERS, "scheduler": SCHEDULERS}
_REFUSED_TYPES = {"optimizer": REFUSED_OPTIMIZERS, "scheduler": REFUSED_SCHEDULERS}

_AN = {"optimizer": "an optimizer", "scheduler": "a scheduler"}

_COMMENTS = frozenset({"_comment", "comment", "//", "_doc", "#"})
_ACCELERATORS = frozenset({"gpu", "cuda", "xpu", "device"})
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "greater than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text in quotes",
    "list_type": "a list",
    "dict_type": "an object in braces",
    "model_type": "an object in braces",
    "model_attributes_type": "an object in braces",
    "none_required": "null",
}


def schema_problems(config: dict[str, Any]) -> list[Problem]:
    """Unknown keys, missing keys, wrong types, wrong choices, numbers out of range."""
    found = list(_problems_of(DsConfig, "$", config, config))
    for kind in ("optimizer", "scheduler"):
        node = config.get(kind)
        if isinstance(node, dict) and isinstance(node.get("type"), str) and isinstance(node.get("params", {}), dict):
            found.extend(_type_problems(kind, node, config))
    return found


def refusals(config: dict[str, Any]) -> list[Problem]:
    """Every key that asks for something this engine does not have. The configuration must be valid otherwise."""
    found = []
    for key in known_keys(config=config):
        value = lookup(config, key.path)
        if key.ruling.refuses(value) and value != AUTO:
            shown = "{...}" if isinstance(value, dict) and value else show(value)
            found.append(
                Problem(
                    path=key.path,
                    what=f"{shown} asks for something that this engine does not have",
                    why=key.ruling.why,
                    fix=key.ruling.fix,
                )
            )
    return found


def _problems_of(model: type[Section], path: str, node: Any, config: dict[str, Any]) -> Iterator[Problem]:
    try:
        model.model_validate(node)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            if detail["loc"] and detail["loc"][-1] == "[key]":
                continue
            yield _problem(detail, path, config)


def _type_problems(kind: str, node: dict[str, Any], config: dict[str, Any]) -> Iterator[Problem]:
    name: str = node["type"]
    known = _TABLES[kind]
    model = params_model(kind, name)
    if model is not None:
        yield from _problems_of(model, f"$.{kind}.params", node.get("params", {}), config)
        return
    for title, (why, fix) in _REFUSED_TYPES[kind].items():
        if title.lower() == name.lower():
            yield Problem(
                path=f"$.{kind}.type", what=f'"{name}" is {_AN[kind]} that this engine does not have', why=why, fix=fix
            )
            return
    near = did_you_mean(name, known)
    yield Problem(
        path=f"$.{kind}.type",
        what=f'"{name}" is not the name of any {kind}',
        why=f"Known are {', '.join(known)}.",
        fix=f'Did you mean "{near}"?'
        if near
        else f"Name one of them, or remove the section to use the Trainer's {kind}.",
    )


def _problem(detail: ErrorDetails, prefix: str, config: dict[str, Any]) -> Problem:
    steps = [part for part in detail["loc"] if part not in VARIANTS]
    path = prefix + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in steps)
    kind, value = detail["type"], detail["input"]
    context: dict[str, Any] = detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, config)
    if kind == "missing":
        name = path.rpartition(".")[2]
        return Problem(
            path=path,
            what=f'the key "{name}" is missing',
            why="It has no default.",
            fix=f'Add "{name}", or remove the section around it.',
        )
    if value == AUTO and isinstance(value, str):
        return Problem(
            path=path,
            what='"auto" cannot stand here',
            why="Neither the Trainer nor this engine fills in this key; DeepSpeed would take its default, silently.",
            fix="Write a value, or remove the key to take the default.",
        )
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = plain_number(context[name])
        return Problem(
            path=path,
            what=f"{show(value)} is out of range",
            why=f"It has to be {words} {bound}.",
            fix=f"Write a number that is {words} {bound}, or remove the key to take the default.",
        )
    if kind == "literal_error":
        return _wrong_choice(path, value, str(context["expected"]))
    if kind in ("too_short", "too_long"):
        wanted = context.get("min_length", context.get("max_length"))
        return Problem(
            path=path,
            what=f"the list has {_items(context['actual_length'])}, but {_items(wanted)} are needed",
            why="Each of them has a meaning of its own, and none has a default.",
            fix=f"Write {_items(wanted)}, for example [0.9, 0.999].",
        )
    return _wrong_type(path, value, _WANTED.get(kind, ""), detail["msg"])


def _unknown_key(path: str, config: dict[str, Any]) -> Problem:
    parent, _, name = path.rpartition(".")
    models = section_models(config)
    siblings = list(models[parent].model_fields) if parent in models else []
    what = f'unknown key "{name}"'
    why = "A key that nothing reads would be ignored silently."
    kind, _, _ = parent.removeprefix("$.").partition(".")
    if parent.endswith(".params"):
        takers = [title for title, model in _TABLES[kind].items() if name in model.model_fields]
        if takers:
            chosen = config[kind]["type"]
            fix = f"Only {', '.join(takers)} would take it. Remove it, or change $.{kind}.type."
            return Problem(path=path, what=f'{chosen} has no parameter "{name}"', why=why, fix=fix)
    if name in _COMMENTS:
        return Problem(path=path, what=what, why=f"JSON has no comments. {why}", fix="Remove it.")
    homes = [home for home, model in models.items() if name in model.model_fields]
    homes = homes or [f"$.{kind}.params" for kind, table in _TABLES.items() if _takes(table, name)]
    if homes:
        return Problem(path=path, what=what, why=why, fix=f"This key belongs in {' or '.join(homes)}. Move it there.")
    near = did_you_mean(name, siblings)
    if near is not None:
        return Problem(path=path, what=what, why=why, fix=f'Did you mean "{near}"?')
    far = [(home, did_you_mean(name, model.model_fields)) for home, model in models.items() if len(name) > 5]
    close = next((f"{home}.{found}" for home, found in far if found is not None), None)
    listed = f"Keys of {parent}: {', '.join(siblings)}." if siblings and len(siblings) <= 15 else ""
    hint = f"Did you mean {close}?" if close else "Remove it."
    return Problem(path=path, what=what, why=f"{why} {listed}".strip(), fix=hint)


def _takes(table: dict[str, type[Section]], name: str) -> bool:
    return any(name in model.model_fields for model in table.values())


def _items(count: Any) -> str:
    return "1 item" if count == 1 else f"{count} items"


def _wrong_choice(path: str, value: Any, expected: str) -> Problem:
    choices = [choice.strip("'") for choice in expected.replace(" or ", ", ").split(", ")]
    near = did_you_mean(value, choices) if isinstance(value, str) else None
    if path.endswith(".device") and isinstance(value, str) and value.partition(":")[0].lower() in _ACCELERATORS:
        near = "none"  # what is not offloaded stays there
    listed = ", ".join(f'"{choice}"' for choice in choices)
    return Problem(
        path=path,
        what=f"{show(value)} is not a choice here",
        why=f"Only {listed} mean something.",
        fix=f'Did you mean "{near}"?' if near else f'Write one of them, for example "{choices[0]}".',
    )


def _wrong_type(path: str, value: Any, wanted: str, message: str) -> Problem:
    if not wanted:
        return Problem(path=path, what=f"{show(value)} is not right here", why=message, fix="Write another value.")
    fix = f"Write {wanted}."
    if isinstance(value, str) and "number" in wanted and _is_number(value):
        fix = f"Write {value} without quotes."
    elif isinstance(value, str) and wanted == "true or false" and value.lower() in ("true", "false"):
        fix = f"Write {value.lower()} without quotes."
    elif value in (0, 1) and not isinstance(value, bool) and wanted == "true or false":
        fix = f"Write {'true' if value else 'false'}."
    elif isinstance(value, str) and path.endswith((".offload_optimizer", ".offload_param")):
        fix = f'Write {{"device": {show(value)}}}.'
    elif isinstance(value, bool) and path in ("$.fp16", "$.bf16", "$.amp", "$.torch_autocast", "$.flops_profiler"):
        fix = f'Write {{"enabled": {show(value)}}}.'
    elif value is None:
        fix = f"Remove the key to take the default, or write {wanted}."
    elif isinstance(value, bool) and path == "$.zero_optimization":
        fix = 'This old form is gone: write {"stage": 1}.' if value else "Remove the key."
    return Problem(
        path=path,
        what=f"{show(value)} is {_kind_of(value)}, but {wanted} is needed",
        why="Values are taken as they are written, never converted.",
        fix=fix,
    )


def _kind_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names: dict[type, str] = {
        str: "text in quotes",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a Python {type(value).__name__}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
