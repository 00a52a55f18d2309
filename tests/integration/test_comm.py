"""The process group of a process that no launcher has started."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist

from hf_zero_plugin.integration import comm

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", comm.LONE_VARIABLE)


def test_the_port_in_the_environment_may_be_taken_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    if dist.is_initialized():
        pytest.skip("another test has made a process group")
    for name in RANKS:
        monkeypatch.setenv(name, "")  # so that it is put back
        del os.environ[name]
    comm.describe_single_process()
    # As a child finds it: described by its parent, which listens.
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
        other.listen()
        comm.init_distributed("gloo")
        try:
            value = torch.ones(1)
            comm.all_reduce(value)
            assert value.item() == comm.get_world_size() == 1
            assert int(os.environ["MASTER_PORT"]) != other.getsockname()[1]
        finally:
            dist.destroy_process_group()
