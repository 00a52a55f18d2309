"""How an engine's weights and states leave it and come back: gathered for others to save, exported, checkpointed.

::

    for others to save    _zero3_consolidated_16bit_state_dict: whole weights on the host of rank 0,
                          inside ``streamed_saving`` one by one, as they are written          serving.py
    one safetensors file  save_16bit_model                                                    checkpoint/export.py
    everything            save_checkpoint, load_checkpoint: to go on at any number of ranks   checkpointing.py

Transformers and accelerate call these by name.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from hf_zero_plugin.config.settings import EngineSettings
from hf_zero_plugin.engine.checkpointing import load_engine, save_engine
from hf_zero_plugin.engine.parts import Assembly
from hf_zero_plugin.engine.pending import values_of
from hf_zero_plugin.engine.serving import WeightServer, serving
from hf_zero_plugin.engine.watchdog import Watchdog, watched

if TYPE_CHECKING:
    from hf_zero_plugin.engine.engine import ZeroEngine

__all__ = ["Saved"]

logger = logging.getLogger("hf_zero_plugin")


class Saved:
    """What an engine inherits: ways out for its weights and states, and the way back."""

    module: nn.Module
    settings: EngineSettings
    parts: Assembly
    global_rank: int
    watchdog: Watchdog
    _server: WeightServer | None = None
    """There inside ``streamed_saving``, at stage 3."""

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        gathers = self.settings.stage3.gather_16bit_weights_on_model_save
        if not gathers and self.parts.shards is not None and self.global_rank == 0:
            logger.warning(
                "weights are not gathered: $.zero_optimization.stage3_gather_16bit_weights_on_model_save is false. Set "
                "it to true, or call save_checkpoint(DIR) and make safetensors of that: hf-zero export DIR OUTPUT_DIR"
            )
        return gathers

    @contextlib.contextmanager
    def streamed_saving(self) -> Iterator[None]:
        """Inside, ``_zero3_consolidated_16bit_state_dict`` gives weights that are gathered when they are written.

        Every rank must enter and call it; the others' calls return when rank 0 leaves the context. See ``serving.py``.
        """
        with contextlib.ExitStack() as stack:
            if self.parts.shards is not None:
                self._server = stack.enter_context(serving(self.parts.shards))
                stack.callback(setattr, self, "_server", None)
            yield

    def end_saving(self) -> None:
        """On rank 0: everything has been written, the other ranks may go on. Harmless at any other time."""
        if self._server is not None:
            self._server.finish()

    @watched("gathering weights to save them")
    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor]:
        """All weights on the host of rank 0; an empty dict elsewhere. Collective at stage 3."""
        self.parts.synchronize()
        frozen = {name for name, p in self.module.named_parameters() if not p.requires_grad}
        left_out = frozen if exclude_frozen_parameters else set()
        if self._server is not None:
            return self._server.weights(lambda name: name not in left_out)
        if self.parts.shards is not None:
            return self.parts.shards.state_dict(lambda name: name not in left_out)
        if self.global_rank != 0:
            return {}
        return {
            name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items() if name not in left_out
        }

    def save_16bit_model(self, save_dir: str, save_filename: str = "model.safetensors") -> bool:
        """Write the weights as one safetensors file, from rank 0; at stage 3 parameter by parameter."""
        from hf_zero_plugin.checkpoint.export import save_weights

        with self.streamed_saving():
            state = self._zero3_consolidated_16bit_state_dict()
            if self.global_rank == 0:
                save_weights(state, save_dir, save_filename, values=values_of)
        return True

    @watched("save_checkpoint")
    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write ``save_dir/global_stepN``; every rank must call. Resumes at any number of ranks."""
        return save_engine(
            cast("ZeroEngine", self), save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters
        )

    @watched("load_checkpoint")
    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str | None, dict[str, Any]]:
        """Read what ``save_checkpoint`` wrote; every rank must call.

        Returns:
            (path, client_state), or (None, {}) if ``load_dir`` holds no checkpoint of this engine.
        """
        return load_engine(
            cast("ZeroEngine", self),
            load_dir,
            tag,
            strict=load_module_strict,
            optimizer_states=load_optimizer_states and not load_module_only,
            scheduler_states=load_lr_scheduler_states and not load_module_only,
        )
