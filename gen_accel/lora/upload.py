"""Upload of a trained adapter or a preset to the hub: whole, with its card, and nothing else."""

import glob
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
from gen_accel.extras import needed_for
from gen_accel.files import replacing
from gen_accel.hub import check_repository, silenced
from gen_accel.json_files import fields_of, read_fields
from gen_accel.lora.card import CARD, new_card
from gen_accel.method import parts_of
from gen_accel.paths import expanded
from gen_accel.pipelines.image_prompt import formats
from gen_accel.pipelines.tuning.preset import KIND, Preset, read_preset, read_profile
from gen_accel.tensor_files import named, not_finite, read_tensors

LORA, IMAGE_PROMPT, PRESET = "LoRA", "image prompt", "preset"
INSIDE = ("lora", "image_prompt")  # of a training's OUT and of a checkpoint
LICENSE = "license"  # field of a card's head


@dataclass(frozen=True)
class Push:
    """What was uploaded, or would be.

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
    needed = parts_of(recipe.build_method()).branch is not None
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
