"""Checks of a finetuning's fields, alone and together, before anything is loaded."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.kernels import check_name
from gen_accel.lora.clip_checks import check_clips
from gen_accel.lora.experts import BOTH
from gen_accel.lora.optimizers import check_optimizer
from gen_accel.lora.options import check_allocations, check_installed, check_memory
from gen_accel.pipelines.long_video import check_names
from gen_accel.values import fits, shown

MOST_LAYERS = 1000  # more than any model has
MOST_WORKERS = 256  # threads, each with a clip in memory
MOST_RATE = 1e3  # a larger learning rate trains nothing, long before float32 overflows
EPS = 1e-12  # the sum of shares may end a rounding error above 1


class Limit(NamedTuple):
    """A rule for the values of some fields, unless they are None.

    Args:
        must: text of the message after "NAME must".
    """

    names: tuple[str, ...]
    holds: Callable[[Any], bool]
    must: str


LIMITS = (
    Limit(
        (
            *("rank", "dense_layers", "dense_steps", "weight_decay", "warmup_steps"),
            *("max_grad_norm", "validate_every", "loss_every", "shuffle_tags"),
            "blocks_to_swap",
        ),
        lambda x: 0 <= x < float("inf"),
        "not be negative",
    ),
    Limit(
        ("betas",),
        lambda betas: all(0 <= beta < 1 for beta in betas),
        "be two shares from 0 to below 1",
    ),
    Limit(("workers",), lambda x: 0 <= x <= MOST_WORKERS, f"be from 0 to {MOST_WORKERS}"),
    Limit(("dense_layers",), lambda x: x <= MOST_LAYERS, f"be at most {MOST_LAYERS}"),
    Limit(("learning_rate",), lambda x: not x > MOST_RATE, f"be at most {MOST_RATE:g}"),
    Limit(("seed",), lambda x: 0 <= x < 2**32, "be from 0 to 2^32 - 1"),
    Limit(
        (
            *("height", "width", "batch_size", "gradient_accumulation", "checkpoint_every"),
            *("keep_checkpoints", "validation_steps", "image_tokens", "image_size"),
            *("max_tokens", "trained_frames", "validation_frames", "chunks", "tag_orders"),
            "context_parallel",
        ),
        lambda x: x >= 1,
        "be at least 1",
    ),
    Limit(
        ("learning_rate", "logit_std", "fps", "alpha", "shift"),
        lambda x: 0 < x < float("inf"),
        "be positive",
    ),
    Limit(("lora_dropout", "ema_decay", "images"), lambda x: 0 <= x < 1, "be a share from 0 to 1"),
    Limit(("huber", "min_snr"), lambda x: 0 < x < float("inf"), "be positive"),
    Limit(
        ("noise_levels",),
        lambda levels: all(0 < level <= 1 for level in levels),
        "be above 0 and at most 1",
    ),
    Limit(("sampled_steps",), lambda x: x >= 1, "be at least 1"),
    Limit(
        ("caption_dropout", "image_dropout", "first_frame_dropout"),
        lambda x: 0 <= x < 1 + EPS,
        "be a share from 0 to 1",
    ),
    Limit(
        ("held_out",),
        lambda x: 0 <= x < 1 or (x < float("inf") and x % 1 == 0 and x > 0),
        "be a whole number of clips, or a share from 0 to below 1",
    ),
    Limit(("mask_floor",), lambda x: 0 <= x <= 1, "be a share from 0 to 1"),
    Limit(("teacher_guidance",), lambda x: 1 <= x < float("inf"), "be finite and at least 1"),
)


def check(config: Any) -> None:
    """Check a `TrainConfig`, which calls this when it is made.

    Raises ValueError for a value out of its limits, or for fields that do not go together.
    """
    for names, holds, must in LIMITS:
        for name in names:
            value = getattr(config, name)
            known = fits(value, float) or isinstance(value, tuple)
            if value is not None and not (known and holds(value)):
                raise ValueError(f"{name} must {must}, got {shown(value)}")
    check_names(config.sample_with, "sample_with")
    check_installed(vars(config))
    check_memory(config)
    check_optimizer(config)
    _check_teacher(config)
    check_clips(config)
    _check_loss(config)
    if not config.stages:
        raise ValueError("stages is empty: give at least one, as 81:200")
    method = method_from(config.method, config.settings)
    memory = method.step_state()
    if memory is not None and memory.refuses_training:
        raise ValueError(f"method {config.method!r} does not train: {memory.refuses_training}")
    check_name(config.kernel)
    if config.adapter == "image_prompt":
        _check_image_prompt(config)
    else:
        _check_unused(config, "Image prompt")
        if config.objective == "distill_attention":
            raise ValueError(
                "objective distill_attention is for adapter image_prompt: take distill"
            )
    if config.rank == 0 and not (config.train_processors and method.has_branch):
        raise ValueError(
            "rank is 0, which leaves nothing to train: only a method with parameters, such as "
            f"sparse_linear, trains without a LoRA, and method is {config.method!r}"
        )
    if config.rank == 0:
        for name in ("dora", "rank_stabilised"):
            if config.is_given(name):
                raise ValueError(
                    f"{name} is of a LoRA, and rank is 0: give a rank, or leave it out"
                )
    if config.rank and not config.targets:
        raise ValueError("targets is empty: name what the LoRA is put on, as attention")
    if config.held_out and not config.loss_every:
        raise ValueError(
            f"held_out {shown(config.held_out)} keeps clips from training to measure their loss: "
            "give loss_every, as 50"
        )
    if config.validate_every and not config.validation_prompts:
        raise ValueError("validate_every needs validation_prompts, got none")
    _check_masks(config)
    _check_condition(config)
    check_allocations(config)


def _check_masks(config: Any) -> None:
    if config.mask_floor and not config.masks:
        raise ValueError(f"mask_floor {config.mask_floor:g} is for masks: give masks, or leave it")
    if config.masks and config.objective == "distill_attention":
        raise ValueError(
            "masks weigh the error of a prediction, and objective distill_attention has none: "
            "leave masks out"
        )


def _check_teacher(config: Any) -> None:
    if config.objective != "distill" or config.adapter != "lora":
        for name in ("teacher_guidance", "teacher_lora"):
            if config.is_given(name):
                raise ValueError(
                    f"{name} is for objective distill of adapter lora, got "
                    f"{getattr(config, name)!r} with {config.objective} of {config.adapter}: "
                    "leave it out"
                )
    if config.teacher_lora is not None and not config.rank:
        raise ValueError(
            f"teacher_lora {config.teacher_lora} teaches a LoRA, and rank is 0: give a rank, or "
            "leave it out"
        )


def _check_loss(config: Any) -> None:
    """Refuse, by a ValueError, fields of the loss of which one would not be read."""
    if config.noise_levels and config.sampled_steps is not None:
        raise ValueError(
            f"noise_levels {config.noise_levels} and sampled_steps {config.sampled_steps} both "
            "say where to train: give one of them"
        )
    given = "noise_levels" if config.noise_levels else "sampled_steps"
    if config.is_given(given):
        drawn = ["timestep_sampling", "logit_mean", "logit_std"]
        drawn += ["shift"] if given == "noise_levels" else []
        for name in drawn:
            if config.is_given(name):
                raise ValueError(
                    f"{name} says how noise levels are drawn, which {given} fixes, got "
                    f"{getattr(config, name)!r}: leave one out"
                )
    if config.is_given("min_snr") and config.weighting != "min_snr":
        raise ValueError(
            f"min_snr is for weighting min_snr, got {config.min_snr:g} with {config.weighting}"
        )
    if config.objective == "distill_attention":
        for name in ("huber", "weighting"):
            if config.is_given(name):
                raise ValueError(
                    f"objective distill_attention has a loss of its own, got {name} "
                    f"{getattr(config, name)!r}: leave it out"
                )


def _check_image_prompt(config: Any) -> None:
    _check_unused(config, "LoRA")
    if config.context_parallel > 1:
        raise ValueError(
            f"context_parallel {config.context_parallel} is for adapter lora: an image prompt "
            "trains with whole clips, so leave it out"
        )
    if config.part == BOTH:
        raise ValueError(
            f"part both trains a LoRA for each expert, got adapter {config.adapter}: give part "
            "transformer or transformer_2"
        )
    unread = "image_features" if config.image_encoder is None else "image_size"
    if config.is_given(unread):
        raise ValueError(
            f"{unread} does not apply {'without' if config.image_encoder is None else 'to'} "
            f"an image_encoder, got {getattr(config, unread)!r}: leave it out"
        )
    if config.objective == "distill_attention" and config.checkpoints_activations:
        raise ValueError(
            "gradient_checkpointing saves nothing under objective distill_attention, whose "
            "gradients stay within each attention: leave it out"
        )


def _check_condition(config: Any) -> None:
    if config.condition == "first_frame" and config.adapter != "lora":
        raise ValueError(
            f"condition first_frame is for adapter lora, got adapter {config.adapter}: an image "
            "prompt is trained on models from text to video"
        )
    if config.first_frame_dropout and config.condition == "text":
        raise ValueError(
            f"first_frame_dropout {config.first_frame_dropout:g} is for condition first_frame, "
            "got condition text: leave it out"
        )
    if config.first_frame_dropout and config.adapter != "lora":
        raise ValueError(
            f"first_frame_dropout is for adapter lora, got {config.adapter}: leave it out"
        )
    count, prompts = len(config.validation_images), len(config.validation_prompts)
    if count and count != prompts:
        raise ValueError(
            f"validation_images must be as many as validation_prompts, {prompts}, got {count}"
        )


def _check_unused(config: Any, group: str) -> None:
    """Refuse, by a ValueError, fields of the other adapter that differ from their defaults."""
    names = [one.name for one in fields(config) if one.metadata["group"] == group]
    given = [name for name in names if config.is_given(name)]
    if given:
        listed = ", ".join(f"{name} {getattr(config, name)!r}" for name in given)
        raise ValueError(
            f"adapter {config.adapter} does not use {listed}: leave out what belongs to a "
            f"{'LoRA' if group == 'LoRA' else 'image prompt'} ({', '.join(names)})"
        )
