"""Hosts and devices from flags, against a second reading of the same rules."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_zero_plugin.cli.selection import LOCALHOST, parse_filter, parse_hostfile, select, select_cpu
from hf_zero_plugin.errors import LaunchError

HOSTS = st.dictionaries(st.from_regex(r"worker-[0-9]{1,2}", fullmatch=True), st.integers(1, 8), min_size=1, max_size=4)
TWO_NODES = {"worker-0": 4, "worker-1": 2}


def write_filter(chosen: dict[str, tuple[int, ...]]) -> str:
    return "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in chosen.items())


@given(HOSTS)
def test_hostfile_round_trips(hosts: dict[str, int]) -> None:
    lines = ["# cluster", *(f"  {host}\tslots = {slots}  # rack 1" for host, slots in hosts.items()), ""]
    assert parse_hostfile("\n".join(lines), "hosts") == hosts


def test_hostfile_keeps_the_order_of_nodes() -> None:
    assert list(parse_hostfile("b slots=1\na slots=2\nc", "hosts")) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a slots=2\nb slots=two", "line 2"),
        ("a slots=2\na slots=2", "second time"),
        ("a slots=0", "slots=0"),
        ("a 4", "worker-0 slots=4"),
        ("# nobody", "names no host"),
    ],
)
def test_hostfile_errors_name_file_line_and_fix(text: str, says: str) -> None:
    with pytest.raises(LaunchError, match=says) as caught:
        parse_hostfile(text, "cluster.txt")
    assert "cluster.txt" in str(caught.value)


@given(st.data(), HOSTS)
def test_include_selects_exactly_what_it_names(data: st.DataObject, hosts: dict[str, int]) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(hosts)), min_size=1, unique=True))
    wanted = {
        name: tuple(sorted(data.draw(st.sets(st.integers(0, hosts[name] - 1), min_size=1), label=name)))
        for name in names
    }
    chosen = select(hosts, include=write_filter(wanted))
    assert chosen == wanted
    assert list(chosen) == [host for host in hosts if host in wanted]


@given(st.data(), HOSTS)
def test_exclude_is_the_complement_of_include(data: st.DataObject, hosts: dict[str, int]) -> None:
    unwanted = {
        host: tuple(sorted(data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1), label=host)))
        for host, count in hosts.items()
    }
    named = {host: slots for host, slots in unwanted.items() if slots}
    chosen = select(hosts, exclude=write_filter(named)) if named else select(hosts)
    for host, count in hosts.items():
        assert sorted(chosen[host] + unwanted[host]) == list(range(count))


def test_host_without_indices_means_all_of_it() -> None:
    assert parse_filter("a:1,0@b", "--include") == {"a": (0, 1), "b": None}
    assert select(TWO_NODES, include="worker-1") == {"worker-1": (0, 1)}
    assert select(TWO_NODES, exclude="worker-1@worker-0:0") == {"worker-0": (1, 2, 3)}


def test_counts_take_the_first_nodes_and_devices() -> None:
    assert select(TWO_NODES, num_gpus=2) == {"worker-0": (0, 1), "worker-1": (0, 1)}
    assert select(TWO_NODES, num_nodes=1) == {"worker-0": (0, 1, 2, 3)}


def test_this_machine_has_several_names() -> None:
    for name in ("localhost", "127.0.0.1", socket.gethostname()):
        assert select({LOCALHOST: 2}, include=f"{name}:1") == {LOCALHOST: (1,)}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"include": "localhost:0", "exclude": "localhost:1"}, "both given"),
        ({"include": "localhost:0", "num_gpus": 1}, "leave out --num_gpus"),
        ({"include": "localhost:2"}, "no GPU 2. It has: localhost: 0, 1"),
        ({"include": "elsewhere:0"}, "unknown host 'elsewhere'. Known: localhost"),
        ({"include": "localhost@127.0.0.1"}, "both this machine"),
        ({"include": "localhost:0,0"}, "listed twice"),
        ({"include": "localhost:"}, "not a device index"),
        ({"include": "localhost:0@"}, "host name is missing"),
        ({"exclude": "localhost:0,1"}, "leaves no device"),
        ({"exclude": "localhost"}, "leaves no device"),
        ({"num_gpus": 3}, "localhost has 2"),
        ({"num_gpus": 0}, "nothing to run on"),
        ({"num_nodes": 2}, "only 1 host"),
    ],
)
def test_errors_say_what_and_what_there_is(flags: dict[str, object], says: str) -> None:
    with pytest.raises(LaunchError, match=says):
        select({LOCALHOST: 2}, **flags)  # type: ignore[arg-type]


def test_gpu_commands_run_without_a_gpu() -> None:
    """The article's ``--include localhost:1`` is one CPU process where there is no GPU."""
    assert select_cpu(include="localhost:1") == {LOCALHOST: (0,)}
    assert select_cpu(include="localhost") == {LOCALHOST: (0,)}
    assert select_cpu(include="localhost:0,3") == {LOCALHOST: (0, 1)}
    assert select_cpu(exclude="localhost:0") == {LOCALHOST: (0,)}
    assert select_cpu(num_gpus=2) == {LOCALHOST: (0, 1)}
    assert select_cpu() == {LOCALHOST: (0,)}


def test_mistakes_stay_mistakes_without_a_gpu() -> None:
    for flags in ({"include": "elsewhere:0"}, {"include": "localhost:x"}, {"num_gpus": 0}):
        with pytest.raises(LaunchError):
            select_cpu(**flags)  # type: ignore[arg-type]
