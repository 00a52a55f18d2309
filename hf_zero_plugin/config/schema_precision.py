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
    auto_cast: bool = refused(
        False,
        "Cast floating-point inputs of the model to float16.",
        why="The engine does not cast the model's inputs yet; the Trainer casts the batches it prepares.",
        fix=_LEAVE_OUT,
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
    bf16_master_weights_and_grads: bool = refused(
        False,
        "Keep master weights and gradients in bfloat16.",
        why="Not built yet: master weights are always fp32 here.",
        fix=f"{_LEAVE_OUT} To save device memory, offload the optimizer.",
    )
    bf16_optimizer_states: bool = refused(
        False,
        "Keep the optimizer's moments in bfloat16.",
        why="Not built yet: the optimizer's moments are always fp32 here.",
        fix=f"{_LEAVE_OUT} To save device memory, offload the optimizer.",
    )


class TorchAutocast(Section):
    enabled: bool = applied(False, "Run the forward pass under torch.autocast; weights and gradients stay fp32.")
    dtype: HalfDtype | None = applied(None, "Type that autocast computes in; bf16 unless --fp16 is given.")
    lower_precision_safe_modules: Names | None = inert(
        None,
        "Modules whose gradients DeepSpeed communicates in low precision.",
        why="Gradients of an autocast run are fp32 and are reduced in communication_data_type.",
    )


class DataTypes(Section):
    grad_accum_dtype: Dtype | None = applied(None, "Type that gradients are accumulated in over micro-steps.")
    param_dtype: Dtype | None = refused(
        None,
        "Type of the weights, apart from the fp16 and bf16 sections.",
        why="The type of the weights comes from the fp16 and bf16 sections alone.",
        fix="Remove the key, and switch on fp16 or bf16 instead.",
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
