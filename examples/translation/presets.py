"""Sizes of T5. Standard library only: who only needs the names loads no torch."""

from __future__ import annotations

from typing import Any

_T5 = {"vocab_size": 32128, "d_kv": 64, "decoder_start_token_id": 0}
PRESETS: dict[str, dict[str, Any]] = {
    "t5-small": {**_T5, "d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5-base": {**_T5, "d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "t5-large": {**_T5, "d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    "t5-3b": {**_T5, "d_model": 1024, "d_ff": 16384, "num_layers": 24, "num_heads": 32, "d_kv": 128},
    "t5-11b": {**_T5, "d_model": 1024, "d_ff": 65536, "num_layers": 24, "num_heads": 128, "d_kv": 128},
    # Small enough for two cores; its vocabulary is that of the demo's tokenizer.
    "t5-demo": {
        **_T5, "vocab_size": 2048, "d_model": 128, "d_ff": 344, "num_layers": 2, "num_heads": 8, "d_kv": 16,
        "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "initializer_factor": 0.6,
    },
}  # fmt: skip
"""Sizes of the published T5 models (Raffel et al., arXiv:1910.10683, section 3.7), and of the demo's."""
