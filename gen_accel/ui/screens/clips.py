"""Clips of a training: the section of its screen, and captions on disk."""

import base64
import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import gradio as gr
from PIL import Image

from gen_accel.demo import TRAINED_FRAMES
from gen_accel.io import read_text, replacing
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.data.clips import CaptionedVideo
from gen_accel.lora.data.finding import NUMBERED, find_videos
from gen_accel.lora.data.report import why_broken
from gen_accel.paths import expanded
from gen_accel.ui.page import PRIVATELY, TELLING, Held, Page, html, refusing
from gen_accel.ui.worker import Values

if TYPE_CHECKING:
    from gen_accel.ui.screens.train import TrainForm

SILENT = "\0"  # stands for a missing caption, and no caption file can hold it
THUMB = (128, 96)  # largest width and height of a thumbnail
CLIPS = "clips"  # folder in the output folder that has clips which were sent or made
EXAMPLES = 6  # clips of the embedded model's world
A_PAGE = 50  # clips
HEADS = ["", "clip", "length and size", "caption"]
WIDTHS: list[str | int] = ["112px", "170px", "200px", "520px"]
CLIP, CAPTION = 1, 3  # places of columns
# Of events that write fields or YAML: one after another.
IN_TURN: Values = {**TELLING, "trigger_mode": "multiple", "concurrency_id": "train-form"}


class Row(NamedTuple):
    """A caption, with the clip that it is of.

    Args:
        name: of the clip; with its file, of a further caption.
        clip: name of the clip in its data.
        file: the caption's file; None if captions are not edited here.
    """

    name: str
    clip: str
    file: Path | None
    caption: str


@dataclass(frozen=True)
class Found:
    """Clips of a config's data.

    Args:
        fixed: why captions cannot be edited here; None if they can.
    """

    rows: tuple[Row, ...]
    videos: Mapping[str, CaptionedVideo]
    fixed: str | None

    @property
    def silent(self) -> list[str]:
        """Names of clips without a caption."""
        return [name for name, video in self.videos.items() if not video.caption]


class ClipTable:
    """The section of the clips: a table of them, whose captions are edited in it."""

    def __init__(self, page: Page, form: "TrainForm") -> None:
        self.page, self.form = page, form
        with gr.Row(equal_height=True):
            about = "A folder of videos, clip.txt beside clip.mp4."
            hint: Values = {"placeholder": "/data/clips", "info": about}
            form.add("data", label="Folder of clips", scale=4, **hint)
            primary: Values = {"variant": "primary", "scale": 1}
            self.look = gr.Button("Look at the clips", elem_id="train-look", **primary)
        with gr.Row():
            self.sent = gr.UploadButton(
                "Send clips and captions",
                file_count="multiple",
                file_types=["video", "image", ".txt"],
                elem_id="train-send",
            )
            self.example = gr.Button("Make example clips", elem_id="train-example")
        self.error = gr.HTML(elem_id="train-clips-error")
        self.told = gr.HTML(elem_id="train-found")
        self.pages = gr.Dropdown([], label="clips", visible=False, elem_id="train-page")
        self.table = gr.Dataframe(
            headers=HEADS,
            datatype=["html", "str", "str", "str"],
            static_columns=[0, 1, 2],
            column_widths=WIDTHS,
            type="array",
            wrap=True,
            interactive=True,
            visible=False,
            max_height=560,
            elem_id="train-clips",
            label="Double-click a caption to edit it",
        )
        self.save = gr.Button("Save captions", visible=False, elem_id="train-save")
        self.found, self.edits = gr.State(None), gr.State({})

    def listen(self) -> None:
        """Connect the section, once the form is whole."""
        form, error = self.form, self.error
        shown = [self.told, self.pages, self.table, self.save, self.edits, self.found]
        looked: Values = {"fn": refusing(self.find, error), "inputs": form.inputs}
        looked |= {"outputs": [error, *shown], "show_progress_on": [self.told]}
        self.look.click(**looked, **PRIVATELY)
        state = {self.pages, self.found, self.table, self.edits}
        self.pages.input(refusing(self.turn, error), state, [error, *shown], **PRIVATELY)
        saved = {*state, *form.inputs}
        self.save.click(refusing(self.keep, error), saved, [error, *shown], **PRIVATELY)
        place: Values = {"outputs": [error, form.parts["data"]], **PRIVATELY}
        for done in (
            self.sent.upload(refusing(self.send, error), [self.sent], **place),
            self.example.click(refusing(self.make, error), None, **place),
        ):
            done.success(**form.from_fields, **IN_TURN).success(**looked, **PRIVATELY)

    def find(self, held: Held) -> Held:
        config = self.form.read(held)
        self.page.places.check("train", {"data": config.data, "model": config.model})
        found = find_clips(config, self.page.places.readable)
        silent = found.silent
        told = [f"{len(found.videos):,} clips, {len(found.rows):,} captions"]
        told += [f"{len(silent)} have no caption, as {silent[0]}"] if silent else []
        told += [found.fixed] if found.fixed else []
        return {**self._rows(found, 0, {}), self.told: html("listed", told), self.found: found}

    def turn(self, held: Held) -> Held:
        found: Found | None = held[self.found]
        if found is None:
            return {self.pages: gr.skip()}
        number = (int(held[self.pages].partition(" ")[0]) - 1) // A_PAGE
        return self._rows(found, number, self._edited(found, held))

    def keep(self, held: Held) -> Held:
        found: Found | None = held[self.found]
        if found is None:
            raise ValueError("look at the clips first")
        config = self.form.read(held)
        self.page.places.check("train", {"data": config.data})
        rows = {row.name: row for row in found.rows}
        texts = self._edited(found, held).items()
        edits = {rows[name].file: (rows[name].caption, text) for name, text in texts}
        written = {file: edit for file, edit in edits.items() if file is not None}
        files = save_captions(config, written, self.page.places.editable)
        names = ", ".join(file.name for file in files) or "nothing was changed"
        return {**self.find(held), self.told: html("quiet", f"saved: {names}")}

    def send(self, files: Sequence[str] | None) -> Held:
        place, number = self.page.places.folder / CLIPS, 1
        place.mkdir(parents=True, exist_ok=True)
        while (folder := place / f"sent{number}").exists():
            number += 1
        folder.mkdir()
        for file in files or ():
            shutil.copyfile(file, folder / Path(file).name)
        return {self.form.parts["data"]: str(folder)}

    def make(self) -> Held:
        from gen_accel.demo.world import write_clips

        folder = self.page.places.folder / CLIPS / "example"
        write_clips(folder, frames=TRAINED_FRAMES, count=EXAMPLES)
        return {self.form.parts["data"]: str(folder)}

    def _rows(self, found: Found, number: int, kept: Mapping[str, str]) -> Held:
        """Show a page of the table, and keep what was edited on the others."""
        cells = []
        for row in found.rows[A_PAGE * number : A_PAGE * (number + 1)]:
            video = found.videos[row.clip] if row.name == row.clip else None
            first = ["", ""] if video is None else [thumbnail(video), size_of(video)]
            caption = kept.get(row.name, row.caption)
            cells.append([html("image", first[0], ""), row.name, first[1], caption])
        starts = range(0, len(found.rows), A_PAGE)
        names = [f"{i + 1} to {min(i + A_PAGE, len(found.rows))}" for i in starts]
        shown = {"choices": names, "value": names[number], "visible": len(names) > 1}
        can_edit = found.fixed is None
        return {
            self.pages: gr.update(**shown),
            self.table: gr.update(value=cells, visible=True, interactive=can_edit),
            self.save: gr.update(visible=can_edit),
            self.edits: {**kept},
        }

    def _edited(self, found: Found, held: Held) -> dict[str, str]:
        """Map the names of rows to captions that were edited, also on other pages of the table."""
        rows = {row.name: row for row in found.rows if row.file is not None}
        now = {**held[self.edits]}
        for one in held[self.table]:
            row, text = rows.get(str(one[CLIP])), str(one[CAPTION] or "").strip()
            if row is not None:
                now.pop(row.name, None)
                now |= {row.name: text} if text != row.caption else {}
        return now


def find_clips(config: TrainConfig, readable: Callable[[Path], object] = Path) -> Found:
    """List the clips of a config's data, with their captions.

    Raises ValueError and OSError as `find_videos` does, and ValueError for a clip or caption that
    the page may not read, before any is opened.

    Args:
        readable: raises ValueError for a file that the page may not read.
    """
    videos = videos_of(config)
    check_readable(videos, readable)
    fixed = why_fixed(config.data or "")
    texts = {} if fixed else caption_files(videos)
    for path in (path for each in texts.values() for path, _ in each):
        readable(path)
    rows: list[Row] = []
    for video in videos:
        held: Sequence[tuple[Path | None, str]] = texts.get(video.name) or [
            (None, text) for text in (video.caption, *video.more_captions)
        ]
        for number, (file, text) in enumerate(held):
            more = f"caption {number + 1}" if file is None else file.name
            name = video.name if number == 0 else f"{video.name}, {more}"
            rows.append(Row(name, video.name, file, text))
    return Found(tuple(rows), {video.name: video for video in videos}, fixed)


def size_of(video: CaptionedVideo) -> str:
    """Write the length and size of a clip, or why it cannot be read."""
    try:
        _, (height, width) = video.survey(frames=1, fps=None)
        frames, seconds = (1, None) if video.is_picture else video.extent()
    except OSError as error:
        return why_broken(str(error))
    length = "a picture" if video.is_picture else f"{frames} frames"
    return f"{length}{f', {seconds:.1f} s' if seconds else ''}, {height} x {width}"


def videos_of(config: TrainConfig) -> Sequence[CaptionedVideo]:
    """Find the clips as `gen-accel cache` does. A missing caption is empty.

    Raises ValueError and OSError as `find_videos` does, and ValueError for a missing package.
    """
    if config.data is None:
        raise ValueError("data is not given: a folder of videos, a manifest or a datasets folder")
    try:
        found = find_videos(
            config.data,
            images=config.adapter == "image_prompt",
            pictures="all" if 1 in config.clip_lengths else "captioned",
            default_caption=config.default_caption or SILENT,
            masks=config.masks,
        )
    except ImportError as error:
        raise ValueError(str(error)) from error
    if config.default_caption:
        return found
    return [replace(one, caption="") if one.caption == SILENT else one for one in found]


def check_readable(videos: Sequence[CaptionedVideo], readable: Callable[[Path], object]) -> None:
    """Raise ValueError for a clip whose film, picture or mask may not be read.

    A manifest names any file, and a folder holds links.

    Args:
        readable: raises ValueError for such a file.
    """
    for video in videos:
        for path in (video.source, video.image, video.mask):
            if isinstance(path, Path):
                readable(path)


def why_fixed(data: str) -> str | None:
    """Say why captions of `data` are not edited here; None for a plain folder.

    The same places are looked at as by `find_videos`.
    """
    folder = expanded(data)
    if folder.is_file():
        return f"these captions lie in {data}: edit them there"
    for name in ("dataset_info.json", "dataset_dict.json"):
        if (folder / name).is_file():
            return f"{data} is a folder of save_to_disk ({name}): edit its captions by datasets"
    for path in sorted(folder.rglob("metadata.*")):
        inside = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in inside.parts):
            return f"these captions lie in {path}: edit them there"
    return None


def caption_files(videos: Sequence[CaptionedVideo]) -> dict[str, list[tuple[Path, str]]]:
    """Map the clips of a folder to the files of their captions, with the text of each.

    A clip without a caption has the file that `find_videos` will look for.
    """
    paths = {video.name: video.source for video in videos if isinstance(video.source, Path)}
    own = {path.with_suffix("") for path in paths.values()}
    further: dict[Path, list[tuple[int, Path]]] = {}
    for folder in {path.parent for path in paths.values()}:
        for text in folder.glob("*.txt"):
            match = NUMBERED.fullmatch(text.name)
            if match and text.with_suffix("") not in own:
                further.setdefault(folder / match[1], []).append((int(match[2]), text))
    found = {}
    for name, path in paths.items():
        stem, first = path.with_suffix(""), path.with_suffix(".txt")
        files = [first, *(text for _, text in sorted(further.get(stem, ())))]
        held = [(one, read_text(one).strip()) for one in files if one.is_file()]
        found[name] = [one for one in held if one[1]] or [(first, "")]
    return found


def save_captions(
    config: TrainConfig,
    edits: Mapping[Path, tuple[str, str]],
    editable: Callable[[Path], object] = Path,
) -> tuple[Path, ...]:
    """Write captions that were edited, each file whole or not at all.

    Args:
        edits: file to its text as it was shown, and as it is to be.
        editable: raises ValueError for a file that the page may not write.

    Returns:
        The files that were written.

    Raises:
        ValueError: a file that is no caption of the data, that `editable` refuses, or whose text
            is another one by now; nothing is written then.
        OSError: a folder that is gone, or a file that cannot be written.
    """
    fixed = why_fixed(config.data or "")
    if fixed is not None:
        raise ValueError(fixed)
    files = caption_files(videos_of(config)).values()
    known = {path: text for each in files for path, text in each}
    for path, (before, _) in edits.items():
        editable(path)
        if path not in known:
            raise ValueError(f"{path} is no caption of a clip in {config.data}: look again")
        if known[path] != before.strip():
            raise ValueError(
                f"{path} was changed meanwhile, to {known[path]!r}: look again, then edit it"
            )
    changed = [path for path, (before, after) in edits.items() if after.strip() != before.strip()]
    for path in changed:
        with replacing(path) as partial:
            partial.write_text(edits[path][1].strip() + "\n", encoding="utf-8")
    return tuple(changed)


def thumbnail(video: CaptionedVideo) -> str:
    """Return the first frame as a data URL; "" for a clip that cannot be read."""
    try:
        with video.playing(None) as pictures:
            image = Image.fromarray(next(pictures))
    except (OSError, StopIteration):
        return ""
    image.thumbnail(THUMB)
    held = io.BytesIO()
    image.save(held, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
