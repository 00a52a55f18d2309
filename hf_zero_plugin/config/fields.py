"""The words the schema is written in.

A field says what it means and what becomes of it::

    gradient_clipping: AutoNonNegative = applied(1.0, "Largest global gradient norm; 0 switches clipping off.")
    round_robin_gradients: bool = inert(False, "Order of gradients among ranks.", why="Buckets are already even.")
    sparse_gradients: bool = refused(False, "Sparse embedding gradients.", why="...", fix="...")

Numbers are strict: ``"0.5"`` and ``true`` are not numbers, ``1`` is a fine float, and ``5e8`` is a fine integer
because JSON writes large integers so. An annotation names the resolved type; the ``Auto...`` types accept the word
``"auto"`` as well until ``auto.resolve`` has replaced it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

__all__ = [
    "AUTO",
    "VARIANTS",
    "AutoAllowed",
    "Ruling",
    "Section",
    "Verdict",
    "applied",
    "inert",
    "refused",
    "ruling_of",
    "section",
]

AUTO = "auto"
Verdict = Literal["applied", "inert", "refused"]


class Section(BaseModel):
    """Base of every JSON object: no unknown keys, no coercion."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruling:
    """What becomes of a key."""

    verdict: Verdict
    why: str = ""
    fix: str = ""
    accepted: tuple[Any, ...] = ()
    """Of a refused key: the values that are not refused."""
    otherwise: Verdict = "inert"
    """Of a refused key: the verdict for those values."""

    def refuses(self, value: Any) -> bool:
        """Whether ``value`` asks for what we refuse. A dict asks unless everything in it is switched off."""
        if self.verdict != "refused" or value is None or value in self.accepted:
            return False
        if isinstance(value, dict):
            switches = list(_switches(value))
            return bool(value) and (not switches or any(switches))
        return True


def _switches(node: dict[str, Any]) -> list[bool]:
    """Every ``enabled`` at any depth."""
    found = []
    for key, value in node.items():
        if key == "enabled":
            found.append(value is not False)
        elif isinstance(value, dict):
            found.extend(_switches(value))
    return found


def applied(default: Any, description: str, *, note: str = "") -> Any:
    """The engine does this. ``note`` says where we differ from DeepSpeed."""
    return _field(default, description, Ruling(verdict="applied", why=note))


def inert(default: Any, description: str, *, why: str) -> Any:
    """Accepted, and nothing needs doing."""
    return _field(default, description, Ruling(verdict="inert", why=why))


def refused(
    default: Any,
    description: str,
    *,
    why: str,
    fix: str,
    accepted: tuple[Any, ...] = (),
    otherwise: Verdict = "inert",
) -> Any:
    """An error when asked for; ``accepted`` are the values that are fine, beside the default."""
    ruling = Ruling(verdict="refused", why=why, fix=fix, accepted=(default, *accepted), otherwise=otherwise)
    return _field(default, description, ruling)


def section(model: type[Section], description: str) -> Any:
    """A JSON object with a model of its own."""
    return Field(default_factory=model, description=description)


def _field(default: Any, description: str, ruling: Ruling) -> Any:
    extra: dict[str, Any] = {"x-verdict": ruling.verdict}
    if ruling.why:
        extra["x-why"] = ruling.why
    if ruling.fix:
        extra["x-fix"] = ruling.fix
    if ruling.verdict == "refused":
        extra["x-accepted"] = list(ruling.accepted)
        extra["x-otherwise"] = ruling.otherwise
    return Field(default, description=description, json_schema_extra=extra)


def ruling_of(field: FieldInfo) -> Ruling | None:
    """The ruling written on a field; None for a field that is a section."""
    extra = field.json_schema_extra
    if not isinstance(extra, dict) or "x-verdict" not in extra:
        return None
    stored: dict[str, Any] = dict(extra)
    return Ruling(
        verdict=stored["x-verdict"],
        why=stored.get("x-why", ""),
        fix=stored.get("x-fix", ""),
        accepted=tuple(stored.get("x-accepted", ())),
        otherwise=stored.get("x-otherwise", "inert"),
    )


class AutoAllowed:
    """Annotation: the word ``"auto"`` is let through, everything else is validated as before."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(
            lambda value, validate: value if value == AUTO else validate(value), handler(source)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"const": AUTO}, handler(schema)]}


VARIANTS = ("one", "list")
"""Tags that pydantic puts into the place of an error for a value that may be one number or a list."""


def _variant(value: Any) -> str:
    return "list" if isinstance(value, list) else "one"


def _whole(value: Any) -> Any:
    """5e8 -> 500000000; anything else is left to the strict validator."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_DTYPE_SPELLINGS: dict[str, str] = {
    spelling: name
    for name, spellings in {
        "fp16": ("fp16", "float16", "half"),
        "bf16": ("bf16", "bfloat16"),
        "fp32": ("fp32", "float32", "float"),
    }.items()
    for plain in spellings
    for spelling in (plain, f"torch.{plain}")
}


def canonical_dtype(value: Any) -> Any:
    """ "torch.float16", "float16", "half" -> "fp16", and so on; anything unknown is returned as it came."""
    return _DTYPE_SPELLINGS.get(value, value) if isinstance(value, str) else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _never(value: Any) -> Any:
    """accelerate writes infinity for "never"."""
    return None if value == float("inf") else value


Whole = BeforeValidator(_whole)
Integer = Annotated[int, Whole]
Count = Annotated[int, Ge(0), Whole]
Positive = Annotated[int, Ge(1), Whole]
DepthLimit = Annotated[int, Ge(-1), Whole]
NonNegative = Annotated[float, Ge(0)]
LogLevel = Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)]
AboveZero = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Le(1)]
Beta = Annotated[float, Ge(0), Lt(1)]
Betas = Annotated[list[Beta], Field(min_length=2, max_length=2)]
PrintEvery = Annotated[Positive | None, BeforeValidator(_never)]
ScalePower = Annotated[int, Ge(0), Le(127), Whole]
"""2 to this power is still a number in fp32."""
Dtype = Annotated[Literal["fp16", "bf16", "fp32"], BeforeValidator(canonical_dtype)]
HalfDtype = Annotated[Literal["fp16", "bf16"], BeforeValidator(canonical_dtype)]
Device = Literal["none", "cpu", "nvme"]
LowerCase = BeforeValidator(_lower)
PerGroup = Annotated[
    Annotated[NonNegative, Tag("one")] | Annotated[list[NonNegative], Tag("list")], Discriminator(_variant)
]
"""One number for all parameter groups of the optimizer, or a list with one for each."""
Names = Annotated[list[str], BeforeValidator(_listed)]
Opaque = dict[str, Any]
"""A section that is refused as a whole: what is in it is not looked at."""

AutoFlag = Annotated[bool, AutoAllowed()]
AutoPositive = Annotated[int, Ge(1), Whole, AutoAllowed()]
AutoCount = Annotated[int, Ge(0), Whole, AutoAllowed()]
AutoNonNegative = Annotated[float, Ge(0), AutoAllowed()]
AutoPerGroup = Annotated[PerGroup, AutoAllowed()]
AutoShare = Annotated[float, Ge(0), Le(1), AutoAllowed()]
AutoBetas = Annotated[list[Beta], Field(min_length=2, max_length=2), AutoAllowed()]
AutoStage = Annotated[int, Ge(0), Le(3), Whole, AutoAllowed()]
AutoDevice = Annotated[Literal["none", "cpu", "nvme"], AutoAllowed()]
AutoText = Annotated[str, AutoAllowed()]
