"""Number formats: ``fp16``, ``bf16``, ``torch_autocast``, ``data_types``, and Apex's ``amp``."""

from __future__ import annotations

from pydantic import ConfigDict

from hf_zero_plugin.config.fields import (
    AboveZero,
    AutoFlag,
    AutoText,
    Dtype,
    HalfDtype,
    Names,
    NonNegative,
    Positive,
    ScalePower,
    Section,
    applied,
    inert,
    refused,
)

__all__ = ["AMP", "BF16", "FP16", "DataTypes", "TorchAutocast"]

_LEAVE_OUT = "Remove the key, or set it to false."


class FP16(Section):
    enabled: AutoFlag = applied(
        False, "Hold weights, activations and gradients in float16, fp32 master weights beside them."
    )
    auto_cast: bool = applied(
        False,
        "Cast floating-point inputs of the model to float16.",
        note="The Trainer casts the batches it prepares in any case.",
    )
    loss_scale: NonNegative = applied(0.0, "Static loss scale; 0 scales dynamically.")
    initial_scale_power: ScalePower = applied(16, "The dynamic loss scale starts at 2 to this power.")
    loss_scale_window: Positive = applied(1000, "Steps without overflow after which the dynamic loss scale doubles.")
    hysteresis: Positive = applied(2, "Overflows that are needed before the dynamic loss scale is halved.")
    consecutive_hysteresis: bool = applied(False, "Refill the hysteresis counter at every step without overflow.")
    min_loss_scale: AboveZero = applied(1, "The dynamic loss scale never falls below this; an overflow there raises.")
    fp16_master_weights_and_grads: bool = refused(
        False,
        "Keep master weights and gradients in float16.",
        why="Updates smaller than float16 can hold would be lost; master weights are always fp32 here.",
        fix=_LEAVE_OUT,
    )


class BF16(Section):
    enabled: AutoFlag = applied(
        False, "Hold weights, activations and gradients in bfloat16, fp32 master weights beside them."
    )
    check_grad_overflow: bool = applied(
        True,
        "Look for non-finite gradients and skip the step if there are any.",
        note="At every stage; DeepSpeed looks at stages 1 and 2 only.",
    )
    immediate_grad_update: bool = inert(
        False,
        "Add gradients to the fp32 accumulation buffer as they are produced.",
        why="Gradients are always taken as they are produced.",
    )
    bf16_master_weights_and_grads: bool = applied(
        False,
        "Keep master weights and sums of gradients in bfloat16.",
        note="Updates smaller than bfloat16 can hold are lost; the update itself is computed in fp32.",
    )
    bf16_optimizer_states: bool = applied(
        False,
        "Keep the optimizer's states in bfloat16.",
        note="Rounded to nearest after an fp32 update; works with fp32 master weights as well.",
    )


class TorchAutocast(Section):
    enabled: bool = applied(False, "Run the forward pass under torch.autocast; weights and gradients stay fp32.")
    dtype: HalfDtype | None = applied(None, "Type that autocast computes in; bf16 unless --fp16 is given.")
    lower_precision_safe_modules: Names | None = applied(
        None,
        "Import paths of module classes (torch.nn.Linear) whose gradients are reduced in dtype.",
        note="None if absent: all gradients are reduced in fp32, or in communication_data_type.",
    )


class DataTypes(Section):
    grad_accum_dtype: Dtype | None = applied(None, "Type that gradients are accumulated in over micro-steps.")
    param_dtype: Dtype | None = applied(
        None,
        "Type of the weights where neither fp16 nor bf16 is on; with torch_autocast too. Masters stay fp32.",
    )
    buffer_dtype: Dtype | None = refused(
        None,
        "Type of the model's buffers.",
        why="Buffers take the type of the weights.",
        fix="Remove the key; cast the buffers in your own code if they need another type.",
    )


class AMP(Section):
    """Apex options beyond these are passed through by DeepSpeed, so the section stays open."""

    model_config = ConfigDict(extra="allow")

    enabled: AutoFlag = refused(
        False,
        "Mixed precision by NVIDIA Apex.",
        why="Apex needs compiled extensions, and PyTorch has mixed precision of its own.",
        fix="Use the fp16, bf16 or torch_autocast section.",
    )
    opt_level: AutoText = inert("O1", "Apex optimization level.", why="Only read by Apex, which is not used.")
