"""Model cards, and uploads to the hub."""

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from torch import Tensor

from gen_accel.attention_processors.attached import storage
from gen_accel.attention_processors.attached.recipe import (
    CONFIG,
    WEIGHTS,
    Recipe,
    folders_of,
    parse,
    read_recipe,
)
from gen_accel.attention_processors.methods.registry import method_of_file, saved_options
from gen_accel.demo import NAME
from gen_accel.hub import REPOSITORY, check_repository, silenced
from gen_accel.io import fields_of, named, not_finite, read_fields, read_tensors, replacing
from gen_accel.paths import expanded
from gen_accel.pipelines.image_prompt import formats
from gen_accel.pipelines.tuning.preset import KIND, Preset, read_preset, read_profile
from gen_accel.registry import needed_for

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


LORA, IMAGE_PROMPT, PRESET = "LoRA", "image prompt", "preset"
INSIDE = ("lora", "image_prompt")  # of a training's OUT and of a checkpoint
LICENSE = "license"  # field of a card's head


@dataclass(frozen=True)
class Push:
    """Result of an upload, or of a dry run of it.

    Args:
        kind: "LoRA", "image prompt" or "preset".
        files: sizes in bytes by name, the card included.
        left_out: names in the folder that are not uploaded; folders end in "/".
        card: text of the card.
        is_new_card: whether the card is made by this upload, as the folder has none.
        notes: what a reader of the repository will miss, or will see that may be private.
        url: address of the commit; None for a dry run.
    """

    repository: str
    kind: str
    files: dict[str, int]
    left_out: tuple[str, ...]
    card: str
    is_new_card: bool
    notes: tuple[str, ...]
    url: str | None = None


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    message: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Upload a LoRA, an image prompt or presets to the hub, in one commit.

    Only files that gen_accel wrote are taken: safetensors, JSON and the card README.md. The
    repository is created where it is missing. A folder without a card gets one, as training
    writes it.

    Args:
        folder: `OUT/lora` or `OUT/image_prompt` of a training, or a folder of presets.
        repository: OWNER/NAME on the hub.
        private: create a private repository; a public one of that name is refused.
        message: of the commit.
        dry_run: check the folder and list what would be uploaded. Needs no network and no token.

    Raises:
        FileNotFoundError: no such folder, or a file of the artefact is missing.
        ValueError: a name that the hub does not take, a folder that holds nothing whole, or a
            public repository where a private one is asked for.
        PermissionError: no token, or one that may not write there.
        OSError: the hub cannot be reached.
    """
    with needed_for("an upload", extra="train"):
        from huggingface_hub import get_token

    check_repository(repository)
    place = expanded(folder)
    found = _found(place, repository)
    if not dry_run and not get_token():
        raise PermissionError(
            "there is no token for the hub: run `hf auth login`, or set HF_TOKEN to one that may "
            f"write to {repository}"
        )
    if dry_run:
        return found
    if found.is_new_card:
        with replacing(place / CARD) as partial:
            partial.write_text(found.card, encoding="utf-8")
    said = message or f"Upload {found.kind} with gen_accel"
    return replace(found, url=_uploaded(place, repository, [*found.files], private, said))


def _found(folder: Path, repository: str) -> Push:
    """Find the artefact in a folder, and check that it is whole."""
    if not folder.is_dir():
        what = "it is a file" if folder.exists() else "there is none"
        raise FileNotFoundError(f"{folder} must be a folder to upload, but {what}")
    kind, names, base, new = _artefact(folder)
    there = (folder / CARD).is_file()
    card = _text(folder / CARD) if there else new
    files = {name: (folder / name).stat().st_size for name in names}
    files[CARD] = (folder / CARD).stat().st_size if there else len(card.encode())
    left_out = tuple(
        f"{path.name}/" if path.is_dir() else path.name
        for path in sorted(folder.iterdir())
        if not any(path.name == name.partition("/")[0] for name in files)
    )
    inner = sorted({name.partition("/")[0] for name in files if "/" in name})
    left_out += tuple(
        f"{part}/{path.name}"
        for part in inner
        for path in sorted((folder / part).iterdir())
        if f"{part}/{path.name}" not in files
    )
    notes = (*_notes_on_card(folder, card), *_notes_on_privacy(folder, names, base))
    return Push(repository, kind, files, left_out, card, not there, notes)


def _artefact(folder: Path) -> tuple[str, list[str], str | None, str]:
    """Return kind, file names, base model as recorded, and the text of a new card."""
    if (folder / WEIGHTS).is_file():
        names = []
        recipe = read_recipe(folder)
        for part, place in folders_of(folder).items():
            _check_lora(place)
            within = "" if part == recipe.part else f"{part}/"
            names += [f"{within}{name}" for name in (WEIGHTS, CONFIG)]
            if (place / storage.CONFIG).is_file():
                names += [f"{within}{name}" for name in (storage.CONFIG, storage.WEIGHTS)]
        return LORA, names, recipe.base_model, new_card(recipe)
    if (folder / formats.WEIGHTS).is_file():
        recipe = _check_image_prompt(folder)
        names = [formats.WEIGHTS, CONFIG]
        return IMAGE_PROMPT, names, recipe.base_model, new_card(recipe, image=True)
    if presets := _presets(folder):
        names = [name for path, preset in presets.items() for name in _check_preset(path, preset)]
        return PRESET, sorted({*names}), None, _preset_card(presets)
    inside = [f"{folder / name}" for name in INSIDE if (folder / name).is_dir()]
    hint = f"; did you mean {' or '.join(inside)}?" if inside else ""
    raise FileNotFoundError(
        f"{folder} holds no LoRA, image prompt or preset to upload: give the folder lora or "
        f"image_prompt of a training, or a folder of presets{hint}"
    )


def _check_lora(folder: Path) -> Recipe:
    recipe = read_recipe(folder)
    _check_same(folder, recipe)
    tensors, _ = read_tensors(folder / WEIGHTS)
    if recipe.rank and not tensors:
        raise ValueError(f"{folder / WEIGHTS} holds no tensors, its recipe says {recipe.rank=}")
    _check_numbers(folder / WEIGHTS, tensors)
    needed = recipe.build_method().has_branch
    there = [name for name in (storage.CONFIG, storage.WEIGHTS) if (folder / name).is_file()]
    if needed or there:
        _check_processors(folder)
    return recipe


def _check_processors(folder: Path) -> None:
    for name in (storage.CONFIG, storage.WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: train again, or copy it there")
    named = read_fields(folder / storage.CONFIG).get("sha256")
    if named != storage.file_sha256(folder / storage.WEIGHTS):
        raise ValueError(
            f"{folder / storage.WEIGHTS} is not the file that {storage.CONFIG} was written with"
        )


def _check_image_prompt(folder: Path) -> Recipe:
    file = formats.read_adapter(folder)
    if "recipe" not in file.metadata:
        raise ValueError(f"{folder / formats.WEIGHTS} has no recipe: it was not trained here")
    recipe = parse(file.metadata["recipe"], folder / formats.WEIGHTS)
    _check_numbers(folder / formats.WEIGHTS, read_tensors(folder / formats.WEIGHTS)[0])
    held = _read(folder / CONFIG).get("recipe")
    if fields_of(held, folder / CONFIG) != file.metadata["recipe"]:
        raise ValueError(f"{folder / CONFIG} is of another training than {formats.WEIGHTS}")
    return recipe


def _check_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if wrong := not_finite(tensors):
        raise ValueError(f"{path} holds NaN or infinity in {named(wrong)}: train again")


def _check_same(folder: Path, recipe: Recipe) -> None:
    """Refuse a recipe for people that is not the recipe of the weights."""
    if parse(_read(folder / CONFIG), folder / CONFIG) != recipe:
        raise ValueError(f"{folder / CONFIG} is of another training than {WEIGHTS}")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the whole folder of the training")
    return read_fields(path)


def _presets(folder: Path) -> dict[Path, Preset]:
    """Map the files of presets in a folder to them; other JSON is passed over."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            if read_fields(path).get("gen_accel") != KIND:
                continue
        except ValueError:
            continue
        found[path] = read_preset(path)
    return found


def _check_preset(path: Path, preset: Preset) -> list[str]:
    """Return the names of a preset's files, all of which are there and whole."""
    names = [path.name]
    if preset.profile is not None:
        read_profile(preset, path.parent)
        names.append(preset.profile["file"])
    beside = path.parent.glob(f"{glob.escape(path.stem)}.????????.safetensors")
    return [*names, *(file.name for file in beside)]


def _preset_card(presets: Mapping[Path, Preset]) -> str:
    from huggingface_hub import ModelCardData

    head = ModelCardData(library_name="diffusers", tags=["text-to-video", "gen_accel", "preset"])
    rows = ["| preset | model | steps | density |", "|---|---|---|---|"]
    for path, one in presets.items():
        kind = one.made_for.transformer["class"]
        rows.append(f"| `{path.name}` | `{kind}` | {one.method.steps} | {one.density:.3f} |")
    name = next(iter(presets)).name
    use = f'gen-accel generate --model MODEL --prompt "a cat surfs" --preset {name} --out cat.mp4'
    return (
        f"---\n{head.to_yaml()}\n---\n\n# Presets of gen_accel\n\nWhich attention runs in each "
        "head, layer and step, tuned by `gen-accel tune`.\n\n" + "\n".join(rows) + "\n\n"
        f"`hf download OWNER/NAME --local-dir presets` brings them.\n\n```bash\n{use}\n```\n"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8") from None


def _notes_on_card(folder: Path, card: str) -> Iterator[str]:
    """Check a card's head, and say what it lacks.

    Raises ValueError for a head that is no YAML, which the hub refuses.
    """
    import yaml
    from huggingface_hub import ModelCard

    try:
        held = ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"the head of {folder / CARD}, between its lines ---, is no YAML of names with "
            f"values: {said}"
        ) from None
    if not held.get(LICENSE):
        yield (
            f"the card names no license, so that nobody may use the upload: add a line such as "
            f"`{LICENSE}: apache-2.0` below the first --- of {CARD}"
        )


def _notes_on_privacy(folder: Path, names: list[str], base: str | None) -> Iterator[str]:
    """Name values in the JSON files that readers will see: folders of this machine, prompts."""
    for name in names:
        if not name.endswith(".json"):
            continue
        held = read_fields(folder / name)
        paths = sorted({text for text in _texts(held) if _is_path(text)})
        if (
            base is not None
            and name.rpartition("/")[2] == CONFIG
            and base not in paths
            and expanded(base).exists()
        ):
            paths.append(base)
        if paths:
            yield f"{name} names folders of this machine: {', '.join(paths)}"
        if isinstance(held.get("made_by"), dict) and held["made_by"].get("prompts"):
            yield f"{name} holds the prompts that it was tuned on"


def _texts(data: Any) -> Iterator[str]:
    match data:
        case str():
            yield data
        case dict():
            for value in data.values():
                yield from _texts(value)
        case list():
            for value in data:
                yield from _texts(value)


def _is_path(text: str) -> bool:
    return Path(text).is_absolute() or text[:1] == "~" or PureWindowsPath(text).is_absolute()


def _uploaded(folder: Path, repository: str, names: list[str], private: bool, message: str) -> str:
    """Create the repository where it is missing, and commit the files. Returns the address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        with silenced("huggingface_hub"):
            # An organisation may have a default of its own, which None leaves.
            api.create_repo(repository, private=private or None, exist_ok=True)
            is_public = private and not api.model_info(repository).private
            if not is_public:
                commit = api.upload_folder(
                    repo_id=repository,
                    folder_path=folder,
                    commit_message=message,
                    allow_patterns=[glob.escape(name) for name in names],
                )
                return str(commit.commit_url)
    except Exception as error:
        raise _refused(repository, error) from error
    raise ValueError(f"{repository} is there already and public: make it private, or take another")


def _refused(repository: str, error: Exception) -> OSError:
    """Make the one line of an upload that failed."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return OSError(f"{repository} is not uploaded, as HF_HUB_OFFLINE is set: unset it")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        return PermissionError(
            f"the hub's token may not write to {repository}: run `hf auth login` with one that may"
        )
    cause = error.__cause__ or error
    said = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
    return OSError(f"{repository} is not uploaded ({said}): try again where the hub is reachable")
