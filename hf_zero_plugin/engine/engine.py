"""ZeroEngine: what the Trainer trains through. START READING HERE.

One training step, world size 1, states offloaded and streamed through the device::

    forward     modules wait for their own bucket, if its update is on its way   readiness.py
    backward    autograd adds gradients into flat buckets                        gradients.py
    step        norm, non-finite flag and clip coefficient on the device         grad_norm.py
                update of every piece is queued                                  master_weights.py, offload_*.py
                one host read: norm and flag -> loss scale, schedule             loss_scaler.py, schedules.py

``sharding.py`` says what a ZeRO stage shards; ``buckets.py`` says where everything lies; ``assembly.py`` puts the parts
together. What an engine does beside training is in what it inherits::

    Saved       weights and states leave it and come back                        saving.py, checkpointing.py
    Answering   settings, memory and the last step, for those who ask            answers.py
    Timed       where the time of a step goes, if somebody wants to know         timeline.py
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_zero_plugin.config.settings import EngineSettings
from hf_zero_plugin.engine.activation_offload import ActivationOffload
from hf_zero_plugin.engine.answers import Answering
from hf_zero_plugin.engine.assembly import assemble, choose_optimizer
from hf_zero_plugin.engine.flops import FlopsProfiler
from hf_zero_plugin.engine.grad_norm import agreed_culprit, grad_stats
from hf_zero_plugin.engine.loss_scaler import LossScaler
from hf_zero_plugin.engine.low_precision import DTYPES, cast_floats
from hf_zero_plugin.engine.master_weights import StepInputs
from hf_zero_plugin.engine.parts import Assembly
from hf_zero_plugin.engine.registry import register, unregister
from hf_zero_plugin.engine.reports import StepReports, set_log_level
from hf_zero_plugin.engine.saving import Saved
from hf_zero_plugin.engine.schedules import build_scheduler
from hf_zero_plugin.engine.sharded_assembly import assemble_sharded
from hf_zero_plugin.engine.sharding import sharding_for
from hf_zero_plugin.engine.spent import refuse_spent
from hf_zero_plugin.engine.timeline import Timed
from hf_zero_plugin.engine.watchdog import Watchdog, steps_of, watched
from hf_zero_plugin.engine.zero_optimizer import ZeroOptimizer

__all__ = ["ZeroEngine"]

logger = logging.getLogger("hf_zero_plugin")


class ZeroEngine(Answering, Saved, Timed, nn.Module):
    """Trains ``module`` under ZeRO stages 0 to 3, with or without offloaded optimizer states and weights.

    Args:
        module: any model; it is moved to ``device`` and its trainable weights become views of flat buckets.
        settings: resolved configuration.
        param_groups: torch-style groups of trainable parameters; None for evaluation only.
        client_optimizer: a ready-made optimizer to imitate; otherwise ``settings.optimizer`` says which.
        lr_scheduler: a scheduler, or a function that makes one from the optimizer; otherwise
            ``settings.scheduler`` says which.
        config: the ds_config dict as Hugging Face resolved it; kept for callers that look into it.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: EngineSettings,
        *,
        device: torch.device,
        param_groups: list[dict[str, Any]] | None = None,
        client_optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: Callable[[torch.optim.Optimizer], Any] | Any | None = None,
        config: dict[str, Any] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.settings = settings
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.config = config if config is not None else {}
        self.group = group
        self.world_size = dist.get_world_size(group) if dist.is_initialized() else 1
        self.global_rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.scaler = LossScaler(settings.loss_scale) if settings.loss_scale is not None else None
        self.global_steps = 0
        """Boundaries reached, skipped steps included."""
        self.watchdog = Watchdog(self.global_rank, self.world_size, steps_of(self), group)
        shards_params = sharding_for(settings.stage, rank=0, world_size=1).shards_params
        # What can be wrong with a configuration comes first: once weights have moved, an error costs their fp32 values.
        refuse_spent(module)
        set_log_level(settings.log_level)
        chosen = choose_optimizer(settings, param_groups, client_optimizer) if param_groups is not None else None
        self.optimizer: ZeroOptimizer | None = chosen.optimizer if chosen is not None else None
        if self.optimizer is not None:
            self.optimizer.engine = self
        self.lr_scheduler = self._make_scheduler(lr_scheduler)
        build = assemble_sharded if shards_params else assemble
        self.parts: Assembly = build(module, settings, device, chosen, self.global_rank, self.world_size, group)

        if self.parts.shards is not None:
            self.parts.shards.watchdog = self.watchdog
        offloads_activations = settings.activation_checkpointing.cpu_checkpointing
        self._activations = ActivationOffload(module, device) if offloads_activations else None
        self.skipped_steps = 0
        self.micro_steps = 0
        self._forced_boundary: bool | None = None
        self._defers_reduction = False
        self._destroyed = False
        self._plain_modules: list[nn.Module] | None = None
        """All modules, unless one of them has a ``train`` of its own."""
        register(self)
        self._watch_if_asked(settings.wall_clock_breakdown)
        self._reports = StepReports(settings, device, self.world_size)
        counts = settings.flops_profiler is not None and self.global_rank == 0
        self._flops = FlopsProfiler(settings.flops_profiler, module, device) if counts else None  # type: ignore[arg-type]

    def _make_scheduler(self, given: Any) -> Any:
        if self.optimizer is None:
            return None
        if given is None:
            return build_scheduler(self.settings.scheduler, self.optimizer) if self.settings.scheduler else None
        is_scheduler = hasattr(given, "step") and hasattr(given, "state_dict")
        return given if is_scheduler else given(self.optimizer)

    # ---------------------------------------------------------------- forward and backward

    @watched("forward")
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own output, untouched."""
        self._go_on()
        if self.settings.cast_inputs:
            args, kwargs = cast_floats((args, kwargs), DTYPES[self.settings.precision])
        with self._counted("forward"):
            if self.settings.autocast is None:
                return self.module(*args, **kwargs)
            with torch.autocast(self.device.type, dtype=DTYPES[self.settings.autocast]):
                return self.module(*args, **kwargs)

    def _counted(self, phase: str) -> AbstractContextManager[None]:
        if self._flops is None or not self.training or not self._flops.wants(self.global_steps + 1, phase):
            return contextlib.nullcontext()
        return self._flops.count(phase)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the next backward is the last of its step; overrides the count of micro-steps."""
        self._forced_boundary = is_boundary

    def is_gradient_accumulation_boundary(self) -> bool:
        if self._defers_reduction:
            return False
        if self._forced_boundary is not None:
            return self._forced_boundary
        return (self.micro_steps + 1) % self.settings.gradient_accumulation_steps == 0

    @watched("backward")
    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Compute gradients of ``loss`` (0-dim) and reduce them if this is the last micro-step.

        Args:
            scale_wrt_gas: divide by the number of accumulation steps; False when the caller has done it.
        """
        parts = self.parts
        if parts.masters is None or parts.grads is None:
            raise RuntimeError("backward() needs an optimizer: this engine was made for evaluation only")
        boundary = self.is_gradient_accumulation_boundary()
        parts.masters.start_backward(prefetch=boundary)
        parts.grads.begin_backward(boundary=boundary)
        scaled = loss
        if scale_wrt_gas and self.settings.gradient_accumulation_steps > 1:
            scaled = scaled / self.settings.gradient_accumulation_steps
        if self.scaler is not None:
            scaled = scaled.float() * self.scaler.scale
        with self._span("backward"), self._counted("backward"):
            scaled.backward(retain_graph=retain_graph)
            parts.grads.end_backward()
        return loss

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Micro-steps inside do not end the accumulation; allowed at every stage."""
        previous, self._defers_reduction = self._defers_reduction, True
        try:
            yield
        finally:
            self._defers_reduction = previous

    # ---------------------------------------------------------------- step

    @watched("optimizer step")
    def step(self) -> None:
        """At a boundary: clip, update, advance the schedule, clear gradients. Otherwise count the micro-step."""
        boundary = self.is_gradient_accumulation_boundary()
        self.micro_steps += 1
        if not boundary:
            return
        parts, optimizer = self.parts, self.optimizer
        assert parts.masters is not None and parts.grads is not None and optimizer is not None
        parts.masters.wait_all()  # of a step before this one, if no backward pass came between: its gradients are used
        if parts.doors is not None:
            parts.doors.settle()
        with self._span("norm"):
            stats = grad_stats(
                parts.grads.norm_views(),
                device=self.device,
                loss_scale=self.loss_scale,
                max_norm=self.settings.gradient_clipping,
                sharded=parts.sharding.shards_states,
                group=self.group,
            )
        inputs = StepInputs(
            number=self.global_steps - self.skipped_steps + 1,
            groups=optimizer.hyperparameters(),
            multiplier=stats.multiplier,
            found_inf=stats.found_inf if self.settings.check_grad_overflow else None,
        )
        # The step clears the gradients. Where an overflow would be the last, they must still be there to be blamed.
        launched = parts.masters.skips_on_device and not (self.scaler is not None and self.scaler.is_exhausted)
        if launched:
            with self._span("update"):
                parts.masters.step(inputs)
        # The one host read of a step. The device still has the update to do, so it does not run dry.
        norm, found_inf = torch.stack([stats.norm, stats.found_inf]).tolist()
        overflow = bool(found_inf) and self.settings.check_grad_overflow
        culprit = None
        if not launched:
            if overflow:
                if self.scaler is not None and self.scaler.is_exhausted:
                    culprit = agreed_culprit(parts.grads.first_bad_parameter(), parts.sharding.num_shards, self.group)
                parts.grads.clear()
            else:
                with self._span("update"):
                    parts.masters.step(inputs._replace(found_inf=None))
        self._finish_step(norm, overflow, culprit)

    def _finish_step(self, norm: float, overflow: bool, culprit: str | None) -> None:
        assert self.optimizer is not None
        self._grad_norm = norm
        self.global_steps += 1
        self.optimizer.overflow = overflow
        if overflow:
            self.skipped_steps += 1
            if self.global_rank == 0:  # all ranks have agreed
                logger.warning("step %d skipped: a gradient is inf or nan%s", self.global_steps, self._scale_note())
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if self.scaler is not None:
            self.scaler.update(overflow, culprit=culprit)
        if self.timeline is not None:
            self.timeline.close_step()
        self._reports.step_done(self)
        if self._flops is not None:
            self._flops.step_done(self.global_steps)

    def _scale_note(self) -> str:
        return f", loss scale {self.scaler.scale:g}" if self.scaler is not None else ""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears nothing: ``step`` clears gradients, and between micro-steps they must stay."""
        self._go_on()

    def _go_on(self) -> None:
        """The caller of ``step`` has read what it wanted to read from the device: launch what copies there are."""
        if self.parts.masters is not None:
            self.parts.masters.launch_rest()

    # ---------------------------------------------------------------- weights that others see

    def synchronize(self) -> None:
        """Wait until every weight, master and state is up to date, also for the host."""
        self.parts.synchronize()

    def refresh_master_weights(self, params: Sequence[nn.Parameter] | None = None) -> None:
        """The weights (of ``params``, or all) were changed from outside: make the masters agree; states stay."""
        if self.parts.masters is not None:
            self.parts.masters.refresh_from_weights(None if params is None else self.parts.buckets_of(params))

    # ---------------------------------------------------------------- as a module, and the end

    def compile(self, backend: str = "inductor", compile_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """``torch.compile`` the module, in place; pending updates are then waited for once, before it runs."""
        if self.parts.doors is not None:
            self.parts.doors.wait_at(self.module)
        self.module.compile(backend=backend, **(compile_kwargs or {}))

    def destroy(self) -> None:
        """Finish pending work and remove every hook, thread and page lock; the module stays usable."""
        if not self._destroyed:
            self._destroyed = True
            self._end_watching()
            unregister(self)
            if self._activations is not None:
                self._activations.close()
            self.parts.close()

    def train(self, mode: bool = True) -> ZeroEngine:
        """As always, but free of cost where every module trains already: the Trainer calls it every step."""
        if self._plain_modules is None:
            modules = list(self.module.modules())
            overrides = any(_has_train_of_its_own(module) for module in modules)
            self._plain_modules = [] if overrides else modules
        # A module that was attached since is not in the list: it came training, and eval() reaches it the long way.
        if not mode or not self._plain_modules or not all(module.training for module in self._plain_modules):
            return super().train(mode)
        self.training = mode
        return self

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.module.parameters(recurse)

    def to(self, *args: Any, **kwargs: Any) -> ZeroEngine:
        """Moves nothing: weights live in flat buckets on the device that the engine chose."""
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)


def _has_train_of_its_own(module: nn.Module) -> bool:
    """transformers' models override ``train``, to do what a change of the mode asks for: without one it is torch's."""
    train = type(module).train
    known = train is nn.Module.train or train.__module__ == "transformers.modeling_utils"
    return not known or "train" in vars(module)
