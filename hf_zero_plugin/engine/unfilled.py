"""Weights that are not in their shards yet, kept on the model: what it takes to try again when making an engine fails.

Sharding replaces a model's parameters by empty shards and fills these one at a time; those that stay whole become half
precision. An error before masters have values (host memory that is not there, a directory for states that cannot be
written) must lose no digit of the weights, and none may leave a model that computes with whatever was in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_zero_plugin.errors import HfZeroError

__all__ = ["Unfilled"]

logger = logging.getLogger(__name__)

ATTRIBUTE = "_zero_unfilled"


class Unfilled:
    """By name, the values of one model's parameters that its shards do not have. Alive as long as there are any."""

    def __init__(self, model: nn.Module) -> None:
        self.values: dict[str, Tensor] = {}
        """Of shards."""
        self._whole: dict[str, Tensor] = {}
        self._num_rounded = 0
        self._model = model
        self._handles: list[RemovableHandle] = []
        self.stand_first()
        setattr(model, ATTRIBUTE, self)

    @staticmethod
    def of(model: nn.Module) -> Unfilled:
        """Those that an attempt before this one has left, or none."""
        left: Unfilled | None = getattr(model, ATTRIBUTE, None)
        if left is None:
            return Unfilled(model)
        if left._num_rounded:
            logger.warning(
                "an error interrupted the last attempt to make an engine while it set the master weights: %d "
                "parameters now begin with their values in half precision. Load the model anew for all their digits.",
                left._num_rounded,
            )
        return left

    def stand_first(self) -> None:
        """Refuse before any hook that the model has by now."""
        self._remove_hooks()
        self._handles = [
            self._model.register_forward_pre_hook(self._refuse, prepend=True),
            self._model.register_state_dict_pre_hook(self._refuse),
        ]

    def keep_whole(self, names: Collection[str]) -> None:
        """Parameters that stay whole have what they had at first, and the next attempt will find that again."""
        named = dict(self._model.named_parameters())
        for name, values in self._whole.items():
            named[name].data = values
        self._whole = {name: named[name].data for name in names}

    def take(self, name: str, *, is_rounded: bool = False) -> None:
        """``name`` is filled in; ``is_rounded``: the master alone has all digits, and it goes with its engine."""
        self.values.pop(name, None)
        self._num_rounded += is_rounded

    def close(self) -> None:
        """All are filled in."""
        self._remove_hooks()
        delattr(self._model, ATTRIBUTE)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _refuse(self, *_: Any) -> None:
        raise HfZeroError(
            f"{len(self.values)} parameters of this model have no values yet: making a ZeRO-3 engine for it ended with "
            "an error half way. Nothing is lost: make an engine for the same model again, with a configuration that "
            "works, or load the model anew."
        )
