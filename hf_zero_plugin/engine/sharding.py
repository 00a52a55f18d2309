"""What each ZeRO stage shards and when it reduces. The only file that compares stage numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_zero_plugin.engine.buckets import BucketLayout

__all__ = ["Sharding", "sharding_for"]


@dataclass(frozen=True, slots=True)
class Sharding:
    """How data-parallel ranks divide the work at stages 0 to 2."""

    rank: int
    world_size: int
    shards_states: bool
    """Every rank keeps the optimizer states of its own shard only (stage 1 up)."""
    shards_grads: bool
    """Full gradients live only until their bucket is reduced, at every micro-step (stage 2 up)."""
    shards_params: bool
    """Parameters are sharded too: the FSDP2 road (stage 3)."""

    @property
    def num_shards(self) -> int:
        return self.world_size if self.shards_states else 1

    @property
    def shard(self) -> int:
        return self.rank if self.shards_states else 0

    def shard_of(self, layout: BucketLayout) -> int:
        """Which shard of a bucket is this rank's: a bucket that holds nothing but this rank's part has one shard."""
        return self.shard if layout.num_shards > 1 else 0

    @property
    def reduction(self) -> Literal["none", "all_reduce", "reduce_scatter"]:
        if self.world_size == 1:
            return "none"
        return "reduce_scatter" if self.shards_states else "all_reduce"

    @property
    def gathers_weights(self) -> bool:
        """After a step the updated shards must be collected from all ranks."""
        return self.shards_states and self.world_size > 1


def sharding_for(stage: int, *, rank: int, world_size: int) -> Sharding:
    return Sharding(
        rank=rank,
        world_size=world_size,
        shards_states=stage >= 1,
        shards_grads=stage >= 2 and world_size > 1,
        shards_params=stage == 3,
    )
