"""The parts of one engine, and what is asked of all of them together.

``assembly.py`` makes them, ``sharded_assembly.py`` those of stage 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_zero_plugin.engine.buckets import BucketLayout
from hf_zero_plugin.engine.collectives import all_gather_flat
from hf_zero_plugin.engine.flat import FlatWeights
from hf_zero_plugin.engine.gradients import GradientStore
from hf_zero_plugin.engine.master_weights import MasterWeights
from hf_zero_plugin.engine.offload_nvme import NvmeHome
from hf_zero_plugin.engine.offload_stream import StreamedHome
from hf_zero_plugin.engine.readiness import Doors, unguarded
from hf_zero_plugin.engine.sharding import Sharding
from hf_zero_plugin.engine.shards import Shards
from hf_zero_plugin.engine.zero_optimizer import ZeroOptimizer

__all__ = ["Assembly"]


@dataclass
class Assembly:
    """The parts of one engine. ``masters``, ``grads`` and ``optimizer`` are None for evaluation only."""

    module: nn.Module
    device: torch.device
    sharding: Sharding
    layouts: list[BucketLayout] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)
    weights: FlatWeights | None = None
    grads: GradientStore | None = None
    masters: MasterWeights | None = None
    optimizer: ZeroOptimizer | None = None
    doors: Doors | None = None
    gather_group: dist.ProcessGroup | None = None
    shards: Shards | None = None
    """Set at stage 3 only."""

    @property
    def param_ids(self) -> set[int]:
        known = {id(param) for param in self.params}
        return known if self.shards is None else known | self.shards.ids

    def index_of(self, param: nn.Parameter) -> int | None:
        """Where ``param`` stands in ``params``; None if it is not trained by this engine."""
        item = self.shards.find(param) if self.shards is not None else None
        wanted = param if item is None else item.param
        return next((index for index, mine in enumerate(self.params) if mine is wanted), None)

    def buckets_of(self, params: Sequence[nn.Parameter]) -> set[int]:
        indices = {self.index_of(param) for param in params}
        return {layout.index for layout in self.layouts for slot in layout.slots if slot.spec.index in indices}

    def publish_masters(self, buckets: set[int] | None = None) -> None:
        """Write the masters (of ``buckets``, or all) into the weights, on all ranks: after they were loaded or set.

        Collective, unless ``buckets`` hold nothing but this rank's part of sharded parameters.
        """
        if self.masters is None or self.weights is None:
            return
        self.reshard()
        self.masters.write_weights(buckets)
        if self.sharding.gathers_weights:
            for layout, flat in zip(self.layouts, self.weights.flats):
                if layout.num_shards > 1 and (buckets is None or layout.index in buckets):
                    low, high = layout.shard_range(self.sharding.shard)
                    all_gather_flat(flat, flat[low:high].clone(), self.gather_group)

    def reshard(self) -> None:
        """Free gathered copies of sharded parameters, before shards are read or written directly."""
        if self.shards is not None:
            self.shards.reshard()

    def states_changed(self) -> None:
        """Somebody wrote to masters or states directly: drop copies made ahead of time."""
        for home in self.masters.homes if self.masters is not None else []:
            home.forget_prefetched()

    def synchronize(self) -> None:
        """Wait until every weight, master and state is up to date, also for the host."""
        if self.masters is not None:
            self.masters.synchronize()

    def close(self) -> None:
        try:
            if self.masters is None or not self.masters.is_broken:
                self.synchronize()
        finally:  # an update that failed must not keep its thread and hooks alive
            self._detach()

    def _detach(self) -> None:
        if self.doors is not None:
            self.doors.close()
        if self.shards is not None:
            self.shards.close()
        try:
            if self.masters is not None:
                self.masters.close()
        finally:  # after the last copy that reads them
            if self.grads is not None:
                self.grads.detach()

    def memory_report(self) -> dict[str, dict[str, int]]:
        places: dict[str, dict[str, int]] = {"device": {}, "host": {}}
        for tensor in self._module_tensors():
            place = places["host" if tensor.device.type != self.device.type else "device"]
            place["weights"] = place.get("weights", 0) + tensor.numel() * tensor.element_size()
        if self.grads is not None:
            place = places["host" if self.grads.is_on_host else "device"]
            place["gradients"] = place.get("gradients", 0) + self.grads.num_bytes
        for home in self.masters.homes if self.masters is not None else []:
            place = places["host" if home.is_on_host else "device"]
            for kind, size in home.num_bytes.items():
                place[kind] = place.get(kind, 0) + size
            if isinstance(home, NvmeHome):
                places["nvme"] = home.file_bytes
            if isinstance(home, StreamedHome):
                places["device"]["buffers"] = places["device"].get("buffers", 0) + home.staging_bytes
        return places

    def _module_tensors(self) -> list[Tensor]:
        """This rank's memory of every parameter and buffer."""
        seen: dict[int, Tensor] = {}
        with unguarded():
            params = list(self.module.parameters())
        for tensor in [*params, *self.module.buffers()]:
            item = self.shards.find(tensor) if self.shards is not None else None
            seen.setdefault(id(tensor), tensor if item is None else item.padded)
        return list(seen.values())
