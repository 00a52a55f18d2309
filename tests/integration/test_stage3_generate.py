"""generate at stage 3: ranks whose sequences end at different lengths give what each would give by itself, and meet.

Tiny models, stages 3 with and without offload, one gloo rank and two; the oracle is the same model unsharded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_zero_plugin.config.settings import EngineSettings, OffloadParamSettings, OptimizerSettings, Stage3Settings
from hf_zero_plugin.engine.engine import ZeroEngine
from hf_zero_plugin.integration.zero_api import GatheredParameters
from tests.helpers import run_ranks

pytestmark = pytest.mark.slow

PLACES = ["sharded", "offloaded"]
SCENES = ["greedy", "beams", "sampled", "from encoder outputs", "decoder only", "one rank alone", "after a step"]


def _t5() -> Any:
    from .stage3_scenes import _model

    return _model().eval()


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=65,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def _engine(model: Any, place: str) -> ZeroEngine:
    settings = EngineSettings(
        stage=3,
        optimizer=OptimizerSettings(type="AdamW", params={"lr": 0.1}),
        offload_param=OffloadParamSettings(device="cpu" if place == "offloaded" else "none"),
        stage3=Stage3Settings(param_persistence_threshold=16),
    )
    return ZeroEngine(model, settings, device=torch.device("cpu"), param_groups=[{"params": list(model.parameters())}])


def _prompts(rank: int) -> dict[str, Tensor]:
    """Of other sizes on every rank."""
    tokens = torch.randint(2, 64, (2 + rank, 4 + 3 * rank), generator=torch.Generator().manual_seed(rank))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _generate(model: Any, rank: int, synced: bool, **options: Any) -> list[list[int]]:
    torch.manual_seed(rank)
    length = 3 + 6 * rank  # one goes on long after the other
    found = model.generate(
        **_prompts(rank), max_new_tokens=length, min_new_tokens=length, synced_gpus=synced, **options
    )
    return found.tolist()


def _seen(t5: Any, llama: Any, synced: bool, rank: int) -> dict[str, Any]:
    """``t5`` and ``llama``: engines or models; both generate, so both are called alike."""
    seen: dict[str, Any] = {"greedy": _generate(t5, rank, synced), "decoder only": _generate(llama, rank, synced)}
    seen["beams"] = _generate(t5, rank, synced, num_beams=3)
    seen["sampled"] = _generate(llama, rank, synced, do_sample=True, top_k=5)
    prompts = _prompts(rank)
    module = getattr(t5, "module", t5)
    with torch.no_grad():
        encoded = module.get_encoder()(**prompts)
    seen["from encoder outputs"] = module.generate(
        encoder_outputs=encoded,
        attention_mask=prompts["attention_mask"],
        max_new_tokens=4 + rank,
        min_new_tokens=4 + rank,
        synced_gpus=synced,
    ).tolist()
    return seen


def _play() -> dict[str, Any]:
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    wanted = _seen(_t5(), _llama(), False, rank)
    wanted["one rank alone"] = wanted["decoder only"] if rank == 0 else None
    results: dict[str, Any] = {}
    for place in PLACES:
        t5, llama = _engine(_t5(), place), _engine(_llama(), place)
        seen = _seen(t5, llama, world_size > 1, rank)
        with GatheredParameters(llama.module.parameters()):
            seen["one rank alone"] = _generate(llama.module, rank, False) if rank == 0 else None
        # In the middle of a training, with an update on its way, in training mode.
        tokens = torch.randint(2, 64, (2, 6), generator=torch.Generator().manual_seed(7))
        for _ in range(2):
            llama.train()
            llama.backward(llama(input_ids=tokens, labels=tokens).loss)
            llama.step()
            seen["after a step"] = _generate(llama, rank, world_size > 1)
        plain = _llama()
        with GatheredParameters(llama.module.parameters()):
            plain.load_state_dict(llama.module.state_dict())
        results[place] = (seen, {**wanted, "after a step": _generate(plain, rank, False)})
        assert seen["after a step"] != seen["decoder only"]
    return results


@pytest.fixture(scope="module", params=[1, 2])
def played(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(_play, request.param, timeout_s=120.0)


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("place", PLACES)
def test_every_rank_generates_what_it_would_by_itself(place: str, scene: str, played: list[dict[str, Any]]) -> None:
    for results in played:
        found, wanted = results[place]
        assert found[scene] == wanted[scene]
