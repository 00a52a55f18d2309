"""Flags to plans, with device counts that this machine need not have."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from hf_zero_plugin.cli import placement
from hf_zero_plugin.cli.devices import visible_value
from hf_zero_plugin.cli.network import find_free_port
from hf_zero_plugin.cli.placement import LaunchRequest, plan_launch
from hf_zero_plugin.errors import LaunchError


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(placement, "usable_cores", lambda: 8)


def request(**flags: Any) -> LaunchRequest:
    return LaunchRequest(target="train.py", **flags)


def test_no_flags_take_every_gpu() -> None:
    plan = plan_launch(request(), num_gpus=4)
    assert (plan.num_processes, plan.num_nodes, plan.node_rank) == (4, 1, 0)
    assert "CUDA_VISIBLE_DEVICES" not in plan.environment
    assert plan.environment["OMP_NUM_THREADS"] == "2"


def test_include_shows_only_that_gpu() -> None:
    plan = plan_launch(request(include="localhost:1"), num_gpus=2)
    assert plan.num_processes == 1
    assert plan.environment == {"CUDA_VISIBLE_DEVICES": "1"}


def test_indices_count_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5a, 7")
    plan = plan_launch(request(include="localhost:1,2"), num_gpus=3)
    assert plan.environment["CUDA_VISIBLE_DEVICES"] == "GPU-5a,7"


def test_visible_value_leaves_a_full_selection_alone() -> None:
    assert visible_value({}, 2, (0, 1)) is None
    assert visible_value({}, 3, (0, 2)) == "0,2"


def test_gpu_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(LaunchError, match=r"no GPU 3. It has: localhost: 0, 1"):
        plan_launch(request(include="localhost:3"), num_gpus=2)


def test_cpu_ranks_are_announced(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_launch(request(num_gpus=2), num_gpus=0)
    assert plan.num_processes == 2
    assert plan.environment == {"OMP_NUM_THREADS": "4"}
    said = capsys.readouterr().err
    assert "no GPU is visible, so this runs on CPU in 2 processes" in said
    assert "OMP_NUM_THREADS=4" in said


def test_threads_that_the_user_chose_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in plan_launch(request(num_gpus=2), num_gpus=0).environment


def test_port_in_use_is_refused_and_a_free_one_is_found() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(LaunchError, match=f"--master_port {port} is in use"):
            plan_launch(request(master_port=port), num_gpus=1)
        assert plan_launch(request(), num_gpus=1).master_port != port


@pytest.mark.parametrize("port", [0, -1, 2**16])
def test_impossible_port(port: int) -> None:
    with pytest.raises(LaunchError, match="from 1 to 65535"):
        plan_launch(request(master_port=port), num_gpus=1)


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("worker-0 slots=2\nworker-1 slots=4 # bigger\n")
    return str(path)


def test_nodes_need_a_rank_and_get_the_commands_to_type(hostfile: str) -> None:
    with pytest.raises(LaunchError) as caught:
        plan_launch(
            LaunchRequest(target="train.py", script_args=("--name", "a b"), hostfile=hostfile, num_gpus=2), num_gpus=4
        )
    first, second = str(caught.value).splitlines()[-2:]
    assert "--node_rank is missing" in str(caught.value)
    assert first.split(": ", 1) == [
        "  on worker-0",
        f"hf-zero run --hostfile {hostfile} --num_gpus 2 --node_rank 0 --master_addr worker-0 "
        "--master_port 29500 train.py --name 'a b'",
    ]
    assert "on worker-1" in second
    assert "--node_rank 1 --master_addr worker-0" in second


def test_each_node_takes_its_own_slots(hostfile: str) -> None:
    port = find_free_port()
    plans = [plan_launch(request(hostfile=hostfile, node_rank=rank, master_port=port), num_gpus=4) for rank in (0, 1)]
    assert [plan.num_processes for plan in plans] == [2, 4]
    assert {(plan.num_nodes, plan.master_addr, plan.master_port) for plan in plans} == {(2, "worker-0", port)}


def test_more_slots_than_gpus(hostfile: str) -> None:
    with pytest.raises(LaunchError, match=r"gives worker-1 a GPU 3, but this machine has 2: 0, 1. Write slots=2"):
        plan_launch(request(hostfile=hostfile, node_rank=1), num_gpus=2)


def test_one_host_left_must_be_this_one(hostfile: str) -> None:
    with pytest.raises(LaunchError, match="not this machine"):
        plan_launch(request(hostfile=hostfile, include="worker-1"), num_gpus=4)
    assert plan_launch(request(hostfile=hostfile, include="worker-1", node_rank=0), num_gpus=4).num_processes == 4


def test_nameless_nodes_need_an_address() -> None:
    with pytest.raises(LaunchError, match="--node_rank and --master_addr are missing"):
        plan_launch(request(num_nodes=2), num_gpus=1)
    plan = plan_launch(request(num_nodes=2, node_rank=1, master_addr="10.0.0.1"), num_gpus=1)
    assert (plan.num_nodes, plan.node_rank, plan.master_addr, plan.master_port) == (2, 1, "10.0.0.1", 29500)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"num_nodes": 2, "node_rank": 2, "master_addr": "a"}, "it is 0 to 1"),
        ({"node_rank": 1}, "one node only"),
        ({"num_nodes": 0}, "nothing to run on"),
        ({"hostfile": "nowhere.txt"}, "cannot be read"),
        ({"include": "localhost:0", "num_nodes": 1}, "leave out"),
    ],
)
def test_errors(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(LaunchError, match=says):
        plan_launch(request(**flags), num_gpus=2)
