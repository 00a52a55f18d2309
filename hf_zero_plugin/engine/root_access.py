"""Parts of a model that are called without the model: an encoder, a backbone, a head.

FSDP2 gathers the root's parameters (embeddings, last norm, head) when the root's ``forward`` begins. Whoever calls
``model.get_encoder()(...)`` never comes there, and would find shards. So the modules that own the root's parameters
gather it themselves if nobody has. It is resharded by the next backward pass, or by whatever reshards all.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch import nn

from hf_zero_plugin.engine.fsdp import groups_of

__all__ = ["open_root"]


def open_root(model: nn.Module) -> None:
    """Once per model, after FSDP2 has taken it."""
    owners = {
        id(module): module
        for group in groups_of(model)  # type: ignore[arg-type]
        for handle in group.fsdp_params
        for module in (handle._module_info.module, *handle._module_info.shared_modules)
    }
    # The model must not be kept alive by a part of it that somebody holds on to.
    gather = functools.partial(_gather, weakref.ref(model))
    for module in owners.values():
        if module is not model:
            module.register_forward_pre_hook(gather, prepend=True)


def _gather(reference: weakref.ref[Any], module: nn.Module, args: Any) -> None:
    model = reference()
    if model is not None:
        for group in groups_of(model):
            if not group.is_unsharded:
                group.unshard()
                group.wait_for_unshard()
