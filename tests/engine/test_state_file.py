"""A file of pieces behind a few buffers: what was written is what is read, in any order of calls."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import torch

from hf_zero_plugin.engine.state_file import ALIGNMENT, StateFile
from hf_zero_plugin.errors import ConfigError

SIZES = [1, 5000, ALIGNMENT, 3 * ALIGNMENT + 7, 20000]


def _open(directory: Path, **options: int | bool) -> StateFile:
    given = {"num_buffers": 2, "block_bytes": ALIGNMENT, "num_in_flight": 4, "writes_behind": True, **options}
    return StateFile(str(directory), SIZES, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("writes_behind", [True, False])
@pytest.mark.parametrize(("num_buffers", "block_bytes", "num_in_flight"), [(1, 100, 1), (2, 4096, 4), (4, 10**6, 2)])
def test_what_was_written_is_read(
    tmp_path: Path, num_buffers: int, block_bytes: int, num_in_flight: int, writes_behind: bool
) -> None:
    file = _open(
        tmp_path,
        num_buffers=num_buffers,
        block_bytes=block_bytes,
        num_in_flight=num_in_flight,
        writes_behind=writes_behind,
    )
    choose = random.Random(0)
    expected = {index: torch.zeros(size, dtype=torch.uint8) for index, size in enumerate(SIZES)}
    for turn in range(200):
        index = choose.randrange(len(SIZES))
        for ahead in choose.sample(range(len(SIZES)), choose.randrange(3)):
            file.read_ahead(ahead)
        memory = file.read(index)[: SIZES[index]]
        assert torch.equal(memory, expected[index])
        if choose.random() < 0.7:
            memory.fill_(turn % 256)
            expected[index].fill_(turn % 256)
            file.write(index)
        else:
            file.drop(index)
        if choose.random() < 0.1:
            file.drain()
    file.close()


def test_the_file_has_no_name_and_takes_its_room_at_once(tmp_path: Path) -> None:
    file = _open(tmp_path / "made" / "here")
    assert list((tmp_path / "made" / "here").iterdir()) == []
    assert os.fstat(file._file).st_size == file.num_bytes >= sum(SIZES)
    assert file.buffer_bytes == 2 * 5 * ALIGNMENT
    file.close()
    file.close()


def test_a_place_that_cannot_hold_the_states_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    occupied = tmp_path / "file"
    occupied.touch()
    with pytest.raises(ConfigError, match=r"nvme_path: .* cannot be kept in .*file"):
        _open(occupied)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        _open(tmp_path)
    assert list(tmp_path.iterdir()) == [occupied]
