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
from hf_zero_plugin.engine.buckets import BucketLayout, Piece, cut_evenly, cut_pieces, cut_whole_parameters
from hf_zero_plugin.engine.client_home import ClientHome
from hf_zero_plugin.engine.device_home import DeviceHome
from hf_zero_plugin.engine.host_threads import host_threads
from hf_zero_plugin.engine.low_precision import DTYPES
from hf_zero_plugin.engine.master_weights import Context, Home
from hf_zero_plugin.engine.offload_host import HostHome
from hf_zero_plugin.engine.offload_nvme import NvmeHome
from hf_zero_plugin.engine.offload_stream import StreamedHome
from hf_zero_plugin.engine.optimizers import TorchRule, UpdateRule
from hf_zero_plugin.engine.parts import Assembly
from hf_zero_plugin.engine.piece_states import StateTypes
from hf_zero_plugin.engine.sharding import Sharding
from hf_zero_plugin.errors import ConfigError, UnsupportedFeature

logger = logging.getLogger("hf_zero_plugin")

__all__ = [
    "host_share",
    "interleaved",
    "is_threaded",
    "make_homes",
    "refuse_cut_parameters",
    "refuse_own_states_on_nvme",
    "state_types",
    "tell_that_states_stay_on_the_host",
]

STREAM_PIECE_NUMEL = 12 * 2**20
"""Elements per piece that passes through the device, at most: each of two slots takes (K + 2) * 4 bytes of device
memory per element (Adam: 200 MB each), and every piece costs the host about fifteen calls a step, and four for each
cut of a copy."""

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
        if to_host and sharding.rank == 0:
            tell_that_states_stay_on_the_host(offload, "this optimizer looks at whole parameters or steps itself")
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
    shards = [sharding.shard_of(layout) for layout in layouts]
    if streams:
        pieces = cut_evenly(layouts, shards, STREAM_PIECE_NUMEL)
    else:
        longest = STREAM_PIECE_NUMEL if offload.device == "nvme" else None
        pieces = [piece for layout, at in zip(layouts, shards) for piece in cut_pieces(layout, at, max_numel=longest)]
    if not to_host:
        return [DeviceHome(context, pieces)]
    kept, moved = _split_by_ratio(pieces, context, settings)
    pin, threads_share = offload.pin_memory, offload.host_threads_share
    if streams:
        hosted = interleaved(moved, host_share(offload, context, sharding.rank))
        beside = {id(piece) for piece in hosted}
        if offload.step_on == "both":
            share = sum(piece.numel for piece in hosted) / max(1, sum(piece.numel for piece in moved))
            logger.info("offloaded states: host cores update %.0f %%, the device the rest", 100 * share)
        streamed = StreamedHome(context, [piece for piece in moved if id(piece) not in beside], pin_memory=pin)
        homes: list[Home] = [DeviceHome(context, kept), streamed]
        if hosted:
            homes.append(HostHome(context, hosted, pin_memory=pin, threads_share=threads_share, num_spared=_NUM_SPARED))
        return homes
    if offload.step_on == "both" and parts.device.type == "cuda":
        _tell_that_both_does_nothing("these states cannot be streamed through the device", sharding.rank)
    threaded = is_threaded(offload, parts.device)
    if offload.device == "nvme":
        return [DeviceHome(context, kept), NvmeHome(context, moved, offload, settings.aio, threaded=threaded)]
    host = HostHome(context, moved, pin_memory=pin, threaded=threaded, threads_share=threads_share)
    return [DeviceHome(context, kept), host]


def host_share(offload: OffloadOptimizerSettings, context: Context, rank: int = 0) -> float:
    """Share of the offloaded states that host cores update where the device updates the rest."""
    if offload.step_on != "both":
        return 0.0
    if not context.is_alone:  # the host's thread would gather weights while the main thread gathers others
        _tell_that_both_does_nothing("there are several ranks, at a stage below 3", rank)
        return 0.0
    num_threads = host_threads(offload.host_threads_share, _NUM_SPARED)
    host = max(0, num_threads) * THREAD_NUMEL_PER_S
    share = offload.host_share if offload.host_share is not None else host / (host + LINK_NUMEL_PER_S)
    if num_threads < 1:
        logger.warning(
            '$.zero_optimization.offload_optimizer.step_on: "both", but there are only %d threads for the host\'s part '
            "(torch.get_num_threads(), which OMP_NUM_THREADS sets; %d are left to launch kernels). %s",
            num_threads + _NUM_SPARED,
            _NUM_SPARED,
            "The device updates everything." if share == 0 else f"One of them updates {share:.0%} of the states.",
        )
    return share


def is_threaded(offload: OffloadOptimizerSettings, device: torch.device) -> bool:
    """Whether host cores update on a thread of their own. Without a device to overlap with, it would only fight the
    first for the cores."""
    return device.type == "cuda" or offload.step_on in ("host", "both")


def tell_that_states_stay_on_the_host(offload: OffloadOptimizerSettings, why: str) -> None:
    """Name the keys that would act if states streamed through the device, where host cores update all of them."""
    asked = {"ratio": offload.ratio != 1.0, "step_on": offload.step_on in ("device", "both")}
    if names := [name for name, is_asked in asked.items() if is_asked]:
        logger.warning(
            "$.zero_optimization.offload_optimizer.%s: no effect here. All optimizer states are in host memory and are "
            "updated by host cores: %s.",
            " and ".join(names),
            why,
        )


def _tell_that_both_does_nothing(why: str, rank: int) -> None:
    if rank == 0:
        logger.warning('$.zero_optimization.offload_optimizer.step_on: "both" is the same as "auto" here: %s.', why)


def interleaved(pieces: Sequence[Piece], share: float) -> list[Piece]:
    """``share`` of the elements, evenly: both who update work in the order in which the forward pass needs weights."""
    chosen, seen, taken = [], 0, 0
    for piece in pieces:
        seen += piece.numel
        if taken + piece.numel <= share * seen + 0.5:
            chosen.append(piece)
            taken += piece.numel
    return chosen


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
