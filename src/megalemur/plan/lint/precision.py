"""Rules about the schedule, the precision and what keeps the numbers right."""

from typing import Any

from megalemur.plan.lint.finding import Texts
from megalemur.plan.lint.scale import is_costly

_ACCUMULATED = 4


def floor_before_the_end(run: Any, schedule: Any) -> Texts:
    """A cosine that reaches its floor long before the run ends: the rest of the token budget runs at the floor.
    https://github.com/EleutherAI/gpt-neox/pull/1008"""
    decay = schedule.decay_steps
    if schedule.kind == "cosine" and decay is not None and decay < 0.9 * run.steps:
        rest = 1 - decay / run.steps
        yield (
            f"schedule.decay_steps={decay} ends before run.steps={run.steps}: the last {rest:.0%} of the tokens run at "
            "schedule.min_ratio of the peak; leave decay_steps out, and the decay ends with the run"
        )


def long_warm_up(run: Any, schedule: Any) -> Texts:
    """A warm-up that takes more than a quarter of the run: of a schedule for a longer one.
    https://github.com/ace-step/ACE-Step/pull/198"""
    if run.steps and 0.25 * run.steps < schedule.warmup_steps < run.steps and run.steps >= 100:
        yield (
            f"schedule.warmup_steps={schedule.warmup_steps} is {schedule.warmup_steps / run.steps:.0%} of run.steps="
            f"{run.steps}; use {max(1, run.steps // 50)} or so, or more steps"
        )


def gradients_in_bf16(precision: Any, parallel: Any, data: Any) -> Texts:
    """Many gradients are added up in bf16: eight bits of mantissa lose the small ones.
    https://github.com/deepspeedai/DeepSpeed/issues/2768 https://github.com/NVIDIA/Megatron-LM/issues/372"""
    batches = data.global_batch_size // (data.micro_batch_size * parallel.data)
    added = batches * parallel.data
    if precision.dtype == "bf16" and not precision.reduce_grads_in_fp32 and added >= _ACCUMULATED:
        yield (
            f"precision.reduce_grads_in_fp32=false adds up {batches} micro-batches on {parallel.data} replicas in "
            "bf16, "
            "where sums this long lose what is small; use precision.reduce_grads_in_fp32=true"
        )


def fp32_at_scale(run: Any, model: Any, parallel: Any, data: Any, precision: Any) -> Texts:
    """A long run in fp32: several times slower and larger than in bf16.
    https://github.com/huggingface/transformers/issues/14608"""
    if precision.dtype == "fp32" and is_costly(run, model, parallel, data):
        yield (
            "precision.dtype=fp32 is for tests and debugging, and several times slower on GPUs; use "
            "precision.dtype=bf16"
        )


def deterministic_at_scale(run: Any, model: Any, parallel: Any, data: Any) -> Texts:
    """A long run with deterministic kernels, which are slower.
    https://github.com/areal-project/AReaL/pull/340"""
    if run.deterministic and is_costly(run, model, parallel, data):
        yield (
            "run.deterministic=true chooses slower kernels for the whole run; use run.deterministic=false where equal "
            "bits are not needed"
        )


def gradients_never_clipped(optim: Any) -> Texts:
    """Clipping is off: one bad step may do lasting damage.
    https://github.com/marin-community/marin/issues/1390"""
    if optim.clip_grad_norm == 0:
        yield "optim.clip_grad_norm=0 never clips: one bad step may do lasting damage; use optim.clip_grad_norm=1.0"


def replicas_never_compared(run: Any, parallel: Any) -> Texts:
    """Replicas of a parameter may drift apart for weeks, and nobody compares them.
    https://github.com/bigscience-workshop/Megatron-DeepSpeed/pull/270
    https://github.com/NVIDIA/TransformerEngine/issues/441"""
    if run.check_replicas_every == 0 and parallel.world_size > 1:
        yield (
            "run.check_replicas_every=0: what must be equal on several ranks is never compared; use "
            "run.check_replicas_every=100"
        )


def recompute_settings_unused(precision: Any) -> Texts:
    """Settings of a kind of recompute that is not chosen, without any effect.
    https://github.com/huggingface/accelerate/issues/1791"""
    for wanted, names in (("selective", ("recompute_modules",)), ("full", ("recompute_method", "recompute_layers"))):
        for name in names:
            default = type(precision).model_fields[name].default
            if precision.recompute != wanted and getattr(precision, name) != default:
                yield (
                    f"precision.{name} has no effect with precision.recompute={precision.recompute}; use "
                    f"precision.recompute={wanted}, or leave it out"
                )


RULES = (
    ("warning", floor_before_the_end),
    ("warning", long_warm_up),
    ("warning", gradients_in_bf16),
    ("warning", fp32_at_scale),
    ("warning", deterministic_at_scale),
    ("warning", gradients_never_clipped),
    ("warning", replicas_never_compared),
    ("warning", recompute_settings_unused),
)
