"""``save_model`` at stage 3 with stage3_gather_16bit_weights_on_model_save false; test_export_advice.py looks on.

``python -m tests.integration.ungathered_scenes OUT``: OUT/"NAME saved" is what the Trainer saves, OUT/NAME.safetensors
what it would have saved.
"""

from __future__ import annotations

import sys
from pathlib import Path

from . import stage3_scenes as scenes

__all__ = ["MODELS"]

MODELS = ("t5", "experts", "evaluated")


def main(out: Path) -> None:
    import hf_zero_plugin

    hf_zero_plugin.activate()
    import torch
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(1)
    ungathered = {"stage3_gather_16bit_weights_on_model_save": False, "stage3_param_persistence_threshold": 20}
    config = scenes._config("zero3_offload", **ungathered)
    for name in MODELS:
        trainer = scenes._trainer(out, config, scenes._experts if name == "experts" else None)
        if name == "evaluated":
            trainer.evaluate()
        else:
            trainer.train_dataset = scenes._texts() if name == "experts" else trainer.train_dataset
            trainer.train()
        print(f"saving {name}", file=sys.stderr, flush=True)
        trainer.save_model(str(out / f"{name} saved"))
        trainer.deepspeed.save_16bit_model(str(out), f"{name}.safetensors")

    def with_lora() -> object:
        lora = LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
        return get_peft_model(scenes._model(), lora)

    trainer = scenes._trainer(out, config, with_lora)
    trainer.train()
    print("saving lora", file=sys.stderr, flush=True)
    trainer.save_model(str(out / "lora saved"))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
