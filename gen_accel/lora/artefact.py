"""What a training leaves: a folder that diffusers loads as it loads any LoRA.

pytorch_lora_weights.safetensors   with alpha, rank and the recipe in its metadata
gen_accel.json                     the recipe, to be read
processors.json, .safetensors      the method's own parameters, where it has some
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.options import method_from
from gen_accel.lora.config import TrainConfig
from gen_accel.measure.report import write_json
from gen_accel.measure.video_io import replacing
from gen_accel.pipelines.recipe import CONFIG, KEY, WEIGHTS, Recipe, check_base, read_recipe
from gen_accel.pipelines.storage import WEIGHTS as PROCESSORS

ADAPTER, TEACHER = "default", "teacher"  # of PEFT
PREFIX = "transformer"  # what diffusers calls it in the file, whichever of two it is


def target_modules(transformer: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """The linear layers that a LoRA goes onto, all of them in the blocks with video attention.

    Args:
        targets: "attention" and "feed_forward" stand for what the family has under these names;
            anything else is the end of a module's name.

    Raises:
        ValueError: a target that matches no linear layer.
    """
    family: Any = family_of(transformer)
    blocks = tuple(f"{site.name}." for site in family.self_attentions(transformer))
    linear = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(blocks) and ".processor." not in name
    ]
    found: list[str] = []
    for target in targets:
        endings = family.LORA_TARGETS.get(target, (target,))
        for ending in endings:
            matches = [n for n in linear if n == ending or n.endswith(f".{ending}")]
            if not matches:
                known = ", ".join([*family.LORA_TARGETS, *sorted({_ending(n) for n in linear})])
                raise ValueError(
                    f"targets: {ending!r} is no linear layer in the blocks of "
                    f"{type(transformer).__name__}; there are {known}"
                )
            found += matches
    return sorted(set(found))


def add_lora(transformer: Any, config: TrainConfig, recipe: Recipe) -> None:
    """A new LoRA of float32 parameters, the only ones of the model itself that train."""
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.lora_dropout,
        target_modules=target_modules(transformer, config.targets),
        init_lora_weights=True,
        base_model_name_or_path=recipe.base_model,
        auto_mapping={KEY: recipe.to_dict()},
    )
    transformer.add_adapter(lora, ADAPTER)


def check_teacher(config: TrainConfig, transformer: Any) -> Recipe:
    """What is known of `teacher_lora`.

    Raises:
        FileNotFoundError: no LoRA there.
        ValueError: of another model, or one that cannot run beside what trains: through another
            sparse attention, with parameters of the method, or under another rule of positions.
    """
    source = config.teacher_lora
    assert source is not None
    recipe = read_recipe(source)
    check_base(recipe, transformer)
    method = method_from(config.method, config.settings)
    if hasattr(method, "branch"):
        raise ValueError(
            f"teacher_lora does not go with method {config.method}: its parameters would be the "
            "teacher's too"
        )
    theirs = recipe.build_method(), recipe.build_schedule().dense_layers
    if recipe.method != "dense" and theirs != (method, config.dense_layers):
        raise ValueError(
            f"teacher_lora {source} runs through {theirs[0]!r} with {theirs[1]} dense layers, "
            f"asked for is {method!r} with {config.dense_layers}: take its attention, or a "
            "teacher trained with method dense"
        )
    rules = {stage.rope for stage in config.curriculum} - {recipe.rope}
    if rules:
        raise ValueError(
            f"teacher_lora {source} was trained with the rule {recipe.rope!r}, stages ask for "
            f"{', '.join(map(repr, sorted(rules)))}"
        )
    return recipe


def add_teacher(transformer: Any, config: TrainConfig) -> Recipe:
    """Load `teacher_lora` beside the LoRA that trains; raises as `check_teacher` does."""
    recipe = check_teacher(config, transformer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two are meant
        transformer.load_lora_adapter(
            str(_folder(config.teacher_lora)),  # pyright: ignore[reportArgumentType]
            weight_name=WEIGHTS,
            prefix=PREFIX,
            adapter_name=TEACHER,
            local_files_only=True,
        )
    transformer.set_adapter(ADAPTER)
    return recipe


def lora_state(transformer: Any) -> dict[str, Tensor]:
    """As PEFT names it, with the parameters themselves."""
    return get_peft_model_state_dict(transformer, adapter_name=ADAPTER)


def write_lora(
    folder: Path,
    transformer: Any,
    state: dict[str, Tensor],
    processors: Any | None,
    recipe: Recipe,
) -> Path:
    """Write the folder, which appears when it is whole.

    Args:
        state: of `lora_state`; empty where the processors trained alone.
        processors: writes the method's own parameters into the folder it is given; None where it
            has none.
    """
    text = json.dumps(recipe.to_dict())
    with replacing(folder) as partial:
        partial.mkdir(parents=True)
        metadata = {"format": "pt", KEY: text}
        if state:
            lora = transformer.peft_config[ADAPTER].to_dict()
            lora["auto_mapping"] = {KEY: recipe.to_dict()}
            lora["lora_dropout"] = 0.0  # diffusers leaves the layers that it adds in training mode
            metadata["lora_adapter_metadata"] = json.dumps(
                {f"{PREFIX}.{k}": sorted(v) if isinstance(v, set) else v for k, v in lora.items()}
            )
        tensors = {
            f"{PREFIX}.{name}": x.detach().to("cpu", torch.float32).contiguous()
            for name, x in state.items()
        }
        save_file(tensors, partial / WEIGHTS, metadata=metadata)
        write_json(partial / CONFIG, recipe.to_dict())
        if processors is not None:
            processors(partial)
    return folder


def load_into(transformer: Any, folder: str | Path, config: TrainConfig) -> None:
    """Start a new LoRA from one that was trained before.

    Raises:
        FileNotFoundError: no LoRA there.
        ValueError: of another base model, or with another rank or other targets.
    """
    recipe = read_recipe(folder)
    check_base(recipe, transformer)
    alpha = float(config.rank if config.alpha is None else config.alpha)
    if recipe.rank == config.rank and recipe.alpha != alpha:
        raise ValueError(f"init_lora {folder} has alpha {recipe.alpha:g}, asked for is {alpha:g}")
    saved = load_file(_folder(folder) / WEIGHTS)
    own = lora_state(transformer)
    given = {name.removeprefix(f"{PREFIX}."): x for name, x in saved.items()}
    wrong = sorted({n for n, x in own.items() if n not in given or given[n].shape != x.shape})
    wrong += sorted(given.keys() - own.keys())
    if wrong:
        raise ValueError(
            f"init_lora {folder} has rank {recipe.rank} on {', '.join(recipe.targets)}, asked for "
            f"are {config.rank} on {', '.join(config.targets)}; it differs in {wrong[0]}"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name])


def load_branches(branches: Mapping[str, nn.Module], folder: str | Path) -> None:
    """Start the method's own parameters from those that lie beside a LoRA, if there are any.

    Raises:
        ValueError: some are missing there or of another shape.
    """
    path = _folder(folder) / PROCESSORS
    if not branches or not path.is_file():
        return
    saved = load_file(path)
    for layer, branch in branches.items():
        for name, parameter in branch.state_dict().items():
            given = saved.get(f"{layer}.{name}")
            if given is None or given.shape != parameter.shape:
                raise ValueError(
                    f"init_lora {folder} has no {layer}.{name} of {tuple(parameter.shape)}: its "
                    "method or its dense layers differ"
                )
            parameter.copy_(given)


def _folder(given: str | Path) -> Path:
    """Of a LoRA given by its folder or its file."""
    path = Path(given).expanduser()
    return path.parent if path.is_file() else path


def _ending(name: str) -> str:
    """ "blocks.3.attn1.to_out.0" to "to_out.0"."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
