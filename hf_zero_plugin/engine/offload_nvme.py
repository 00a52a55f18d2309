"""Offload to NVMe: masters and states live in a file, and pass through host memory to be updated.

As ``HostHome``, with a file in the place of host memory. The file is read in the order of the update, which is the
order in which the next forward pass needs the weights; with ``pipeline_read`` the next pieces are read while one is
updated, and with ``pipeline_write`` it is written while the next ones are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor

from hf_zero_plugin.config.settings import AioSettings, OffloadOptimizerSettings
from hf_zero_plugin.engine.buckets import Piece
from hf_zero_plugin.engine.master_weights import Context
from hf_zero_plugin.engine.offload_host import HostHome, Job
from hf_zero_plugin.engine.piece_states import update_rows
from hf_zero_plugin.engine.state_file import StateFile

__all__ = ["NvmeHome"]


class NvmeHome(HostHome):
    """See the module."""

    def __init__(
        self,
        context: Context,
        pieces: Sequence[Piece],
        offload: OffloadOptimizerSettings,
        aio: AioSettings,
        *,
        threaded: bool = True,
    ) -> None:
        assert offload.nvme_path is not None
        self._offload = offload
        self._aio = aio
        super().__init__(
            context,
            pieces,
            pin_memory=offload.pin_memory,
            threaded=threaded,
            threads_share=offload.host_threads_share,
        )

    def place_states(self) -> None:
        context, path = self.context, self._offload.nvme_path
        assert path is not None
        self._num_states = len(context.rule.state_names)
        each = context.types.bytes_per_element(self._num_states)
        self._file = StateFile(
            path,
            [piece.numel * each for piece in self.pieces],
            num_buffers=self._offload.buffer_count,
            block_bytes=self._aio.block_size,
            num_in_flight=1 if self._aio.single_submit else self._aio.queue_depth * self._aio.intra_op_parallelism,
            writes_behind=self._offload.pipeline_write,
        )

    def _rows(self, index: int) -> list[Tensor]:
        return self.context.types.rows(self._file.read(index), self.pieces[index].numel, self._num_states)

    def set_master(self, index: int, values: Tensor) -> None:
        group = self.context.groups[self.pieces[index].group]
        master, *states = self._rows(index)
        master.copy_(values)
        for name, state in zip(self.context.rule.state_names, states):
            state.fill_(self.context.rule.initial_state(name, group))
        self._file.write(index)

    def apply(self, index: int, grad: Tensor, job: Job) -> Tensor:
        rows = self._rows(index)
        if self._offload.pipeline_read:
            for following in range(index + 1, len(self.pieces)):
                if not self._file.read_ahead(following):
                    break
        group = job.inputs.groups[self.pieces[index].group]
        update_rows(self.context.rule, self.context.types, rows, grad, group, job.number, None)
        return rows[0]

    def finish_piece(self, index: int) -> None:
        self._file.write(index)

    def synchronize(self) -> None:
        super().synchronize()
        self._file.drain()

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Copies: the buffers are needed for the next piece."""
        rows = [row.clone() for row in self._rows(index)]
        self._file.drop(index)
        return dict(zip(("master", *self.context.rule.state_names), rows))

    @contextlib.contextmanager
    def edit(self, index: int) -> Iterator[dict[str, Tensor]]:
        yield dict(zip(("master", *self.context.rule.state_names), self._rows(index)))
        self._file.write(index)

    def load(self, index: int, tensors: dict[str, Tensor]) -> None:
        with self.edit(index) as targets:
            for name, target in targets.items():
                if name in tensors:
                    target.copy_(tensors[name].view_as(target))

    def close(self) -> None:
        super().close()
        self._file.close()

    @property
    def num_bytes(self) -> dict[str, int]:
        """Of host memory: see ``file_bytes`` for the states."""
        return {"buffers": self._file.buffer_bytes + self.buffer_bytes}

    @property
    def file_bytes(self) -> dict[str, int]:
        total, types = sum(piece.numel for piece in self.pieces), self.context.types
        return {
            "master weights": total * types.master.itemsize,
            "moments": total * self._num_states * types.states.itemsize,
        }
