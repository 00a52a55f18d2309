"""JSON text -> the values that ``json.loads`` would give, and where every one of them stands.

The standard parser keeps no positions and lets duplicate keys pass. This one accepts exactly what it accepts
(``NaN`` and ``Infinity`` included), remembers the place of every key, and says why a text is not JSON.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from hf_zero_plugin.config.problems import Position, Problem, did_you_mean

__all__ = ["JsonSyntaxError", "ScannedJson", "scan_json"]

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORD = re.compile(r"-?[A-Za-z_][A-Za-z_0-9]*")
_CONSTANTS: dict[str, Any] = {
    "true": True,
    "false": False,
    "null": None,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}
_FOREIGN_WORDS = {"True": "true", "False": "false", "None": "null", "TRUE": "true", "FALSE": "false"}


@dataclass(frozen=True, slots=True)
class ScannedJson:
    value: Any
    positions: dict[str, Position] = field(default_factory=dict)
    """``$.zero_optimization.stage``, ``$.betas[0]`` -> where the key, or the list item, begins."""
    duplicates: list[Problem] = field(default_factory=list)


class JsonSyntaxError(ValueError):
    """The text is not JSON; ``problem`` says where and why."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(problem.what)


def scan_json(text: str) -> ScannedJson:
    """Parse a whole JSON document.

    Raises:
        JsonSyntaxError: the text is not JSON.
    """
    scanner = _Scanner(text)
    try:
        value = scanner.document()
    except RecursionError:
        raise JsonSyntaxError(Problem(path="$", what="the JSON is nested too deeply to be a configuration")) from None
    return ScannedJson(value, scanner.positions, scanner.duplicates)


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.positions: dict[str, Position] = {}
        self.duplicates: list[Problem] = []

    def document(self) -> Any:
        if self.text.startswith("\ufeff"):
            raise self.error(
                "the file begins with a byte-order mark", "JSON has none.", "Save it as UTF-8 without BOM."
            )
        self.skip_space()
        self.positions["$"] = self.position(self.at)
        if self.at == len(self.text):
            raise self.error(
                "the text is empty", "An object was expected.", 'Write at least {"zero_optimization": {}}.'
            )
        value = self.value("$")
        self.skip_space()
        if self.at < len(self.text):
            raise self.error("there is more text after the end of the configuration", *self._cause("the end"))
        return value

    def value(self, path: str) -> Any:
        """The value that begins here; leaves ``at`` behind it."""
        start = self.text[self.at : self.at + 1]
        if start == "{":
            return self.object(path)
        if start == "[":
            return self.array(path)
        if start == '"':
            return self.string()
        word = _WORD.match(self.text, self.at)
        if word and word.group() in _CONSTANTS:
            self.at = word.end()
            return _CONSTANTS[word.group()]
        number = _NUMBER.match(self.text, self.at)
        if number:
            return self.number(number)
        raise self.error("a value is missing or is not JSON", *self._cause("a value"))

    def number(self, match: re.Match[str]) -> int | float:
        whole, fraction, exponent = match.groups()
        self.at = match.end()
        # json.loads itself, so that the limits on long integers are the same.
        return json.loads(whole) if fraction is None and exponent is None else float(match.group())

    def string(self) -> str:
        try:
            value, self.at = _DECODER.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            at = min(error.pos, len(self.text) - 1)
            raise self.error(
                f"this text in quotes is not JSON ({error.msg[0].lower()}{error.msg[1:]})",
                "It is not closed on its line, or has a backslash or control character that JSON does not know.",
                'Close it with ", and write a backslash twice.',
                at=at,
            ) from None
        return str(value)

    def object(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self.at += 1
        self.skip_space()
        if self.take("}"):
            return found
        while True:
            key_at = self.at
            if self.text[self.at : self.at + 1] != '"':
                raise self.error('a key in double quotes, or "}", was expected', *self._cause("a key"))
            key = self.string()
            key_path = f"{path}.{key}"
            self.skip_space()
            if not self.take(":"):
                raise self.error(f'":" is missing after the key "{key}"', *self._cause('":"'))
            self.skip_space()
            if key in found:
                self.note_duplicate(key, key_path, key_at)
            self.positions[key_path] = self.position(key_at)
            found[key] = self.value(key_path)
            if not self.more("}", f'"," or "}}" was expected after the value of "{key}"'):
                return found

    def array(self, path: str) -> list[Any]:
        found: list[Any] = []
        self.at += 1
        self.skip_space()
        if self.take("]"):
            return found
        while True:
            item_path = f"{path}[{len(found)}]"
            self.positions[item_path] = self.position(self.at)
            found.append(self.value(item_path))
            if not self.more("]", '"," or "]" was expected in the list'):
                return found

    def more(self, closing: str, message: str) -> bool:
        """After an item: True at a comma, False at the closing bracket."""
        self.skip_space()
        if self.take(closing):
            return False
        if not self.take(","):
            raise self.error(message, *self._cause('","'))
        self.skip_space()
        if self.text[self.at : self.at + 1] == closing:
            comma = self.text.rindex(",", 0, self.at)
            raise self.error(
                f'there is a comma before "{closing}"', "JSON allows no trailing comma.", "Remove the comma.", at=comma
            )
        return True

    def note_duplicate(self, key: str, path: str, at: int) -> None:
        first = self.positions[path]
        self.duplicates.append(
            Problem(
                path=path,
                what=f'the key "{key}" is here twice, first at line {first.line}',
                why="Only the last one would count, silently.",
                fix="Keep one of them.",
                position=self.position(at),
            )
        )

    def take(self, character: str) -> bool:
        if self.text[self.at : self.at + 1] != character:
            return False
        self.at += 1
        return True

    def skip_space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def position(self, at: int) -> Position:
        line_start = self.text.rfind("\n", 0, at) + 1
        return Position(self.text.count("\n", 0, at) + 1, at - line_start + 1)

    def error(self, what: str, why: str, fix: str, at: int | None = None) -> JsonSyntaxError:
        position = self.position(self.at if at is None else at)
        return JsonSyntaxError(Problem(path="$", what=f"not JSON: {what}", why=why, fix=fix, position=position))

    def _cause(self, expected: str) -> tuple[str, str]:
        """Why and fix, guessed from what stands here instead."""
        here = self.text[self.at :]
        word = _WORD.match(here)
        if here.startswith(("//", "/*", "#")):
            return "JSON has no comments.", "Remove the comment."
        if here.startswith("'"):
            return "JSON has no single quotes.", 'Use double quotes, ".'
        if word and word.group() in _FOREIGN_WORDS:
            name = _FOREIGN_WORDS[word.group()]
            return f"{word.group()} is Python, not JSON.", f"Write {name}."
        if word and expected == "a value":
            near = did_you_mean(word.group(), ("true", "false", "null"))
            return f"{word.group()} is not a JSON value.", f"Write {near}." if near else f'Write "{word.group()}".'
        if word and expected == "a key":
            return "Keys need double quotes in JSON.", f'Write "{word.group()}".'
        if not here:
            return (
                "The text ends here: a bracket or a brace is not closed.",
                "Close it, or restore the rest of the file.",
            )
        if here[0] == "," and expected in ("a key", "a value"):
            return "There is one comma too many.", "Remove the comma."
        if here[0] in '"{[' and expected == '","':
            return "Two items follow each other without a comma.", "Put a comma between them."
        near_number = here[0] in "0123456789.+-" and (expected == "a value" or self.text[self.at - 1].isdigit())
        if near_number:
            return "JSON numbers look like 1, -0.5 or 2e8.", "Write the number in that form."
        if expected == "the end":
            return "One file holds one object.", "Remove what follows the last brace, or a brace that closes too early."
        return f"{here[0]!r} cannot stand here.", f"Put {expected} before it, or remove it."
