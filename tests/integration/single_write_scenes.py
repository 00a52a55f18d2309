"""Checkpoints of a Trainer at stage 3 that gathers no weights, and who wrote what; test_single_write.py looks on.

``python -m tests.integration.single_write_scenes OUT``: checkpoints of every step in OUT/whole, a saving by itself in
OUT/elsewhere, weights of an uninterrupted and of a resumed run, and in OUT/writesRANK.json this rank's writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from . import stage3_scenes as scenes

__all__ = ["STEPS"]

STEPS = 3


def _record_writes(out: Path) -> list[tuple[str, int]]:
    """(folder, bytes of slices) of every write from now on."""
    from hf_zero_plugin.engine import checkpointing

    writes: list[tuple[str, int]] = []
    write = checkpointing.write_shard

    def recorded(directory: Path, *args: Any) -> int:
        num_bytes = write(directory, *args)
        writes.append((str(directory.relative_to(out)).removesuffix(".tmp"), num_bytes))
        return num_bytes

    checkpointing.write_shard = recorded
    return writes


def main(out: Path) -> None:
    import hf_zero_plugin

    hf_zero_plugin.activate()
    import torch

    torch.set_num_threads(1)
    config = scenes._config("zero3_offload", stage3_gather_16bit_weights_on_model_save=False)
    options: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1}
    writes = _record_writes(out)

    whole = scenes._trainer(out / "whole", config, **options)
    whole.train()
    whole.save_model(str(out / "elsewhere"))
    whole.deepspeed.save_16bit_model(str(out), "whole.safetensors")
    scenes._trainer(out / "only_model", config, **options, save_only_model=True).train()
    (out / f"writes{whole.args.process_index}.json").write_text(json.dumps(writes))

    resumed = scenes._trainer(out / "resumed", config, max_steps=STEPS)
    resumed.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-2"))
    resumed.deepspeed.save_16bit_model(str(out), "resumed.safetensors")
    resumed.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
