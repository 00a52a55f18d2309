"""Where masters and optimizer states live: which homes an engine gets, and which pieces go into which of them.

::

    optimizer                     offload "none"   "cpu"                                      "nvme"
    element by element, our own   device           device up to the ratio or budget, then     the same, then
                                                   streamed through the device, the host      NVMe
                                                   (no GPU, or "step_on": "host"), or both
    element by element, torch's   device           device up to that, then the host           refused
    torch's, whole parameters     device           the host                                   refused
    the caller's own object       device           the host                                   refused

An optimizer that looks at whole parameters, or may do so, cannot be given slices: it is refused where ranks cut.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from hf_zero_plugin.config.settings import EngineSettings, OffloadOptimizerSettings
from hf_zero_plugin.engine.buckets import BucketLayout, Piece, cut_pieces, cut_whole_parameters
from hf_zero_plugin.engine.client_home import ClientHome
from hf_zero_plugin.engine.low_precision import DTYPES
from hf_zero_plugin.engine.master_weights import Context, DeviceHome, Home
from hf_zero_plugin.engine.offload_host import HostHome
from hf_zero_plugin.engine.offload_nvme import NvmeHome
from hf_zero_plugin.engine.offload_stream import StreamedHome
from hf_zero_plugin.engine.optimizers import TorchRule, UpdateRule
from hf_zero_plugin.engine.parts import Assembly
from hf_zero_plugin.engine.piece_states import StateTypes
from hf_zero_plugin.engine.sharding import Sharding
from hf_zero_plugin.errors import ConfigError, UnsupportedFeature

logger = logging.getLogger("hf_zero_plugin")

__all__ = ["make_homes", "refuse_cut_parameters", "refuse_own_states_on_nvme", "state_types"]

STREAM_PIECE_NUMEL = 12 * 2**20
"""Elements per piece that passes through the device: each of two slots takes (K + 1) * 4 bytes of device memory per
element (Adam: 200 MB each), and every piece costs the host about a dozen calls a step."""


LINK_NUMEL_PER_S = 4.2e9
THREAD_NUMEL_PER_S = 0.15e9
"""Elements a second that pass through a device on a x16 gen5 link, and that one host thread updates (AdamW, measured).
Where both work, these say who gets how much: with numbers measured at run time, no two runs would be the same."""

_NUM_SPARED = 2
"""Threads that do not update where both work: two launch kernels meanwhile."""


def make_homes(
    parts: Assembly,
    settings: EngineSettings,
    context: Context,
    client: torch.optim.Optimizer | None,
    layouts: Sequence[BucketLayout],
) -> list[Home]:
    """Homes for this rank's part of ``layouts``, as the optimizer and its offload settings ask."""
    offload, sharding = settings.offload_optimizer, parts.sharding
    to_host = offload.device != "none"
    if offload.device == "nvme":
        refuse_own_states_on_nvme(context.rule, client)
    if client is not None or not context.rule.elementwise:
        refuse_cut_parameters(context.rule, client, sharding)
        pieces = [piece for layout in layouts for piece in cut_whole_parameters(layout)]
        if client is None:
            return [HostHome(context, pieces) if to_host else DeviceHome(context, pieces)]
        indices = [slot.spec.index for layout in layouts for slot in layout.slots]
        home = torch.device("cpu") if to_host else parts.device
        return [ClientHome(context, pieces, client, parts.params, indices, home)]
    streams = (
        offload.device == "cpu"
        and parts.device.type == "cuda"
        and offload.step_on != "host"
        and not isinstance(context.rule, TorchRule)
    )
    longest = STREAM_PIECE_NUMEL if streams or offload.device == "nvme" else None
    pieces = [piece for layout in layouts for piece in cut_pieces(layout, sharding.shard_of(layout), max_numel=longest)]
    if not to_host:
        return [DeviceHome(context, pieces)]
    kept, moved = _split_by_ratio(pieces, context, settings)
    pin, threads_share = offload.pin_memory, offload.host_threads_share
    if streams:
        hosted = _interleaved(moved, _host_share(offload, context)) if offload.step_on == "both" else []
        streamed = StreamedHome(context, [piece for piece in moved if piece not in hosted], pin_memory=pin)
        homes: list[Home] = [DeviceHome(context, kept), streamed]
        if hosted:
            homes.append(HostHome(context, hosted, pin_memory=pin, threads_share=threads_share, num_spared=_NUM_SPARED))
        return homes
    # Without a device to overlap with, a second thread would only fight the first for the cores.
    threaded = parts.device.type == "cuda" or offload.step_on == "host"
    if offload.device == "nvme":
        return [DeviceHome(context, kept), NvmeHome(context, moved, offload, settings.aio, threaded=threaded)]
    host = HostHome(context, moved, pin_memory=pin, threaded=threaded, threads_share=threads_share)
    return [DeviceHome(context, kept), host]


def _host_share(offload: OffloadOptimizerSettings, context: Context) -> float:
    if not context.is_alone:  # the host's thread would gather weights while the main thread gathers others
        logger.warning(
            '$.zero_optimization.offload_optimizer.step_on: "both" has no effect at stages 1 and 2 on several ranks: '
            "the accelerators compute the whole update."
        )
        return 0.0
    if offload.host_share is not None:
        return offload.host_share
    num_threads = int(offload.host_threads_share * torch.get_num_threads()) - _NUM_SPARED
    host = max(0, num_threads) * THREAD_NUMEL_PER_S
    return host / (host + LINK_NUMEL_PER_S)


def _interleaved(pieces: list[Piece], share: float) -> list[Piece]:
    """Every 1/share-th: both who update work in the order in which the next forward pass needs the weights."""
    return [piece for i, piece in enumerate(pieces) if int((i + 1) * share) > int(i * share)]


def _split_by_ratio(pieces: list[Piece], context: Context, settings: EngineSettings) -> tuple[list[Piece], list[Piece]]:
    """Keep the first pieces on the device: the forward pass needs them first, so theirs is the least time to hide."""
    offload = settings.offload_optimizer
    total = sum(piece.numel for piece in pieces)
    if offload.ratio == "auto":
        budget = offload.gpu_memory_budget_bytes or 0
        keep = budget // context.types.bytes_per_element(len(context.rule.state_names))
    else:
        keep = round((1.0 - offload.ratio) * total)
    num_kept = 0
    for piece in pieces:
        keep -= piece.numel
        if keep < 0:
            break
        num_kept += 1
    return pieces[:num_kept], pieces[num_kept:]


def state_types(settings: EngineSettings, rule: UpdateRule, client: torch.optim.Optimizer | None) -> StateTypes:
    """Types of masters and states, if this optimizer can have them.

    Raises:
        ConfigError: narrow ones for an optimizer that holds its own states.
    """
    types = StateTypes(DTYPES[settings.master_dtype], DTYPES[settings.optimizer_state_dtype])
    if not types.are_wide and (client is not None or isinstance(rule, TorchRule)):
        name = type(client).__name__ if client is not None else getattr(rule, "cls", type(rule)).__name__
        raise ConfigError(
            f"$.bf16: {name} keeps its own states in fp32, so bf16_master_weights_and_grads, bf16_optimizer_states and "
            "fp32_optimizer_states do not apply to it. Use Adam, AdamW, Adagrad, Lion or SGD, or remove these keys."
        )
    return types


def refuse_cut_parameters(rule: UpdateRule, client: torch.optim.Optimizer | None, sharding: Sharding) -> None:
    if sharding.num_shards > 1:
        name = type(client).__name__ if client is not None else getattr(rule, "cls", type(rule)).__name__
        raise UnsupportedFeature(
            f"optimizer {name} looks at whole parameters or is not known to be elementwise, and ZeRO stages 1 to 3 on "
            f"{sharding.num_shards} ranks cut parameters into slices. Use stage 0, one rank, or an optimizer of "
            "torch.optim that works element by element (AdamW, Adam, SGD, Adagrad, RMSprop, Lion...)."
        )


def refuse_own_states_on_nvme(rule: UpdateRule, client: torch.optim.Optimizer | None) -> None:
    if client is None and not isinstance(rule, TorchRule):
        return
    name = type(client).__name__ if client is not None else getattr(rule, "cls", type(rule)).__name__
    raise ConfigError(
        f"$.zero_optimization.offload_optimizer.device: {name} keeps its states itself, in memory, so they cannot "
        'live on NVMe. Use Adam, AdamW, Adagrad, Lion or SGD, or the device "cpu".'
    )
