"""The schema as JSON Schema, so that editors complete and check ds_config.json."""

from __future__ import annotations

from typing import Any

from hf_zero_plugin.config.fields import Section
from hf_zero_plugin.config.paths import lookup
from hf_zero_plugin.config.renames import OLD_SWITCHES, RENAMED
from hf_zero_plugin.config.schema import DsConfig
from hf_zero_plugin.config.schema_optim import OPTIMIZERS, SCHEDULERS

__all__ = ["json_schema"]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TOLD = {"inert": "No effect: ", "refused": "Refused: "}


def json_schema() -> dict[str, Any]:
    """Draft 2020-12. Verdicts are in the descriptions and under ``x-verdict``; old spellings are deprecated."""
    schema: dict[str, Any] = DsConfig.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    for name, types in (("Optimizer", OPTIMIZERS), ("Scheduler", SCHEDULERS)):
        _add_params(definitions, name, types)
    _add_old_keys(schema, definitions)
    for node in (schema, *definitions.values()):
        _tell_verdicts(node)
    about = "The ds_config.json that hf_zero_plugin reads; --deepspeed of the Trainer names it."
    return {"$schema": _DIALECT, **schema, "title": "ds_config.json", "description": about}


def _add_params(definitions: dict[str, Any], name: str, types: dict[str, type[Section]]) -> None:
    """``params`` depends on ``type``; types are matched without regard to case."""
    section = definitions[name]
    described = section["properties"]["type"]
    section["properties"]["type"] = {**described, "type": "string", "examples": list(types)}
    section["allOf"] = []
    for title, model in types.items():
        definition = model.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(definition.pop("$defs", {}))
        definitions[model.__name__] = definition
        section["allOf"].append(
            {
                "if": {"properties": {"type": {"pattern": _any_case(title)}}, "required": ["type"]},
                "then": {"properties": {"params": {"$ref": f"#/$defs/{model.__name__}"}}},
            }
        )


def _any_case(word: str) -> str:
    letters = (f"[{char.upper()}{char.lower()}]" if char.isalpha() else char for char in word)
    return f"^{''.join(letters)}$"


def _add_old_keys(schema: dict[str, Any], definitions: dict[str, Any]) -> None:
    def section_at(path: str) -> dict[str, Any]:
        return schema if path == "$" else definitions["ZeroOptimization"]

    for old, new in RENAMED.items():
        parent, _, name = old.rpartition(".")
        properties = section_at(parent)["properties"]
        meant = properties[new.rpartition(".")[2]]
        properties[name] = {**meant, "deprecated": True, "description": f"Old spelling of {new}."}
    for old, targets in OLD_SWITCHES.items():
        parent, _, name = old.rpartition(".")
        section_at(parent)["properties"][name] = {
            "type": "boolean",
            "deprecated": True,
            "description": f"Old switch for {' and '.join(targets)}.",
        }


def _tell_verdicts(node: dict[str, Any]) -> None:
    for item in node.get("properties", {}).values():
        told = _TOLD.get(lookup({"item": item}, "$.item.x-verdict") or "")
        if told:
            item["description"] = f"{item.get('description', '')} {told}{item.get('x-why', '')}".strip()
        for internal in ("x-accepted", "x-otherwise"):
            item.pop(internal, None)
