"""Model cards, and uploads to the hub."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from gen_accel.attention_processors.attached import storage
from gen_accel.attention_processors.attached.recipe import (
    CONFIG,
    WEIGHTS,
    Recipe,
    folders_of,
    parse,
    read_recipe,
)
from gen_accel.attention_processors.methods.registry import method_of_file, options_of
from gen_accel.demo import NAME
from gen_accel.hub import REPOSITORY, check_repository, silenced
from gen_accel.io import fields_of, named, not_finite, read_fields, read_tensors, replacing
from gen_accel.parsing import is_told
from gen_accel.paths import expanded, model_named
from gen_accel.pipelines.image_prompt import formats
from gen_accel.pipelines.tuning.preset import KIND, Preset, read_preset, read_profile
from gen_accel.registry import needed_for

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD = "README.md"
# By the condition of the training.
TASK, FROM_IMAGE, FROM_VIDEO = "text-to-video", "image-to-video", "video-to-video"
KEPT = "<!-- written by gen_accel; a card that was edited is kept: {} -->"
DIGITS = 16  # of the hash in `KEPT`
LOADED_ALONE = ("HunyuanVideo15Transformer3DModel",)  # whose pipelines load no LoRA
LORA, IMAGE_PROMPT, PRESET = "LoRA", "image prompt", "preset"
TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')  # in JSON
INSIDE = ("lora", "image_prompt")  # of a training's OUT and of a checkpoint


def card_for(folder: Path, recipe: Recipe, *, image: bool = False) -> bytes:
    """Return the card of an adapter that is written to `folder`, in UTF-8.

    A README.md that is there already and was edited, or is from elsewhere, is returned as it is.

    Args:
        image: the adapter is an image prompt; else it is a LoRA.
    """
    earlier = folder / CARD
    if earlier.is_file() and not is_ours(held := earlier.read_bytes()):
        return held
    return new_card(recipe, image=image).encode()


def is_ours(card: bytes) -> bool:
    """Whether a card is as `new_card` wrote it."""
    text, _, mark = card.decode("utf-8", "replace").rstrip("\n").rpartition("\n")
    return mark == KEPT.format(_hash(text + "\n"))


def new_card(
    recipe: Recipe,
    *,
    image: bool = False,
    license: str | None = None,
    figures: Mapping[str, float] | None = None,
) -> str:
    """Return the text of a new card.

    Args:
        image: see `card_for`.
        license: identifier such as "apache-2.0"; None leaves it to the user.
        figures: measured values by name, such as {"PSNR against dense, dB": 24.4}.
    """
    with needed_for("a model card", extra="train"):
        from huggingface_hub import ModelCardData
    base = public_name(recipe.base_model)
    task = {"text": TASK, "control": FROM_VIDEO}.get(recipe.condition, FROM_IMAGE)
    about = ModelCardData(
        license=license,
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        library_name="diffusers",
        pipeline_tag=task,
        tags=["image-prompt" if image else "lora", task, "gen_accel"],
    )
    alone = recipe.transformer.get("class") in LOADED_ALONE
    loader = "load_lora_adapter" if alone else "load_lora_weights"
    text = _rendered(
        "card.md.j2",
        about,
        recipe=recipe,
        image=image,
        options=_options(recipe),
        figures=figures,
        is_demo=recipe.base_model == NAME,
        base=base,
        prompt=example_prompt(recipe),
        is_longer=recipe.trained_frames is not None and recipe.frames > recipe.trained_frames,
        loader=loader if recipe.lora_kind == "lora" else "add_loras",
        frames=max(recipe.frames, recipe.trained_frames or 0) if image else recipe.frames,
    )
    text += "\n"
    return f"{text}{KEPT.format(_hash(text))}\n"


def _rendered(template: str, about: "ModelCardData", **values: Any) -> str:
    from huggingface_hub import ModelCard

    path = str(Path(__file__).with_name(template))
    card = ModelCard.from_template(about, template_path=path, **values)
    return str(card).rstrip("\n") + "\n"


def public_name(base_model: str) -> str | None:
    """Name of the base model on the hub; None for a folder, whose path stays private, and for the
    embedded demo model."""
    source = model_named(base_model)
    if base_model == NAME or not REPOSITORY.fullmatch(source):
        return None
    return None if expanded(source).exists() else source


def example_prompt(recipe: Recipe) -> str:
    """A prompt of no training clip. The demo model knows few words."""
    return "a red square moves left slowly" if recipe.base_model == NAME else "a cat surfs"


def _options(recipe: Recipe) -> str:
    """Options of the method that `is_told` names, a space before; none that may be a path."""
    plain = method_of_file(recipe.method, {})
    usual = {
        one.name: getattr(plain, one.name)
        for one in options_of(type(plain))
        if not is_told(one, plain)
    }
    shown = [
        f"`{name}={value}`"
        for name, value in recipe.options.items()
        if not (name in usual and value == usual[name])
        and isinstance(value, bool | int | float | str)
        and not set(str(value)) & set("/\\~")
    ]
    return f" {', '.join(shown)}" if shown else ""


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


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
    repository is created if it is missing. A folder without a card gets one, as training writes
    it.

    Args:
        folder: `OUT/lora` or `OUT/image_prompt` of a training, or a folder of presets.
        repository: OWNER/NAME on the hub.
        private: create a private repository; a public one of that name is refused.
        message: of the commit.
        dry_run: check the folder and list what would be uploaded. Needs no network and no token.

    Raises:
        FileNotFoundError: no such folder, or a file of the artefact is missing.
        ValueError: a name that the hub does not take, a folder that holds nothing whole, a link
            that leads out of it, or a public repository if a private one is asked for.
        PermissionError: no token, or one that may not write there.
        OSError: the hub cannot be reached.
    """
    with needed_for("an upload", extra="train"):
        from huggingface_hub import get_token
    check_repository(repository)
    place = expanded(folder)
    if not place.is_dir():
        what = "it is a file" if place.exists() else "there is none"
        raise FileNotFoundError(f"{place} must be a folder to upload, but {what}")
    kind, names, base, card = _artefact(place)
    own = place / CARD
    is_new = not os.path.lexists(own)
    for name in [*names] if is_new else [*names, CARD]:
        _check_inside(place / name, place)
    if not is_new:
        try:
            card = own.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{own} is not UTF-8 text: save it as UTF-8") from None
    files = {name: (place / name).stat().st_size for name in names}
    files[CARD] = len(card.encode()) if is_new else own.stat().st_size
    found = Push(
        repository,
        kind,
        files,
        tuple(_left_out(place, files)),
        card,
        is_new,
        (*_notes_on_card(place, card), *_notes_on_privacy(place, names, base)),
    )
    if dry_run:
        return found
    if not get_token():
        raise PermissionError(
            "there is no token for the hub: run `hf auth login`, or set HF_TOKEN to one that may "
            f"write to {repository}"
        )
    if is_new:
        with replacing(own) as partial:
            partial.write_text(card, encoding="utf-8")
    said = message or f"Upload {kind} with gen_accel"
    return replace(found, url=_uploaded(place, repository, [*files], private, said))


def _artefact(folder: Path) -> tuple[str, list[str], str | None, str]:
    """Return kind, file names, base model as recorded, and the text of a new card.

    Raises ValueError or FileNotFoundError for an artefact that is not whole.
    """
    if (folder / WEIGHTS).is_file():
        names, recipe = [], read_recipe(folder)
        for part, place in folders_of(folder).items():
            within = "" if part == recipe.part else f"{part}/"
            names += [f"{within}{name}" for name in _lora_files(place)]
        return LORA, names, recipe.base_model, new_card(recipe)
    if (path := folder / formats.WEIGHTS).is_file():
        held = formats.read_adapter(folder).metadata.get("recipe")
        if held is None:
            raise ValueError(f"{path} has no recipe: it was not trained here")
        recipe = parse(held, path)
        _finite_tensors(path)
        if fields_of(_read(folder).get("recipe"), folder / CONFIG) != held:
            raise ValueError(f"{folder / CONFIG} is of another training than {formats.WEIGHTS}")
        names = [formats.WEIGHTS, CONFIG]
        return IMAGE_PROMPT, names, recipe.base_model, new_card(recipe, image=True)
    if presets := _presets(folder):
        names = {name for path, preset in presets.items() for name in _preset_files(path, preset)}
        from huggingface_hub import ModelCardData

        about = ModelCardData(library_name="diffusers", tags=[TASK, "gen_accel", "preset"])
        return PRESET, sorted(names), None, _rendered("presets.md.j2", about, presets=presets)
    inside = [f"{folder / name}" for name in INSIDE if (folder / name).is_dir()]
    hint = f"; did you mean {' or '.join(inside)}?" if inside else ""
    raise FileNotFoundError(
        f"{folder} holds no LoRA, image prompt or preset to upload: give the folder lora or "
        f"image_prompt of a training, or a folder of presets{hint}"
    )


def _lora_files(folder: Path) -> list[str]:
    """Names of a LoRA's files, which are whole and of one training."""
    recipe = read_recipe(folder)
    if parse(_read(folder), folder / CONFIG) != recipe:
        raise ValueError(f"{folder / CONFIG} is of another training than {WEIGHTS}")
    if not _finite_tensors(folder / WEIGHTS) and recipe.rank:
        raise ValueError(f"{folder / WEIGHTS} holds no tensors, its recipe says {recipe.rank=}")
    beside = folder / storage.FILE
    if beside.is_file():
        if storage.Saved.read(folder).method != recipe.build_method():
            raise ValueError(f"{beside} is of another method than {WEIGHTS}")
        return [WEIGHTS, CONFIG, storage.FILE]
    if recipe.build_method().has_parameters:
        raise FileNotFoundError(f"{beside} is missing: train again, or copy it there")
    return [WEIGHTS, CONFIG]


def _finite_tensors(path: Path) -> int:
    """Number of tensors in a file, all finite."""
    tensors, _ = read_tensors(path)
    if wrong := not_finite(tensors):
        raise ValueError(f"{path} holds NaN or infinity in {named(wrong)}: train again")
    return len(tensors)


def _read(folder: Path) -> dict[str, object]:
    if not (path := folder / CONFIG).is_file():
        raise FileNotFoundError(f"{path} is missing: copy the whole folder of the training")
    return read_fields(path)


def _presets(folder: Path) -> dict[Path, Preset]:
    """Presets of a folder by their files; other JSON is passed over."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        with suppress(ValueError):
            if read_fields(path).get("gen_accel") == KIND:
                found[path] = None
    return {path: read_preset(path) for path in found}


def _preset_files(path: Path, preset: Preset) -> list[str]:
    """Names of a preset's files, all of which are there and whole."""
    names = [path.name]
    if preset.profile is not None:
        read_profile(preset, path.parent)
        names.append(preset.profile["file"])
    beside = path.parent.glob(f"{glob.escape(path.stem)}.????????.safetensors")
    return [*names, *(file.name for file in beside)]


def _check_inside(path: Path, folder: Path) -> None:
    """Refuse a link that leads out of the folder, whose file would be uploaded, and what is no
    file."""
    if not path.is_file():
        raise ValueError(f"{path} must be a file, and is a folder, a pipe or a link to nothing")
    found = path.resolve()
    if not found.is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} leads out of the folder, to {found}, which would be uploaded: put the file "
            "itself there"
        )


def _left_out(folder: Path, files: Collection[str]) -> Iterator[str]:
    """Names in the folder, and in the folders of files, that are not uploaded."""
    folders = sorted({name.partition("/")[0] for name in files if "/" in name})
    for place in ("", *folders):
        for path in sorted((folder / place).iterdir()):
            name = f"{place}/{path.name}".lstrip("/")
            if name not in files and name not in folders:
                yield f"{name}/" if path.is_dir() else name


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
    if not held.get("license"):
        yield (
            "the card names no license, so that nobody may use the upload: add a line such as "
            f"`license: apache-2.0` below the first --- of {CARD}"
        )


def _notes_on_privacy(folder: Path, names: list[str], base: str | None) -> Iterator[str]:
    """Name values in the JSON files that readers will see: folders of this machine, prompts."""
    for name in (name for name in names if name.endswith(".json")):
        held = read_fields(folder / name)
        texts = map(json.loads, TEXT.findall(json.dumps(held)))
        paths = {text for text in texts if _is_path(text)}
        if base is not None and Path(name).name == CONFIG and expanded(base).exists():
            paths.add(base)
        if paths:
            yield f"{name} names folders of this machine: {', '.join(sorted(paths))}"
        made_by = held.get("made_by")
        if isinstance(made_by, dict) and made_by.get("prompts"):
            yield f"{name} holds the prompts that it was tuned on"


def _is_path(text: str) -> bool:
    return Path(text).is_absolute() or text[:1] == "~" or PureWindowsPath(text).is_absolute()


def _uploaded(folder: Path, repository: str, names: list[str], private: bool, message: str) -> str:
    """Create the repository if it is missing, and commit the files. Returns the address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        with silenced("huggingface_hub"):
            # An organisation may have a default of its own, which None leaves.
            api.create_repo(repository, private=private or None, exist_ok=True)
            if not (private and not api.model_info(repository).private):
                commit = api.upload_folder(
                    repo_id=repository,
                    folder_path=folder,
                    commit_message=message,
                    allow_patterns=[glob.escape(name) for name in names],
                )
                return str(commit.commit_url)
    except OfflineModeIsEnabled as error:
        raise OSError(
            f"{repository} is not uploaded, as HF_HUB_OFFLINE is set: unset it"
        ) from error
    except Exception as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            raise PermissionError(
                f"the hub's token may not write to {repository}: run `hf auth login` with one "
                "that may"
            ) from error
        cause = error.__cause__ or error
        said = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
        raise OSError(
            f"{repository} is not uploaded ({said}): try again when the hub is reachable"
        ) from error
    raise ValueError(f"{repository} is there already and public: make it private, or take another")
