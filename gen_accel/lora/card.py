"""Model card of a trained adapter: README.md in its folder, which hubs show as the first page.

A card holds numbers of the training and commands that use the result. Paths, captions and names of
clips stay out of it. The license is left to whoever publishes the adapter.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen_accel.attention_processors.attached.recipe import Recipe
from gen_accel.attention_processors.methods.options import method_of_file, saved_options
from gen_accel.demo import NAME
from gen_accel.extras import needed_for
from gen_accel.hub import REPOSITORY
from gen_accel.paths import expanded

CARD = "README.md"
LIBRARY, TASK, OURS = "diffusers", "text-to-video", "gen_accel"
FROM_IMAGE = "image-to-video"  # task of a LoRA that was trained from first frames
KEPT = "<!-- written by gen_accel; a card that was edited is kept: {} -->"
LOADED_ALONE = ("HunyuanVideo15Transformer3DModel",)  # whose pipelines load no LoRA
UNKNOWN = "MODEL"  # stands for a base model that is not public
_CONDITIONS = {
    "first_frame": "caption and first frame",
    "either": "caption, and some by their first frame too",
}
DIGITS = 16  # of the hash in `KEPT`


def card_for(
    folder: Path,
    recipe: Recipe,
    *,
    image: bool = False,
    license: str | None = None,
    figures: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the card of an adapter that is written to `folder`, in UTF-8.

    A README.md that is there already and was edited, or is from elsewhere, is returned as it is.

    Args:
        image: the adapter is an image prompt; else it is a LoRA.
        license: identifier such as "apache-2.0"; None leaves it to the user.
        figures: measured values by name, such as {"PSNR against dense, dB": 24.4}.
    """
    text = new_card(recipe, image=image, license=license, figures=figures).encode()
    earlier = folder / CARD
    if earlier.is_file() and not is_ours(held := earlier.read_bytes()):
        return held
    return text


def is_ours(card: bytes) -> bool:
    """Whether a card is as `new_card` wrote it."""
    text, _, mark = card.decode("utf-8", "replace").rstrip("\n").rpartition("\n")
    return mark == KEPT.format(_hash(text + "\n"))


def new_card(
    recipe: Recipe,
    *,
    image: bool = False,
    license: str | None = None,
    figures: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a new card; arguments are as for `card_for`."""
    with needed_for("a model card", extra="train"):
        from huggingface_hub import ModelCardData

    base = public_name(recipe.base_model)
    task = TASK if recipe.condition == "text" else FROM_IMAGE
    about = ModelCardData(
        license=license,
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        library_name=LIBRARY,
        pipeline_tag=task,
        tags=["image-prompt" if image else "lora", task, OURS],
    )
    parts = [
        _image_intro(recipe) if image else _lora_intro(recipe),
        "## Recipe\n\n" + _table(_rows(recipe, image)),
        "## Use\n\n" + (_image_use(recipe) if image else _lora_use(recipe)),
    ]
    if figures:
        parts.append("## Figures\n\n" + _table(dict(figures)))
    text = f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n\n"
    return f"{text}{KEPT.format(_hash(text))}\n"


def public_name(base_model: str) -> str | None:
    """Name of the base model on the hub; None for a folder, whose path stays private, and for the
    embedded demo model."""
    if base_model == NAME or not REPOSITORY.fullmatch(base_model):
        return None
    return None if expanded(base_model).exists() else base_model


def _lora_intro(recipe: Recipe) -> str:
    longer = recipe.trained_frames is not None and recipe.frames > recipe.trained_frames
    title = f"LoRA for videos of {recipe.frames} frames" if longer else "LoRA for video"
    what = "A LoRA" if recipe.rank else "Parameters of an attention method"
    return (
        f"# {title}\n\n{what} for `{recipe.transformer['class']}`, trained with gen_accel through "
        f"the attention `{recipe.method}`."
    )


def _image_intro(recipe: Recipe) -> str:
    return (
        f"# Image prompt\n\nLayers by which `{recipe.transformer['class']}` follows an image "
        "beside its text, trained with gen_accel. The model itself is unchanged."
    )


def _rows(recipe: Recipe, image: bool) -> dict[str, Any]:
    model = "the demo model of gen_accel" if recipe.base_model == NAME else "a folder"
    shown = {
        "base model": public_name(recipe.base_model) or model,
        "part": _both(recipe) if recipe.others else recipe.part,
        "attention": f"`{recipe.method}` {_options(recipe)}".strip(),
        "dense layers, dense steps": _dense(recipe),
        "frames, height, width": f"{recipe.frames}, {recipe.height}, {recipe.width}",
        "frames that the model was made for": recipe.trained_frames,
        "rule of positions": recipe.rope,
        "curriculum, frames:steps": ", ".join(recipe.stages),
        f"optimizer steps{f' of {recipe.part}' if recipe.others else ''}": recipe.steps,
        "clips": recipe.clips,
        "clips a step": recipe.batch,
        "objective": recipe.objective,
        "clips were given by": _CONDITIONS.get(recipe.condition),
    }
    if not image:
        shown |= {
            "rank, alpha": f"{recipe.rank}, {recipe.alpha:g}{_kind(recipe)}",
            "targets": ", ".join(recipe.targets) if recipe.rank else "none",
        }
    if recipe.holds_guidance:
        shown["guidance that it holds"] = f"{recipe.teacher_guidance:g}"
    if recipe.techniques:
        shown["sampled with"] = ", ".join(f"`{one}`" for one in recipe.techniques)
    return {name: value for name, value in shown.items() if value is not None}


def _both(recipe: Recipe) -> str:
    other = ", ".join(recipe.others)
    return f"{recipe.part}; {other} of the same run lies in `{other}/`"


def _dense(recipe: Recipe) -> str:
    return ", ".join(str(recipe.schedule.get(f"dense_{of}", 0)) for of in ("layers", "steps"))


def _kind(recipe: Recipe) -> str:
    """Words after rank and alpha, for a LoRA that is more than its two matrices."""
    words = {"DoRA": recipe.dora, "rank-stabilised": recipe.rank_stabilised}
    return "".join(f", {word}" for word, applies in words.items() if applies)


def _options(recipe: Recipe) -> str:
    """Options that differ from the method's defaults, without any that may be a path."""
    plain = saved_options(method_of_file(recipe.method, {}))
    changed = {
        name: value
        for name, value in recipe.options.items()
        if value != plain.get(name) and isinstance(value, bool | int | float | str)
    }
    safe = {k: v for k, v in changed.items() if not (isinstance(v, str) and set(v) & set("/\\~"))}
    return ", ".join(f"`{name}={value}`" for name, value in safe.items())


def _lora_use(recipe: Recipe) -> str:
    second = ", load_into_transformer_2=True" if recipe.part == "transformer_2" else ""
    loader, loaded = "load_lora_weights", f'pipe.load_lora_weights("lora"{second})'
    if recipe.transformer.get("class") in LOADED_ALONE:
        loader = "load_lora_adapter"
        loaded = f'pipe.transformer.{loader}("lora", prefix="transformer")'
    made = "pipe"
    longer = []
    if recipe.techniques:
        named = ", ".join(f'"{one}"' for one in recipe.techniques)
        longer = [f"longer = gen_accel.extend(pipe, [{named}], num_frames={recipe.frames})"]
        made = "longer"
    both = [
        f'pipe.load_lora_weights("lora/{part}", load_into_{part}=True)' for part in recipe.others
    ]
    lines = [
        *([loaded, *both] if recipe.rank else []),
        'handle = gen_accel.attach(pipe, from_lora="lora")',
        *longer,
        *(_call(recipe, made) if recipe.condition == "text" else []),
    ]
    parts = [
        _fetched(recipe, "lora"),
        _python(recipe, lines),
        "`attach` brings the attention and the rule of positions that it was trained with.",
    ]
    if recipe.condition != "text":
        parts.append(
            "It is for videos that begin with a given picture: call the model's pipeline for "
            "image to video, with `image`."
        )
    if recipe.part == "transformer":
        parts += ["On the command line:", _command(recipe)]
    if recipe.rank:
        without = "" if recipe.rope == "none" else " and no rule of positions"
        parts.append(
            f"Without gen_accel it is a LoRA like any other: `{loader}` alone"
            f"{', once for each expert' if recipe.others else ''}, with the "
            f"model's own dense attention{without}."
        )
    if recipe.holds_guidance:
        parts.append("It is called with `guidance_scale=1`.")
    return "\n\n".join(parts)


def _image_use(recipe: Recipe) -> str:
    lines = [
        'prompt = gen_accel.load_image_prompt(pipe, "image_prompt")',
        'prompt.set_image("image.png")',
        *_call(recipe, frames=max(recipe.frames, recipe.trained_frames or 0)),
    ]
    return "\n\n".join([_fetched(recipe, "image_prompt"), _python(recipe, lines)])


def _fetched(recipe: Recipe, folder: str) -> str:
    text = f"`{folder}` is this folder, as `hf download OWNER/NAME --local-dir {folder}` brings it"
    if _model(recipe) == UNKNOWN:
        text += f", and `{UNKNOWN}` the base model"
    return f'{text}. gen_accel is installed by `pip install "gen_accel[cli,video]"`.'


def _python(recipe: Recipe, lines: list[str]) -> str:
    model = _model(recipe)
    loaded = "gen_accel.demo.path()" if model == NAME else f'"{model}"'
    start = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        "import gen_accel",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({loaded}, torch_dtype=torch.bfloat16)",
    ]
    return _fenced("python", [*start, *lines])


def _command(recipe: Recipe) -> str:
    image = "--image first.png " if recipe.condition != "text" else ""
    size = f"--frames {recipe.frames} --height {recipe.height} --width {recipe.width}"
    return _fenced(
        "bash",
        [
            f'gen-accel generate --model {_model(recipe)} --prompt "{example_prompt(recipe)}" \\',
            f"    {size} {image}--from-lora lora --out video.mp4",
        ],
    )


def _call(recipe: Recipe, made: str = "pipe", frames: int | None = None) -> list[str]:
    """Lines that generate a video of the size of the clips that were trained on."""
    guided = ", guidance_scale=1.0" if recipe.holds_guidance else ""
    size = {
        "num_frames": frames or recipe.frames,
        "height": recipe.height,
        "width": recipe.width,
    }
    return [
        f"size = {json.dumps(size)}",
        f'video = {made}("{example_prompt(recipe)}", **size{guided}).frames[0]',
    ]


def _model(recipe: Recipe) -> str:
    """Base model as a command takes it."""
    return NAME if recipe.base_model == NAME else public_name(recipe.base_model) or UNKNOWN


def example_prompt(recipe: Recipe) -> str:
    """A prompt of no training clip. The demo model knows few words."""
    return "a red square moves left slowly" if recipe.base_model == NAME else "a cat surfs"


def _fenced(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
