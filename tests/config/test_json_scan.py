"""The scanner accepts what json.loads accepts, knows where everything stands, and says why a text is not JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_zero_plugin.config.json_scan import JsonSyntaxError, scan_json
from hf_zero_plugin.config.problems import Position

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
KEYS = st.text(max_size=6).filter(lambda key: "." not in key and "[" not in key)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@given(DOCUMENTS, st.sampled_from([None, 0, 2]), st.booleans())
def test_values_are_those_of_json_loads(document: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
    assert scan_json(text).value == json.loads(text)


@given(DOCUMENTS)
def test_every_key_stands_where_its_position_says(document: Any) -> None:
    text = json.dumps(document, indent=1)
    lines = text.split("\n")
    for path, position in scan_json(text).positions.items():
        here = lines[position.line - 1][position.column - 1 :]
        name = path.rpartition(".")[2]
        if path != "$" and not path.endswith("]"):
            assert here.startswith(f"{json.dumps(name)}:")


@given(st.text(alphabet='{}[],:"truefalsn0123456789.eE+- \n\\', max_size=12))
def test_what_json_loads_refuses_is_refused_with_a_position_and_no_more(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(JsonSyntaxError) as caught:
            scan_json(text)
        problem = caught.value.problem
        assert problem.position is not None
        assert problem.what.startswith("not JSON: ")
        assert problem.why
        assert problem.fix
    else:
        assert scan_json(text).value == expected


def test_constants_that_python_allows_are_allowed() -> None:
    value = scan_json('{"a": Infinity, "b": -Infinity, "c": NaN}').value
    assert (value["a"], value["b"]) == (math.inf, -math.inf)
    assert math.isnan(value["c"])


@given(KEYS)
def test_a_duplicate_key_is_reported_at_its_second_place(key: str) -> None:
    quoted = json.dumps(key)
    scanned = scan_json(f"{{{quoted}: 1,\n {quoted}: 2}}")
    [problem] = scanned.duplicates
    assert problem.position == Position(2, 2)
    assert "twice, first at line 1" in problem.what


def test_duplicates_are_found_at_every_depth_and_same_names_elsewhere_are_none() -> None:
    text = '{"a": {"x": 1, "x": 2}, "b": {"x": 1}, "c": [{"x": 1}, {"x": 1, "x": 1}]}'
    assert [problem.path for problem in scan_json(text).duplicates] == ["$.a.x", "$.c[1].x"]


@pytest.mark.parametrize(
    ("text", "position", "why", "fix"),
    [
        ('{"a": 1,}', (1, 8), "trailing comma", "Remove the comma"),
        ('{"a": [1, 2,\n]}', (1, 12), "trailing comma", "Remove the comma"),
        ('{"a": 1 // one\n}', (1, 9), "no comments", "Remove the comment"),
        ('# head\n{"a": 1}', (1, 1), "no comments", "Remove the comment"),
        ('{"a": 1,\n  /* two */ "b": 2}', (2, 3), "no comments", "Remove the comment"),
        ('{"a": 1\n "b": 2}', (2, 2), "without a comma", "Put a comma"),
        ("{'a': 1}", (1, 2), "single quotes", "double quotes"),
        ("{a: 1}", (1, 2), "Keys need double quotes", 'Write "a"'),
        ('{"a": True}', (1, 7), "Python", "Write true"),
        ('{"a": None}', (1, 7), "Python", "Write null"),
        ('{"a": ture}', (1, 7), "not a JSON value", "Write true"),
        ('{"a": cpu}', (1, 7), "not a JSON value", 'Write "cpu"'),
        ('{"a": .5}', (1, 7), "numbers look like", "in that form"),
        ('{"a": 05}', (1, 8), "numbers look like", "in that form"),
        ('{"a": {"b": 1}', (1, 15), "not closed", "Close it"),
        ('{"a": "b\n"}', (1, 9), "not closed on its line", 'Close it with "'),
        ('{"a" 1}', (1, 6), "cannot stand here", '":"'),
        ('{"a": 1}}', (1, 9), "One file holds one object", "Remove what follows"),
        ("", (1, 1), "An object was expected", "zero_optimization"),
        ("\ufeff{}", (1, 1), "JSON has none", "without BOM"),
    ],
)
def test_each_usual_mistake_is_named(text: str, position: tuple[int, int], why: str, fix: str) -> None:
    with pytest.raises(JsonSyntaxError) as caught:
        scan_json(text)
    problem = caught.value.problem
    assert problem.position == position
    assert why in problem.why
    assert fix in problem.fix


def test_endless_nesting_is_an_error_and_no_crash() -> None:
    with pytest.raises(JsonSyntaxError, match="nested too deeply"):
        scan_json("[" * 100_000)
