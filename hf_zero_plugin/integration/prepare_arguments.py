"""TrainingArguments that were made without ``deepspeed``, turned into those that were made with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_zero_plugin.errors import ActivationError
from hf_zero_plugin.integration.activate import activate, is_active

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["prepare_arguments"]


def prepare_arguments(args: TrainingArguments, config: str | dict[str, Any]) -> None:
    """Do to ``args`` what ``TrainingArguments(..., deepspeed=config)`` does last of all: device, group, configuration.

    Raises:
        ActivationError: too late: transformers has found no engine, or a Trainer or Accelerator exists already.
        ConfigError: the configuration cannot be honoured.
    """
    if not is_active():
        activate()  # raises if transformers has looked for deepspeed already
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin, DistributedType
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    from hf_zero_plugin.integration.comm import describe_single_process
    from hf_zero_plugin.integration.use_cpu import hide_gpus_instead_of_use_cpu

    if args.deepspeed:
        if args.deepspeed != config:
            raise ActivationError(
                "ZeroCallback(config, args): args has a deepspeed configuration of its own, and it is another one. "
                "Name the configuration in one of the two places."
            )
        return
    # TrainingArguments leave this empty; the Trainer's Accelerator fills it.
    shared = AcceleratorState._shared_state
    if shared and shared.get("distributed_type") != DistributedType.DEEPSPEED:
        raise ActivationError(
            "ZeroCallback(config, args) came too late: a Trainer or an Accelerator has been built already, and it has "
            "settled that there is no engine. Make the callback between the two:\n"
            "    args = TrainingArguments(...)\n"
            "    callback = ZeroCallback(config, args)\n"
            "    trainer = Trainer(args=args, ..., callbacks=[callback])\n"
            "If an earlier Trainer of this process is meant to stay, make new TrainingArguments first."
        )
    args.deepspeed = config
    try:
        args.use_cpu = hide_gpus_instead_of_use_cpu() or args.use_cpu
        describe_single_process()
        # Computed once and kept: the device and the process group were chosen for training without an engine.
        for name in [name for name in vars(args) if name.endswith("_setup_devices")]:
            del args.__dict__[name]
        _ = args.device
        args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(args.deepspeed)
        args.hf_deepspeed_config.trainer_config_process(args)
        args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=args.hf_deepspeed_config)
    except BaseException:
        args.deepspeed = None
        raise
