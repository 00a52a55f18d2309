"""The address at which ranks meet: a free port here, or a master that must answer elsewhere."""

from __future__ import annotations

import errno
import socket
import time

from hf_zero_plugin.cli.console import note
from hf_zero_plugin.errors import LaunchError

__all__ = ["check_port_is_free", "find_free_port", "wait_for_master"]

_RETRY_S = 0.5
_REMIND_S = 30.0


def find_free_port() -> int:
    """A TCP port that nobody listens on. The kernel hands out another one to the next caller."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def check_port_is_free(port: int) -> None:
    """Raises LaunchError if something on this machine listens on ``port``, or if it may not be used."""
    if not 0 < port < 2**16:
        raise LaunchError(f"--master_port {port}: a port is a number from 1 to 65535. Leave it out to get a free one.")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Ports of connections that ended a moment ago are free; those with a listener are not, with this set too.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                why = "is in use by another program (another training run?)"
            else:
                why = f"cannot be used ({error.strerror})"
            raise LaunchError(
                f"--master_port {port} {why}. Choose another, or leave the flag out on one machine to get a free one."
            ) from error


def wait_for_master(address: str, port: int, timeout_s: float) -> None:
    """Return when ``address:port`` accepts a connection: node 0's launcher listens there once it has started.

    Raises:
        LaunchError: the name does not resolve, or nobody answered in time.
    """
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LaunchError(
            f"--master_addr {address!r}: this machine cannot resolve the name ({error.strerror}). "
            "Use an address that every node can reach, such as node 0's IP address."
        ) from error
    started = last_reminder = time.monotonic()
    while True:
        try:
            socket.create_connection((address, port), timeout=max(_RETRY_S, min(5.0, timeout_s))).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        now = time.monotonic()
        if now - started >= timeout_s:
            raise LaunchError(
                f"node 0 did not answer at {address}:{port} within {timeout_s:.0f} s ({reason}). Check that its "
                "launcher runs, that --master_addr and --master_port are the same on every node, and that no "
                "firewall is between them."
            )
        if now - last_reminder >= _REMIND_S:
            last_reminder = now
            note(f"still waiting for node 0 at {address}:{port} ({reason})")
        time.sleep(_RETRY_S)
