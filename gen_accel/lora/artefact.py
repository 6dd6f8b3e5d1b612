"""Output of a training: a folder that diffusers loads as it loads any LoRA.

pytorch_lora_weights.safetensors   with alpha, rank and the recipe in its metadata
gen_accel.json                     the recipe, to be read
processors.safetensors             the method's own parameters, if it has some
README.md                          the model card
transformer_2/                     the same of the expert for low noise, where both trained
"""

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gen_accel.attention_processors.attached.recipe import (
    CONFIG,
    KEY,
    WEIGHTS,
    Recipe,
    check_base,
    read_recipe,
    scale_of,
)
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.attached.storage import FILE
from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.methods.dense import Dense
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.io import (
    check_finite,
    file_sha256,
    read_tensors,
    replacing,
    save_tensors,
    write_json,
)
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.experts import PARTS, SECOND
from gen_accel.lora.publish import CARD, card_for
from gen_accel.method import Method
from gen_accel.parsing import shown
from gen_accel.paths import expanded
from gen_accel.pipelines.generation.loading import check_fit, under
from gen_accel.pipelines.generation.lora_file import FACTORED, factored, load_factored
from gen_accel.registry import needed_for

with needed_for("a LoRA", extra="train"):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

ADAPTER, TEACHER = "default", "teacher"  # adapter names in PEFT
PREFIX = "transformer"  # diffusers' prefix in the file, for either of two transformers


def target_modules(transformer: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Find the linear layers that a LoRA goes onto, in the blocks with video attention.

    Args:
        targets: "attention" and "feed_forward" stand for the family's layers of these names; any
            other target is the end of a module's name. ValueError for one that matches no layer.
    """
    family = family_of(transformer)
    blocks = tuple(f"{site.name}." for site in family.self_attentions(transformer))
    linear = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(blocks) and ".processor." not in name
    ]
    found: set[str] = set()
    for ending in (end for one in targets for end in family.lora_targets.get(one, (one,))):
        matches = [name for name in linear if f".{name}".endswith(f".{ending}")]
        if not matches:
            ends = {re.sub(r".*?([^.]+(\.\d+)?)$", r"\1", name) for name in linear}
            raise ValueError(
                f"targets: {shown(ending)} is no linear layer in the blocks of "
                f"{type(transformer).__name__}; there are "
                f"{', '.join([*family.lora_targets, *sorted(ends)])}"
            )
        found.update(matches)
    return sorted(found)


def add_lora(transformer: "ModelMixin", config: TrainConfig, recipe: Recipe | None = None) -> None:
    """Add a new LoRA; of the model's own parameters only these train.

    Args:
        recipe: kept in its options; None for a model without values.
    """
    layers = target_modules(transformer, config.targets)
    if config.lora_kind in FACTORED:
        about: dict[str, object] | None = None if recipe is None else {KEY: recipe.to_dict()}
        rank, alpha = config.rank, config.lora_alpha
        made = factored(config.lora_kind, rank=rank, alpha=alpha, layers=layers, about=about)
        transformer.add_adapter(made, ADAPTER)
        return
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.lora_dropout,
        use_dora=config.dora,
        use_rslora=config.rank_stabilised,
        target_modules=layers,
        init_lora_weights=True,
        base_model_name_or_path=None if recipe is None else recipe.base_model,
        auto_mapping=None if recipe is None else {KEY: recipe.to_dict()},
    )
    transformer.add_adapter(lora, ADAPTER)


def check_start(source: str, config: TrainConfig, transformer: "ModelMixin") -> Recipe:
    """Read the recipe of a LoRA to go on from, of the same model, part and guidance."""
    recipe = _recipe_of("init_lora", source, config, transformer)
    if recipe.holds_guidance and recipe.teacher_guidance != held_guidance(config):
        raise ValueError(
            f"init_lora {source} holds a guidance of {recipe.teacher_guidance:g}, this training "
            f"is of {held_guidance(config):g}: start from the LoRA that it was taught by"
        )
    return recipe


def check_teacher(
    config: TrainConfig, transformer: "ModelMixin", trained_frames: int | None
) -> Recipe:
    """Read the recipe of `teacher_lora`, which must run beside the LoRA that trains.

    Args:
        trained_frames: pixel frames that the model was trained on.
    """
    source = config.teacher_lora
    assert source is not None
    recipe = _recipe_of("teacher_lora", source, config, transformer)
    if recipe.holds_guidance and config.teacher_guidance > 1:
        raise ValueError(
            f"teacher_lora {source} holds a guidance of {recipe.teacher_guidance:g} already, "
            f"teacher_guidance is {config.teacher_guidance:g}: leave it out"
        )
    if recipe.lora_kind != config.lora_kind:
        raise ValueError(
            f"teacher_lora {source} is of kind {recipe.lora_kind}, asked for is lora_kind "
            f"{config.lora_kind}: take the same, as they run on the same layers"
        )
    if recipe.levels:
        raise ValueError(
            f"teacher_lora {source} was trained at the noise levels of {len(recipe.levels)} steps "
            "alone, and a teacher is asked at others: take the LoRA that it was taught by"
        )
    teacher_attention(config, recipe)  # refuses what cannot run beside the student
    if trained_frames != recipe.trained_frames:
        raise ValueError(
            f"teacher_lora {source} is for a model of {recipe.trained_frames} frames, "
            f"trained_frames is {trained_frames}"
        )
    longer = [s for s in config.curriculum if s.frames > (trained_frames or 0)]
    rules = {stage.rope for stage in longer} - {recipe.rope}
    if rules:
        raise ValueError(
            f"teacher_lora {source} was trained with the rule {shown(recipe.rope)}, stages ask "
            f"for {', '.join(map(repr, sorted(rules)))}: write its rule in the stages"
        )
    return recipe


def teacher_attention(config: TrainConfig, recipe: Recipe | None) -> tuple[Method, Schedule]:
    """Return the teacher's method, and which of its layers are dense.

    Args:
        recipe: of `teacher_lora`; None without.

    Raises ValueError for a sparse method that goes on from step to step, or with parameters, its
    own or the student's.
    """
    student = method_from(config.method, config.settings)
    schedule = Schedule(dense_layers=config.dense_layers)
    if config.teacher_method is not None:
        method, origin = method_from(config.teacher_method, config.teacher_settings), "is to run"
    elif recipe is not None:
        method, origin = recipe.build_method(), "was trained"
        schedule = Schedule(dense_layers=recipe.build_schedule().dense_layers)
    else:
        return Dense(), schedule
    if method.defines("step_state"):
        raise ValueError(
            f"the teacher {origin} through {shown(method)}, which goes on from step to step, as "
            "single calls of a teacher do not: give teacher_method dense"
        )
    if not method.is_dense and (student.has_parameters or method.has_parameters):
        raise ValueError(
            f"the teacher {origin} through {shown(method)}, and would run with the parameters of "
            f"method {config.method}, which this training changes: give teacher_method dense"
        )
    return method, schedule


def _recipe_of(field: str, source: str, config: TrainConfig, transformer: "ModelMixin") -> Recipe:
    """Read the recipe of a LoRA that must be of the same model and part."""
    recipe = read_recipe(source)
    if recipe.part != config.part:
        raise ValueError(
            f"{field} {source} is of {recipe.part}, asked for is part {config.part}: take a LoRA "
            "of the same part"
        )
    check_base(recipe, transformer)
    return recipe


def held_guidance(config: TrainConfig) -> float:
    """Return the guidance scale that the trained LoRA holds: the teacher's, or that its LoRA holds
    already."""
    if config.teacher_lora is None or config.teacher_guidance > 1:
        return config.teacher_guidance
    return read_recipe(config.teacher_lora).teacher_guidance


def teacher_hash(config: TrainConfig) -> str | None:
    """Hash the weights of `teacher_lora`; None without a teacher's LoRA."""
    return None if config.teacher_lora is None else file_sha256(weights_file(config.teacher_lora))


def check_guidance(config: TrainConfig, transformer: "ModelMixin", boundary: float | None) -> None:
    """Refuse, by a ValueError, a guided teacher for a model that cannot use it, and captions that
    are left out for one whose pipeline calls it with a prompt alone.

    Args:
        boundary: noise level at which a pipeline switches between two transformers.
    """
    is_distilled = family_of(transformer).generation.distilled
    if config.caption_dropout and is_distilled:
        raise ValueError(
            f"caption_dropout is {config.caption_dropout:g}: give 0, as "
            f"{type(transformer).__name__} has its guidance in its weights, and is never called "
            "without a caption"
        )
    if config.teacher_guidance == 1:
        return
    given = f"teacher_guidance is {config.teacher_guidance:g}: leave it out, as"
    if boundary is not None:
        raise ValueError(f"{given} a pipeline of two transformers guides both or none")
    if transformer.config.get("guidance_embeds") or is_distilled:
        raise ValueError(f"{given} {type(transformer).__name__} holds a guidance of its own")


def add_teacher(
    transformer: "ModelMixin", config: TrainConfig, trained_frames: int | None
) -> Recipe:
    """Load `teacher_lora` beside the LoRA that trains; raises as `check_teacher` does."""
    recipe = check_teacher(config, transformer, trained_frames)
    source = str(config.teacher_lora)
    file = weights_file(source)
    if recipe.lora_kind in FACTORED:
        load_factored(transformer, file, recipe, TEACHER)
        transformer.set_adapter(ADAPTER)
        return recipe
    check_fit(f"teacher_lora {source}", transformer, under(PREFIX, load_file(file)), None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two are intended
        transformer.load_lora_adapter(
            str(file.parent),
            weight_name=file.name,
            prefix=PREFIX,
            adapter_name=TEACHER,
            local_files_only=True,
        )
    transformer.set_adapter(ADAPTER)
    return recipe


def lora_state(transformer: "ModelMixin") -> dict[str, Tensor]:
    """Return the LoRA's parameters themselves, not copies, by PEFT's names."""
    return get_peft_model_state_dict(transformer, adapter_name=ADAPTER)


def portable(lora: LoraConfig) -> dict[str, Any]:
    """Return a LoRA's options as JSON, mostly without options at their defaults.

    An older PEFT refuses options that it does not know.
    """
    plain = LoraConfig().to_dict()
    always = "peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in lora.to_dict().items()
        if name in always or value != plain.get(name)
    }


def write_lora(
    folder: Path,
    transformer: "ModelMixin",
    state: dict[str, Tensor],
    processors: Callable[[Path], object] | None,
    recipe: Recipe,
) -> Path:
    """Write the folder, which appears only when it is complete; else an earlier one stays as it
    was. A model card that was edited stays.

    Args:
        state: result of `lora_state`; empty if only the processors trained.
        processors: writes the method's own parameters into a given folder, if it has some.
    """
    check_finite(state, f"the LoRA for {folder}")
    text = json.dumps(recipe.to_dict())
    with replacing(folder) as partial:
        partial.mkdir(parents=True)
        metadata = {"format": "pt", KEY: text}
        if state and recipe.lora_kind not in FACTORED:  # which diffusers would not understand
            lora = portable(transformer.peft_config[ADAPTER])
            lora["auto_mapping"] = {KEY: recipe.to_dict()}
            lora["lora_dropout"] = 0.0  # diffusers leaves the layers that it adds in training mode
            metadata["lora_adapter_metadata"] = json.dumps(
                {f"{PREFIX}.{k}": v for k, v in lora.items()}
            )
        tensors = {
            f"{PREFIX}.{name}": x.detach().to("cpu", torch.float32).contiguous()
            for name, x in state.items()
        }
        save_tensors(tensors, partial / WEIGHTS, metadata)
        write_json(partial / CONFIG, recipe.to_dict())
        (partial / CARD).write_bytes(card_for(folder, recipe))
        if processors is not None:
            processors(partial)
    return folder


def join_experts(high: Path, low: Path, folder: Path) -> Path:
    """Write the LoRAs of two experts into one folder, the second into the subfolder of its part.

    Args:
        high, low: folders of the LoRAs for high and for low noise.
    """
    with replacing(folder) as partial:
        for source, target in ((high, partial), (low, partial / SECOND)):
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(CARD))
            recipe = replace(read_recipe(source), parts=PARTS)
            tensors, metadata = read_tensors(source / WEIGHTS)
            metadata[KEY] = json.dumps(recipe.to_dict())
            if "lora_adapter_metadata" in metadata:
                lora = json.loads(metadata["lora_adapter_metadata"])
                lora[f"{PREFIX}.auto_mapping"] = {KEY: recipe.to_dict()}
                metadata["lora_adapter_metadata"] = json.dumps(lora)
            save_tensors(tensors, target / WEIGHTS, metadata)
            write_json(target / CONFIG, recipe.to_dict())
        (partial / CARD).write_bytes(card_for(folder, read_recipe(partial)))
    return folder


def load_into(transformer: "ModelMixin", folder: str | Path, config: TrainConfig) -> None:
    """Start a new LoRA from one that was trained before, with the same predictions.

    The new LoRA may have a higher rank or more targets.
    """
    recipe = check_start(str(folder), config, transformer)
    if not recipe.rank:
        raise ValueError(f"init_lora {folder} holds no LoRA, its method's parameters alone")
    alpha = config.lora_alpha
    share = scale_of(1.0, config.rank, config.rank_stabilised)
    weight = scale_of(recipe.alpha, recipe.rank, recipe.rank_stabilised)
    if not math.isclose(weight, alpha * share, rel_tol=1e-6):
        raise ValueError(
            f"init_lora {folder} has alpha {recipe.alpha:g} at rank {recipe.rank}, asked for is "
            f"{alpha:g} at {config.rank}: the same weight is alpha {weight / share:g}"
        )
    if recipe.lora_kind != config.lora_kind:
        raise ValueError(
            f"init_lora {folder} is of kind {recipe.lora_kind}, asked for is lora_kind "
            f"{config.lora_kind}: take the same"
        )
    if recipe.dora != config.dora:
        raise ValueError(
            f"init_lora {folder} was trained with dora {recipe.dora}, asked for is {config.dora}: "
            "take the same"
        )
    saved = load_file(weights_file(folder))
    own = lora_state(transformer)
    given = under(PREFIX, saved)
    wrong = [
        name
        for name, x in sorted(given.items())  # of the same or a lower rank
        if name not in own
        or x.dim() != own[name].dim()
        or any(a > b for a, b in zip(x.shape, own[name].shape, strict=True))
        or (recipe.lora_kind in FACTORED and x.shape != own[name].shape)
    ]
    if wrong:
        raise ValueError(
            f"init_lora {folder} has rank {recipe.rank} on {', '.join(recipe.targets)}, asked for "
            f"are {config.rank} on {', '.join(config.targets)}; there is no room for {wrong[0]}"
        )
    with torch.no_grad():
        for name, x in given.items():
            own[name][tuple(map(slice, x.shape))] = x


def load_branches(branches: Mapping[str, nn.Module], folder: str | Path) -> None:
    """Load the method's own parameters from the folder of a LoRA, if it has some."""
    given = expanded(folder)
    path = (given.parent if given.is_file() else given) / FILE
    if not branches or not path.is_file():
        return
    saved = load_file(path)
    for layer, branch in branches.items():
        for name, parameter in branch.state_dict().items():
            held = saved.get(f"{layer}.{name}")
            if held is None or held.shape != parameter.shape:
                raise ValueError(
                    f"init_lora {folder} has no {layer}.{name} of {tuple(parameter.shape)}: its "
                    "method or its dense layers differ"
                )
            parameter.copy_(held)


def weights_file(given: str | Path) -> Path:
    """Return the weights file of a LoRA given by its folder or its file."""
    path = expanded(given)
    return path if path.is_file() else path / WEIGHTS
