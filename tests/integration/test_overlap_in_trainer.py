"""The Trainer's own bookkeeping between two steps does not end the overlap."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCENE = """
import hf_zero_plugin
hf_zero_plugin.activate()
import torch
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments
from hf_zero_plugin.engine.master_weights import MasterWeights

full_waits = []
wait_all = MasterWeights.wait_all

def counted(self):
    full_waits.append(any(self._pending))
    return wait_all(self)

MasterWeights.wait_all = counted
rows = [dict(input_ids=torch.randint(3, 60, (8,)), labels=torch.randint(3, 60, (8,))) for _ in range(24)]
config = T5Config(vocab_size=64, d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
offload = {"device": "cpu", "step_on": "host"}

class Forget(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:  # the first steps look at parameters once, to see what kind they are
            full_waits.clear()
        seen.append(len([True for wait in full_waits if wait]))

seen = []
args = TrainingArguments(
    output_dir=OUTPUT, per_device_train_batch_size=2, max_steps=12, report_to=[], save_strategy="no",
    disable_tqdm=True, logging_steps=1, deepspeed={"zero_optimization": {"stage": 2, "offload_optimizer": offload}},
)
Trainer(T5ForConditionalGeneration(config), args, train_dataset=rows, callbacks=[Forget()]).train()
print("FULL WAITS", seen[-1])
"""


def test_no_step_waits_for_the_whole_update_of_the_step_before(tmp_path: Path) -> None:
    """Counting parameters, asking for dtypes, logging: all of it every step, none of it may call every bucket home.

    The wait at the start of backward is not counted here: by then the forward pass has waited for each bucket.
    """
    scene = tmp_path / "scene.py"
    scene.write_text(SCENE.replace("OUTPUT", repr(str(tmp_path / "out"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(scene)], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "FULL WAITS 0" in done.stdout
