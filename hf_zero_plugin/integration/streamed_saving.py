"""``Trainer.save_model`` at stage 3, without the whole model in one host's memory.

The Trainer asks for a state dict, plans files with it (tied names, sharding by size, renaming for the hub) and hands
the tensors of each file to safetensors. Here the state dict holds pending tensors, and safetensors' place is taken by
a writer that asks for one of them at a time. The other ranks serve meanwhile; see ``engine/serving.py``.

Code of others that has its own way of saving (an overridden ``_save`` or ``save_pretrained``, PEFT, quantizers) may do
anything with the tensors: it is given whole ones, on rank 0, as DeepSpeed does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from hf_zero_plugin.checkpoint.stream import stream_safetensors
from hf_zero_plugin.engine.pending import Pending, values_of
from hf_zero_plugin.integration.export_advice import advising_export
from hf_zero_plugin.integration.single_write import engine_of, in_save_model

__all__ = ["stream_saving"]


def stream_saving(module: ModuleType) -> None:
    """Wrap ``save_model`` of the Trainer in ``module`` (transformers.trainer)."""
    cls = module.Trainer
    save_model, save = cls.save_model, cls._save

    @functools.wraps(save)
    def _save(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return save(self, *args, **kwargs)
        finally:
            engine = engine_of(self)
            if engine is not None:
                engine.end_saving()  # the other ranks need not wait for an upload to the hub

    @functools.wraps(save_model)
    def streamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = engine_of(self)
        if engine is None:
            return save_model(self, *args, **kwargs)
        with ExitStack() as stack:
            stack.enter_context(advising_export(engine, _output_dir(self, *args, **kwargs)))
            stack.enter_context(in_save_model(self))
            if type(self)._save is _save and _is_plain(self.model):
                stack.enter_context(engine.streamed_saving())
                stack.enter_context(_writing_pending())
            return save_model(self, *args, **kwargs)

    cls._save = _save
    cls.save_model = streamed


def _output_dir(trainer: Any, output_dir: str | None = None, *_: Any, **others: Any) -> str:
    return output_dir if output_dir is not None else trainer.args.output_dir


def _is_plain(model: Any) -> bool:
    """Whether saving it goes through functions that are known here. The same on every rank."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        # A module of no library is saved by the Trainer itself; a wrapper such as PeftModel saves in its own way.
        return not hasattr(model, "save_pretrained")
    return (
        type(model).save_pretrained is PreTrainedModel.save_pretrained
        and getattr(model, "hf_quantizer", None) is None
        and not getattr(model, "_hf_peft_config_loaded", False)
    )


@contextmanager
def _writing_pending() -> Iterator[None]:
    """Inside, safetensors' ``save_file`` takes pending tensors too, under both names by which it is called."""
    import safetensors.torch
    import transformers.modeling_utils

    places = [(transformers.modeling_utils, "safe_save_file"), (safetensors.torch, "save_file")]
    originals = [getattr(owner, name) for owner, name in places]
    for (owner, name), original in zip(places, originals):
        setattr(owner, name, _streaming(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals):
            setattr(owner, name, original)


def _streaming(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
        if any(type(tensor) is Pending for tensor in tensors.values()):
            stream_safetensors(tensors, filename, metadata, values=values_of)
        else:
            original(tensors, filename, metadata=metadata)

    return save_file
