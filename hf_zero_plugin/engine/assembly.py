"""Putting an engine together: which parts a configuration needs, and how they are wired."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_zero_plugin.config.settings import EngineSettings
from hf_zero_plugin.engine.buckets import BucketLayout, ParamSpec, Piece, cut_pieces, cut_whole_parameters, plan_buckets
from hf_zero_plugin.engine.client_home import ClientHome
from hf_zero_plugin.engine.collectives import all_gather_flat
from hf_zero_plugin.engine.flat import FlatWeights
from hf_zero_plugin.engine.gradients import GradientStore, ReduceOptions
from hf_zero_plugin.engine.loose_grads import LooseGrads
from hf_zero_plugin.engine.low_precision import params_of_safe_modules
from hf_zero_plugin.engine.master_weights import Context, DeviceHome, Home, MasterWeights
from hf_zero_plugin.engine.offload_host import HostHome
from hf_zero_plugin.engine.offload_nvme import NvmeHome
from hf_zero_plugin.engine.offload_stream import StreamedHome
from hf_zero_plugin.engine.optimizers import TorchRule, UpdateRule, rule_for, rule_from_config
from hf_zero_plugin.engine.piece_states import StateTypes
from hf_zero_plugin.engine.readiness import Doors
from hf_zero_plugin.engine.resident_grads import ResidentGrads
from hf_zero_plugin.engine.sharding import Sharding, sharding_for
from hf_zero_plugin.engine.shards import Shards
from hf_zero_plugin.engine.transient_grads import TransientGrads
from hf_zero_plugin.engine.zero_optimizer import ZeroOptimizer
from hf_zero_plugin.errors import ConfigError, UnsupportedFeature

__all__ = ["Assembly", "assemble"]

logger = logging.getLogger("hf_zero_plugin")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

BUCKET_NUMEL = 12 * 2**20
"""Elements per bucket unless reduce_bucket_size asks for less: readiness is per bucket, so the forward pass starts
after one bucket, and a bucket's calls are few enough not to matter."""

MIN_BUCKET_NUMEL = 2 * 2**20
"""Smaller buckets than this are not made, whatever the configuration says ("auto" means hidden size squared, well below
it): each costs a dozen calls a step, and saves 4 MB of buffer."""

STREAM_PIECE_NUMEL = 12 * 2**20
"""Elements per piece that passes through the device: each of two slots takes (K + 1) * 4 bytes of device memory per
element (Adam: 200 MB each), and every piece costs the host about a dozen calls a step."""


@dataclass
class Assembly:
    """The parts of one engine. ``masters``, ``grads`` and ``optimizer`` are None for evaluation only."""

    module: nn.Module
    device: torch.device
    sharding: Sharding
    layouts: list[BucketLayout] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)
    weights: FlatWeights | None = None
    grads: GradientStore | None = None
    masters: MasterWeights | None = None
    optimizer: ZeroOptimizer | None = None
    doors: Doors | None = None
    gather_group: dist.ProcessGroup | None = None
    shards: Shards | None = None
    """Set at stage 3 only."""

    @property
    def param_ids(self) -> set[int]:
        known = {id(param) for param in self.params}
        return known if self.shards is None else known | self.shards.ids

    def index_of(self, param: nn.Parameter) -> int | None:
        """Where ``param`` stands in ``params``; None if it is not trained by this engine."""
        item = self.shards.find(param) if self.shards is not None else None
        wanted = param if item is None else item.param
        return next((index for index, mine in enumerate(self.params) if mine is wanted), None)

    def buckets_of(self, params: Sequence[nn.Parameter]) -> set[int]:
        indices = {self.index_of(param) for param in params}
        return {layout.index for layout in self.layouts for slot in layout.slots if slot.spec.index in indices}

    def publish_masters(self) -> None:
        """Write the masters into the weights, on all ranks: after they were loaded or set. Collective."""
        if self.masters is None or self.weights is None:
            return
        self.reshard()
        self.masters.write_weights()
        if self.sharding.gathers_weights:
            for layout, flat in zip(self.layouts, self.weights.flats):
                if layout.num_shards > 1:
                    low, high = layout.shard_range(self.sharding.shard)
                    all_gather_flat(flat, flat[low:high].clone(), self.gather_group)

    def reshard(self) -> None:
        """Free gathered copies of sharded parameters, before shards are read or written directly."""
        if self.shards is not None:
            self.shards.reshard()

    def states_changed(self) -> None:
        """Somebody wrote to masters or states directly: drop copies made ahead of time."""
        for home in self.masters.homes if self.masters is not None else []:
            home.forget_prefetched()

    def close(self) -> None:
        try:
            if self.masters is not None:
                self.masters.synchronize()
        finally:  # an update that failed must not keep its thread and hooks alive
            self._detach()

    def _detach(self) -> None:
        if self.doors is not None:
            self.doors.close()
        if self.shards is not None:
            self.shards.close()
        if self.grads is not None:
            self.grads.detach()
        if self.masters is not None:
            self.masters.close()

    def memory_report(self) -> dict[str, dict[str, int]]:
        places: dict[str, dict[str, int]] = {"device": {}, "host": {}}
        for tensor in self._module_tensors():
            place = places["host" if tensor.device.type != self.device.type else "device"]
            place["weights"] = place.get("weights", 0) + tensor.numel() * tensor.element_size()
        if self.grads is not None:
            place = places["host" if self.grads.is_on_host else "device"]
            place["gradients"] = place.get("gradients", 0) + self.grads.num_bytes
        for home in self.masters.homes if self.masters is not None else []:
            place = places["host" if home.is_on_host else "device"]
            for kind, size in home.num_bytes.items():
                place[kind] = place.get(kind, 0) + size
            if isinstance(home, NvmeHome):
                places["nvme"] = home.file_bytes
            if isinstance(home, StreamedHome):
                places["device"]["buffers"] = places["device"].get("buffers", 0) + home.staging_bytes
        return places

    def _module_tensors(self) -> list[Tensor]:
        """This rank's memory of every parameter and buffer."""
        seen: dict[int, Tensor] = {}
        for tensor in [*self.module.parameters(), *self.module.buffers()]:
            item = self.shards.find(tensor) if self.shards is not None else None
            seen.setdefault(id(tensor), tensor if item is None else item.padded)
        return list(seen.values())


def assemble(
    module: nn.Module,
    settings: EngineSettings,
    device: torch.device,
    param_groups: list[dict[str, Any]] | None,
    client: torch.optim.Optimizer | None,
    rank: int,
    world_size: int,
    group: dist.ProcessGroup | None,
) -> Assembly:
    """Build all parts; the module ends up on ``device`` with its trainable weights in flat buckets."""
    parts = Assembly(module, device, sharding_for(settings.stage, rank=rank, world_size=world_size))
    compute = DTYPES[settings.precision] if settings.precision != "fp32" else None
    if param_groups is None:
        place_rest(module, device, compute, skip=set())
        return parts
    rule, optimizer, client_steps = choose_optimizer(settings, param_groups, client)
    parts.optimizer = optimizer
    parts.params, specs = _specs(module, optimizer.param_groups, compute, settings)
    place_rest(module, device, compute, skip={id(param) for param in parts.params})
    asked = min(settings.reduce_bucket_size, settings.allgather_bucket_size, settings.sub_group_size)
    numel = min(BUCKET_NUMEL, max(asked, MIN_BUCKET_NUMEL))
    parts.layouts = plan_buckets(specs, bucket_numel=numel, num_shards=parts.sharding.num_shards)
    parts.weights = FlatWeights(parts.layouts, parts.params, device)
    if world_size > 1:
        broadcast_rest(module, {id(param) for param in parts.params}, group)
    _wire(parts, settings, rule, client if client_steps else None, group)
    return parts


def choose_optimizer(
    settings: EngineSettings, param_groups: list[dict[str, Any]], client: torch.optim.Optimizer | None
) -> tuple[UpdateRule, ZeroOptimizer, bool]:
    if client is None:
        if settings.optimizer is None:
            raise ConfigError(
                "$.optimizer: neither the configuration nor the caller names an optimizer. "
                'Add an "optimizer" section, or pass an optimizer.'
            )
        rule = rule_from_config(settings.optimizer)
        groups = [{**rule.defaults, **group} for group in param_groups]
        return rule, ZeroOptimizer(groups, rule.defaults), False
    found = rule_for(client)
    if found is not None and client.state:
        logger.warning(
            "optimizer %s has taken steps already; its states start afresh here. Make the optimizer new, or load a "
            "checkpoint of this engine.",
            type(client).__name__,
        )
    optimizer = ZeroOptimizer(
        [{**group, "params": list(group["params"])} for group in client.param_groups], client.defaults, client=client
    )
    return found or UpdateRule(client.defaults), optimizer, found is None


def _specs(
    module: nn.Module, groups: Sequence[dict[str, Any]], compute: torch.dtype | None, settings: EngineSettings
) -> tuple[list[nn.Parameter], list[ParamSpec]]:
    narrow = params_of_safe_modules(module, settings.lower_precision_safe_modules)
    group_of = {id(param): index for index, group in enumerate(groups) for param in group["params"]}
    params: list[nn.Parameter] = []
    specs: list[ParamSpec] = []
    for name, param in module.named_parameters():
        if param.requires_grad and id(param) in group_of:
            dtype = compute if compute is not None and param.is_floating_point() else param.dtype
            wire = DTYPES[settings.autocast] if settings.autocast is not None and id(param) in narrow else None
            group, shape = group_of[id(param)], tuple(param.shape)
            specs.append(ParamSpec(len(params), name, shape, param.numel(), dtype, group, wire))
            params.append(param)
    if not params:
        raise ConfigError(
            "no parameter of the model is trainable and known to the optimizer: unfreeze something "
            "(param.requires_grad_(True)) before the engine is made."
        )
    return params, specs


@torch.no_grad()
def place_rest(module: nn.Module, device: torch.device, compute: torch.dtype | None, skip: set[int]) -> None:
    """Move what is not trained. Buffers keep their type: rotary tables and running means need their precision."""
    for submodule in module.modules():
        for param in submodule._parameters.values():
            if param is not None and id(param) not in skip:
                cast = compute if compute is not None and param.is_floating_point() else param.dtype
                param.data = param.data.to(device, cast)
        for name, buffer in submodule._buffers.items():
            if buffer is not None:
                submodule._buffers[name] = buffer.to(device)


def broadcast_rest(module: nn.Module, skip: set[int], group: dist.ProcessGroup | None) -> None:
    for tensor in [*(p.data for p in module.parameters() if id(p) not in skip), *module.buffers()]:
        # Some backends only take contiguous tensors.
        whole = tensor.contiguous()
        dist.broadcast(whole, src=source_rank(group), group=group)
        if whole is not tensor:
            tensor.copy_(whole)


def source_rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_global_rank(group, 0) if group is not None else 0


def _wire(
    parts: Assembly,
    settings: EngineSettings,
    rule: UpdateRule,
    client: torch.optim.Optimizer | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Adopt the weights bucket by bucket and connect gradients, masters and doors."""
    sharding, weights = parts.sharding, parts.weights
    assert weights is not None and parts.optimizer is not None
    for layout in parts.layouts:
        weights.allocate(layout, layout.dtype)  # type: ignore[arg-type]
    parts.grads = make_grads(parts, settings, group)
    context = Context(
        rule=rule,
        weights=weights.flats,
        grads=parts.grads,
        finish_bucket=lambda bucket, home: finish_bucket(parts, bucket, home),
        device=parts.device,
        is_alone=sharding.world_size == 1,
        groups=parts.optimizer.param_groups,
        types=state_types(settings, rule, client),
    )
    homes = make_homes(parts, settings, context, client, parts.layouts)
    parts.masters = MasterWeights(homes, parts.grads, len(parts.layouts))
    if sharding.gathers_weights and any(isinstance(home, HostHome) for home in parts.masters.homes):
        # The worker thread gathers while the main thread may be in another collective: keep them apart.
        parts.gather_group = dist.new_group(dist.get_process_group_ranks(group) if group is not None else None)
    else:
        parts.gather_group = group

    # Bucket by bucket: the fp32 values of no more than one bucket are on the device on their way to the host.
    pieces_of: dict[int, list[tuple[Home, int, Piece]]] = {}
    for home, index, piece in parts.masters.pieces():
        pieces_of.setdefault(piece.bucket, []).append((home, index, piece))
    for layout in parts.layouts:
        exact = adopt_bucket(weights, layout, sharding, group)
        for home, index, piece in pieces_of.get(layout.index, ()):
            home.set_master(index, exact(piece))
    prefetch_states(parts)
    parts.doors = Doors(parts.module, parts.layouts, parts.params)
    parts.doors.guard(parts.masters)


def prefetch_states(parts: Assembly) -> None:
    if parts.masters is not None and any(isinstance(home, StreamedHome) for home in parts.masters.homes):
        parts.masters.prefetch_after(parts.layouts, parts.params)


def adopt_bucket(
    weights: FlatWeights, layout: BucketLayout, sharding: Sharding, group: dist.ProcessGroup | None
) -> Callable[[Piece], Tensor]:
    """Move a bucket's parameters into its buffer, rank 0's values on every rank; return fp32 values by piece."""
    flat = weights.flats[layout.index]
    values = weights.adopt(layout)
    if sharding.world_size > 1:
        dist.broadcast(values, src=source_rank(group), group=group)
        if flat is not values:
            flat.copy_(values)
    low, high = layout.shard_range(sharding.shard)
    first = 0
    if high - low < layout.padded_numel and values is not flat:
        first, values = low, values[low:high].clone()  # a view would keep the other ranks' shards in memory
    return lambda piece: values[piece.start - first : piece.end - first]


def adopt_weights(
    weights: FlatWeights, layouts: Sequence[BucketLayout], sharding: Sharding, group: dist.ProcessGroup | None
) -> Callable[[Piece], Tensor]:
    """``adopt_bucket`` for all of ``layouts`` at once; buffers are made here."""
    exact = {}
    for layout in layouts:
        weights.allocate(layout, layout.dtype)  # type: ignore[arg-type]
        exact[layout.index] = adopt_bucket(weights, layout, sharding, group)
    return lambda piece: exact[piece.bucket](piece)


def make_grads(parts: Assembly, settings: EngineSettings, group: dist.ProcessGroup | None) -> GradientStore:
    assert parts.weights is not None
    wire = settings.communication_dtype
    options = ReduceOptions(
        parts.sharding.world_size,
        op=settings.gradient_allreduce_op,
        prescale=settings.prescale_gradients,
        predivide_factor=settings.gradient_predivide_factor,
        dtype=DTYPES[wire] if wire is not None else None,
    )
    is_half = all(flat.dtype != torch.float32 for flat in parts.weights.flats)
    store: type[GradientStore] = TransientGrads if parts.sharding.shards_grads else ResidentGrads
    if parts.sharding.world_size == 1 and is_half:
        store = LooseGrads
    return store(  # type: ignore[call-arg]
        parts.layouts,
        parts.params,
        parts.sharding,
        options,
        group=group,
        overlap=settings.overlap_comm,
        flats=parts.weights.flats,
        accumulate_fp32=accumulates_in_fp32(settings),
    )


def accumulates_in_fp32(settings: EngineSettings) -> bool:
    """Whether sums of micro-steps need buffers wider than the weights.

    bf16 keeps 8 bits: sums lose small gradients, so they are fp32 unless the user has told otherwise.
    """
    if settings.precision == "fp32":
        return False
    default = "fp32" if settings.precision == "bf16" and settings.master_dtype == "fp32" else settings.precision
    return (settings.grad_accum_dtype or default) == "fp32"


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
    if streams:
        away: Home = StreamedHome(context, moved, pin_memory=offload.pin_memory)
    else:
        # Without a device to overlap with, a second thread would only fight the first for the cores.
        threaded = parts.device.type == "cuda" or offload.step_on == "host"
        if offload.device == "nvme":
            return [DeviceHome(context, kept), NvmeHome(context, moved, offload, settings.aio, threaded=threaded)]
        away = HostHome(
            context,
            moved,
            pin_memory=offload.pin_memory,
            threaded=threaded,
            threads_share=offload.host_threads_share,
        )
    return [DeviceHome(context, kept), away]


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


def finish_bucket(parts: Assembly, bucket: int, home: object) -> None:
    assert parts.masters is not None and parts.grads is not None and parts.weights is not None
    if parts.masters.finisher[bucket] is not home:
        return
    if parts.sharding.world_size > 1:
        parts.grads.clear_shard(bucket)
    if parts.sharding.gathers_weights:
        flat = parts.weights.flats[bucket]
        low, high = parts.layouts[bucket].shard_range(parts.sharding.shard)
        all_gather_flat(flat, flat[low:high].clone(), parts.gather_group)
