"""Static and dynamic fp16 loss scaling: a pure state machine, no torch.

The life of one optimizer step, as the engine drives it::

    scale = scaler.scale             # read once, used for every micro-batch of the step
    (loss * scale).backward()        # fp16 gradients of small losses no longer vanish
    grads / scale                    # unscale by the scale that this backward used
    scaler.update(found_overflow)    # last: may change the scale for the *next* step

The order matters in the step in which the scale grows: dividing by the new scale would halve the gradient once per
window. DeepSpeed updates before it unscales; this engine does not, and is exact.

Dynamic rules, with ``iteration`` counted from 0 over all updates, skipped steps included::

    overflow, hysteresis left > 1    hysteresis left -= 1, scale stays
    overflow, hysteresis left = 1    at min_scale: LossScaleError; else scale = max(scale / 2, min_scale)
    clean, iteration - last_overflow - 1 positive and divisible by window
                                     scale *= 2, hysteresis refilled
    clean, consecutive_hysteresis    hysteresis refilled
"""

from __future__ import annotations

from typing import Any

from hf_zero_plugin.config.settings import LossScaleSettings
from hf_zero_plugin.errors import LossScaleError

__all__ = ["LossScaler"]

_LARGEST_SCALE = 2.0**127
"""Largest power of two in fp32; a run of all-zero gradients would otherwise grow the scale to infinity."""


class LossScaler:
    """Factor put on the loss before backward, so that small fp16 gradients do not vanish.

    Args:
        settings: ``static_scale`` above 0 fixes the scale; otherwise it starts at ``2**initial_scale_power`` (or at
            ``min_scale``, if that is larger) and follows the rules in the module's docstring.
    """

    def __init__(self, settings: LossScaleSettings) -> None:
        self.settings = settings
        self.dynamic = settings.static_scale == 0
        self._full_hysteresis = max(1, settings.hysteresis)
        self._window = max(1, settings.window)
        self._scale = (
            max(2.0**settings.initial_scale_power, settings.min_scale) if self.dynamic else float(settings.static_scale)
        )
        self._iteration = 0
        self._last_overflow = -1
        self._hysteresis_left = self._full_hysteresis

    @property
    def scale(self) -> float:
        """Factor for the next backward. Read it once per step, and unscale by what was read."""
        return self._scale

    @property
    def is_exhausted(self) -> bool:
        """The next overflow, if it comes now, raises."""
        return self.dynamic and self._hysteresis_left <= 1 and self._scale <= self.settings.min_scale

    def update(self, overflow: bool, *, culprit: str | None = None) -> None:
        """Account for one optimizer step, after its gradients were unscaled.

        Args:
            overflow: some gradient was inf or nan, on any rank; the step was skipped.
            culprit: name of the first parameter whose gradient was not finite, if the engine looked.

        Raises:
            LossScaleError: an overflow at ``min_scale`` (dynamic scaling only). The state is left as it was.
        """
        if self.dynamic:
            if overflow:
                self._on_overflow(culprit)
            else:
                self._on_clean_step()
        self._iteration += 1

    def _on_overflow(self, culprit: str | None) -> None:
        if self._hysteresis_left > 1:
            self._hysteresis_left -= 1
        elif self._scale <= self.settings.min_scale:
            raise LossScaleError(_minimum_message(self._scale, self._iteration, culprit))
        else:
            self._scale = max(self._scale / 2, self.settings.min_scale)
        self._last_overflow = self._iteration

    def _on_clean_step(self) -> None:
        num_clean = self._iteration - self._last_overflow - 1
        grows = num_clean > 0 and num_clean % self._window == 0
        if grows:
            self._scale = min(self._scale * 2, max(self._scale, _LARGEST_SCALE))
        if grows or self.settings.consecutive_hysteresis:
            self._hysteresis_left = self._full_hysteresis

    def state_dict(self) -> dict[str, Any]:
        """Numbers and booleans only, so it can be written as JSON."""
        return {
            "dynamic": self.dynamic,
            "scale": self._scale,
            "iteration": self._iteration,
            "last_overflow": self._last_overflow,
            "hysteresis_left": self._hysteresis_left,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state.

        The present settings win where they disagree with it: a static scale stays, a state saved under a static scale
        starts dynamic scaling afresh, and a scale below ``min_scale`` is raised to it.
        """
        if not self.dynamic or not state_dict["dynamic"]:
            return
        self._scale = max(float(state_dict["scale"]), self.settings.min_scale)
        self._iteration = int(state_dict["iteration"])
        self._last_overflow = int(state_dict["last_overflow"])
        self._hysteresis_left = max(1, min(int(state_dict["hysteresis_left"]), self._full_hysteresis))

    def __repr__(self) -> str:
        kind = "dynamic" if self.dynamic else "static"
        return f"LossScaler({kind}, scale {self._scale:g}, iteration {self._iteration})"


def _minimum_message(scale: float, iteration: int, culprit: str | None) -> str:
    where = "" if culprit is None else f" First parameter with a non-finite gradient: {culprit}."
    return (
        f"fp16 gradients overflow at step {iteration} although the loss scale is already at its minimum, {scale:g} "
        f"($.fp16.min_loss_scale).{where} Scaling further down cannot help: the model's values do not fit fp16, or the "
        "loss is not finite. Use bf16 ($.bf16.enabled: true, or --bf16), whose range is that of fp32; models "
        "pretrained in bf16, T5 among them, need it. If bf16 fails too, look for nan in the data or lower the "
        "learning rate."
    )
