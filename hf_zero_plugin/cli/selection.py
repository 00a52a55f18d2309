"""Which hosts and devices a launch uses: hostfiles, ``--include``, ``--exclude``, ``--num_nodes``, ``--num_gpus``.

Pure functions over names and indices; of the machine they ask only its name.

=====================  ==============================================================
``--include``          ``worker-0:0,2@worker-1``: devices 0 and 2 of one, all of the other
``--exclude``          the same notation: everything in the hostfile but these
hostfile line          ``worker-0 slots=8``; ``#`` starts a comment
this machine           ``localhost``, ``127.0.0.1`` or its own name
=====================  ==============================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hf_zero_plugin.errors import LaunchError

__all__ = ["LOCALHOST", "Slots", "check_flags", "parse_filter", "parse_hostfile", "select", "select_cpu"]

LOCALHOST = "localhost"

Slots = dict[str, tuple[int, ...]]
"""Host name -> indices of the devices to use there, in launch order: the first host is node 0."""

_HOSTFILE_LINE = re.compile(r"^(?P<host>\S+)(?:\s+slots\s*=\s*(?P<slots>\d+))?$")


def parse_hostfile(text: str, source: str) -> dict[str, int]:
    """Hosts and their number of devices, in file order. A host without ``slots=`` has one.

    Raises:
        LaunchError: a line that is not ``host slots=N``, a host named twice, no slots, no hosts at all.
    """
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        match = _HOSTFILE_LINE.match(entry)
        where = f"hostfile {source}, line {number}"
        if match is None:
            raise LaunchError(f"{where}: cannot read {entry!r}. Write one host per line, as in: worker-0 slots=4")
        host, slots = match["host"], int(match["slots"] or 1)
        if host in hosts:
            raise LaunchError(f"{where}: host {host!r} is named a second time. Give each host one line.")
        if slots == 0:
            raise LaunchError(f"{where}: host {host!r} has slots=0. Give it at least one, or remove the line.")
        hosts[host] = slots
    if not hosts:
        raise LaunchError(f"hostfile {source} names no host. Write one per line, as in: worker-0 slots=4")
    return hosts


def parse_filter(text: str, flag: str) -> dict[str, tuple[int, ...] | None]:
    """``host:0,1@host2`` -> ``{"host": (0, 1), "host2": None}``; None means every device of that host.

    Raises:
        LaunchError: an empty part, an index that is not a number, a host or an index named twice.
    """
    wanted: dict[str, tuple[int, ...] | None] = {}
    for part in text.split("@"):
        host, colon, listed = part.strip().partition(":")
        if not host:
            raise LaunchError(f"{flag} {text!r}: a host name is missing. Write host:0,1@host2")
        if host in wanted:
            raise LaunchError(f"{flag} {text!r}: host {host!r} is named twice. List its devices once: {host}:0,1")
        wanted[host] = _parse_indices(listed, text, flag) if colon else None
    return wanted


def select(
    available: Mapping[str, int],
    *,
    include: str = "",
    exclude: str = "",
    num_nodes: int | None = None,
    num_gpus: int | None = None,
) -> Slots:
    """Apply the flags to what there is.

    Args:
        available: number of devices per host, in launch order, as hostfile or machine say.
        include: ``--include``; its order of hosts does not matter, ``available`` keeps its own.
        exclude: ``--exclude``.
        num_nodes: use the first so many hosts.
        num_gpus: use the first so many devices of each host.

    Raises:
        LaunchError: flags that contradict each other, unknown hosts or devices, nothing left to run on.
    """
    check_flags(include, exclude, num_nodes, num_gpus)
    chosen: Slots = {host: tuple(range(count)) for host, count in available.items()}
    if include:
        wanted = _checked(parse_filter(include, "--include"), available, "--include")
        chosen = {host: wanted[host] for host in chosen if host in wanted}
    elif exclude:
        unwanted = _checked(parse_filter(exclude, "--exclude"), available, "--exclude")
        chosen = {host: tuple(i for i in slots if i not in unwanted.get(host, ())) for host, slots in chosen.items()}
        chosen = {host: slots for host, slots in chosen.items() if slots}
        if not chosen:
            raise LaunchError(f"--exclude {exclude!r} leaves no device. There are: {_describe(available)}.")
    if num_nodes is not None:
        if num_nodes > len(chosen):
            raise LaunchError(
                f"--num_nodes {num_nodes}: only {len(chosen)} host(s) known ({', '.join(chosen)}). "
                "Add the missing ones to the hostfile."
            )
        chosen = dict(list(chosen.items())[:num_nodes])
    if num_gpus is not None:
        for host, slots in chosen.items():
            if num_gpus > len(slots):
                raise LaunchError(
                    f"--num_gpus {num_gpus}: {host} has {len(slots)}. "
                    f"Ask for {len(slots)} or fewer, or leave the flag out."
                )
        chosen = {host: slots[:num_gpus] for host, slots in chosen.items()}
    return chosen


def select_cpu(*, include: str = "", exclude: str = "", num_gpus: int | None = None) -> Slots:
    """The processes to run on a machine without any GPU: as many as the flags ask for devices, else one.

    Commands written for a GPU machine keep working: ``--include localhost:1`` is one process.
    """
    check_flags(include, exclude, None, num_gpus)
    num_processes = num_gpus or 1
    for flag, text in (("--include", include), ("--exclude", exclude)):
        if text:
            wanted = _checked(parse_filter(text, flag), {LOCALHOST: 0}, flag, check_indices=False)
            if flag == "--include":
                num_processes = len(wanted[LOCALHOST] or (0,))
    return {LOCALHOST: tuple(range(num_processes))}


def check_flags(include: str, exclude: str, num_nodes: int | None, num_gpus: int | None) -> None:
    if include and exclude:
        raise LaunchError("--include and --exclude were both given. Keep one: what to use, or what not to use.")
    if (include or exclude) and (num_nodes is not None or num_gpus is not None):
        flag = "--include" if include else "--exclude"
        raise LaunchError(f"{flag} already says which devices to use: leave out --num_gpus and --num_nodes beside it.")
    for flag, count in (("--num_nodes", num_nodes), ("--num_gpus", num_gpus)):
        if count is not None and count < 1:
            raise LaunchError(
                f"{flag} {count}: there is nothing to run on. Use 1 or more"
                + (", or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on CPU." if flag == "--num_gpus" else ".")
            )


def _parse_indices(listed: str, text: str, flag: str) -> tuple[int, ...]:
    indices: list[int] = []
    for item in listed.split(","):
        if not item.strip().isdecimal():
            raise LaunchError(f"{flag} {text!r}: {item!r} is not a device index. Write host:0,1@host2")
        indices.append(int(item))
    if len(set(indices)) != len(indices):
        raise LaunchError(f"{flag} {text!r}: a device index is listed twice. Each device runs one process.")
    return tuple(sorted(indices))


def _checked(
    wanted: Mapping[str, tuple[int, ...] | None],
    available: Mapping[str, int],
    flag: str,
    *,
    check_indices: bool = True,
) -> Slots:
    """The filter with host aliases resolved and "all" spelled out, every host and index known to exist."""
    resolved: Slots = {}
    for name, indices in wanted.items():
        host = LOCALHOST if LOCALHOST in available and _is_this_machine(name) else name
        if host not in available:
            raise LaunchError(
                f"{flag}: unknown host {name!r}. Known: {', '.join(available)}. "
                "Hosts other than this machine are read from --hostfile."
            )
        if host in resolved:
            raise LaunchError(f"{flag}: {name!r} and another name in it are both this machine. Name it once.")
        for index in indices or ():
            if check_indices and index >= available[host]:
                raise LaunchError(
                    f"{flag}: {host} has no GPU {index}. It has: {_describe({host: available[host]})}. "
                    "Indices count the visible ones (CUDA_VISIBLE_DEVICES) from 0."
                )
        resolved[host] = tuple(range(available[host])) if indices is None else indices
    return resolved


def _is_this_machine(name: str) -> bool:
    import socket

    own_name = socket.gethostname()
    return name in (LOCALHOST, "127.0.0.1", "::1", own_name, own_name.partition(".")[0])


def _describe(available: Mapping[str, int]) -> str:
    return "; ".join(f"{host}: {', '.join(map(str, range(count))) or 'none'}" for host, count in available.items())
