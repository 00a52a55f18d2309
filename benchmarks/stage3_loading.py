"""How much host memory loading a model takes on each rank, against the model's size.

Writes a random Llama checkpoint, then loads it with ``from_pretrained`` and makes an engine without an optimizer, in
fresh processes joined by torchrun: sharded (stage 3: rank 0 reads, shards arrive one parameter at a time) and whole on
every rank (stage 0). Prints one JSON line per way and number of ranks.

    python benchmarks/stage3_loading.py --out benchmarks/raw/stage3-loading.jsonl
    python benchmarks/stage3_loading.py --hidden 4096 --layers 32 --ranks 1,2,4       # a larger one, on GPUs if any

Peaks are above what the process had after its imports, sampled every 2 ms: of anonymous memory, and of all memory,
pages of the checkpoint's files included. Whole loading may leave weights in those pages for as long as nothing changes
them, and training changes all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

WAYS = {"sharded": 3, "whole": 0}


KINDS = {"anonymous": "RssAnon:", "all": "VmRSS:"}


def memory() -> dict[str, int]:
    """Bytes in use now, by kind."""
    text = Path("/proc/self/status").read_text()
    return {kind: int(text.split(key)[1].split()[0]) * 1024 for kind, key in KINDS.items()}


class Peak:
    """Most memory in use while the context lasts, above ``base``."""

    def __init__(self, base: dict[str, int]) -> None:
        self.base, self.num_bytes = base, dict.fromkeys(base, 0)
        self._done = threading.Event()

    def __enter__(self) -> Peak:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.is_set():
            now = memory()
            self.num_bytes = {kind: max(self.num_bytes[kind], now[kind] - self.base[kind]) for kind in now}
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def config(stage: int) -> dict:
    return {
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 1,
    }


def write_model(folder: str, hidden: int, layers: int, vocabulary: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(folder, max_shard_size="200MB")


def measure(folder: str, way: str) -> None:
    import hf_zero_plugin

    hf_zero_plugin.activate()
    import deepspeed
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed()
    dist.barrier()
    wanted = config(WAYS[way])
    known = HfDeepSpeedConfig(wanted)  # kept: transformers asks it while it loads
    base = memory()
    with Peak(base) as load:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    with Peak(base) as make:
        engine, *_ = deepspeed.initialize(model=model, config_params=known.config)
    ids = torch.arange(16, device=engine.device)[None]
    with torch.no_grad():
        loss = engine(input_ids=ids, labels=ids).loss.item()
    mine = {
        "load": load.num_bytes,
        "engine": make.num_bytes,
        "after": {kind: size - base[kind] for kind, size in memory().items()},
        "device": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "loss": loss,
    }
    everyone: list[dict | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        line = {"way": way, "ranks": len(everyone), "model_bytes": num_bytes, "by_rank": everyone}
        print("MEASURED " + json.dumps(line), flush=True)


def launch(folder: str, way: str, ranks: int) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    # Blocks that are freed go back to the system, so that memory in use is what is counted.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, __file__, "--measure", way, "--folder", folder], env=env, capture_output=True, text=True
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    if not found:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    return json.loads(found[0].removeprefix("MEASURED "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, with commas")
    parser.add_argument("--out", help="file to append the lines to")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=sorted(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.folder, args.measure)
        return
    import torch

    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, args.hidden, args.layers, args.vocabulary)
        for ranks in map(int, args.ranks.split(",")):
            for way in WAYS:
                device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
                about = {"hidden": args.hidden, "layers": args.layers, "device": device, "torch": torch.__version__}
                line = json.dumps({**about, **launch(folder, way, ranks)})
                print(line, flush=True)
                if args.out:
                    with open(args.out, "a") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    main()
