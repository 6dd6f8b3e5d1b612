"""`gen-accel show`: what a method or a preset keeps, and what techniques for longer video do."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from gen_accel import registry
from gen_accel.cli.app import app
from gen_accel.cli.loading import FOR_WEIGHTS, loading, unneeded, without
from gen_accel.cli.printing import FiguresConfig, preset_lines, terminal_width
from gen_accel.cli.verb import verb
from gen_accel.config import option
from gen_accel.hub import check_pipeline, check_subject, check_there
from gen_accel.parsing import brief
from gen_accel.paths import check_output, model_files, model_named
from gen_accel.pipelines.generation.config import MethodChoice, preset_files

if TYPE_CHECKING:
    from gen_accel.attention_processors.attached.schedule import Schedule
    from gen_accel.method import Method
    from gen_accel.pipelines.tuning import Preset
    from gen_accel.video import VideoShape

INDENT = "    "


class ShowConfig(FiguresConfig, MethodChoice):
    """A picture of attention, before any model runs."""

    VERB = "show"

    model: str | None = option(
        None,
        "Video",
        "Model as for `gen-accel estimate`; sizes are then in its frames and pixels.",
        metavar="MODEL",
        reads=model_files,
        form="Model whose tuning is shown.",
    )
    frames: int | None = option(
        None,
        "Video",
        "Number of frames, in tokens; with --model, of the video. Default: the model's own.",
        ge=1,
        form="Number of frames of the video. Default: the model's own.",
    )
    height: int | None = option(
        None,
        "Video",
        "Height in tokens; with --model, in pixels. Default: the model's own.",
        ge=1,
        form="Height in pixels. Default: the model's own.",
    )
    width: int | None = option(
        None,
        "Video",
        "Width in tokens; with --model, in pixels. Default: the model's own.",
        ge=1,
        form="Width in pixels. Default: the model's own.",
    )
    text: int = option(0, "Video", "Number of text tokens in the same attention.", ge=0)
    layer: int | None = option(
        None, "Picture", "Number of the only layer to show, of a tuned preset.", ge=0
    )
    token: tuple[int, int, int] | None = option(
        None,
        "Picture",
        "Frame, row and column of the token to look from, in a picture.",
        metavar="F,R,C",
    )
    out: Path | None = option(
        None,
        "Picture",
        "File .png to draw to, in place of the terminal; of a tuned preset, beside it: its "
        "settings and its frontier.",
        writes=True,
    )
    extend: tuple[str, ...] | None = option(
        None,
        "Longer",
        "Techniques for longer video, in place of a method: what they do, and what goes with "
        "them; all: every one.",
        metavar="TECHNIQUE[,TECHNIQUE]",
        choices=registry.TECHNIQUES,
        commas=True,
    )
    trained_frames: int | None = option(
        None,
        "Longer",
        "Number of frames that the model was trained on, for --extend.",
        ge=1,
        form="Number of frames that the model was trained on.",
    )

    lora: Path | None = option(
        None,
        "LoRA",
        "LoRA to describe, in place of a picture: what its file holds, and how it is run.",
        metavar="FILE",
        reads=Path,
    )

    @property
    def is_file(self) -> bool:
        """Whether the preset is a file, not a name."""
        return self.preset is not None and self.preset not in registry.PRESETS

    def check(self) -> None:
        """Refuse what does not go together, and files that are missing or cannot be written."""
        if self.lora is not None:
            check_there(self.lora, "LoRA")
            self.check_only("lora", "json", "overwrite")
            return
        if self.extend is not None:
            registry.check_techniques(() if self.extend == ("all",) else self.extend)
            others = ("model", "frames", "trained_frames", "json", "overwrite")
            self.check_only("extend", *others)
            if self.model is not None:
                check_pipeline(self.model)
            elif self.frames is not None or self.trained_frames is not None:
                raise ValueError("--frames and --trained-frames are of a model: add --model")
            return
        if self.trained_frames is not None:
            raise ValueError(f"--trained-frames {self.trained_frames} goes with --extend")
        self.check_method()
        check_output(self.out, ".png")
        if self.model is not None:
            check_subject(self.model)
        is_named = self.chosen_preset is not None and self.model is not None
        if self.layer is not None and not self.is_file and not is_named:
            raise ValueError(
                f"--layer is of a tuned preset, got {self.layer} without --preset FILE"
            )
        if self.model is None and not self.is_file:
            self.check_sizes()
        if self.out is None and self.token is not None:
            raise ValueError("--token is drawn in a picture only: add --out mask.png")

    def check_sizes(self) -> None:
        """Refuse missing sizes in tokens, and more than anybody can draw: pixels by mistake."""
        if self.frames is None or self.height is None or self.width is None:
            raise ValueError(
                "give --frames, --height and --width, in tokens, or --model, whose own they are"
            )
        tokens = self.frames * self.height * self.width
        if tokens > registry.MOST_TOKENS:
            wan = (self.frames - 1) // 4 + 1, self.height // 16, self.width // 16
            raise ValueError(
                f"{tokens:,} tokens: sizes are tokens here; {self.frames} x {self.height} x "
                f"{self.width} pixels of Wan are {' x '.join(map(str, wan))}: add --model wan"
            )

    def grid(self) -> "VideoShape":
        """Return the grid of tokens; of a model, what its attention sees of the video."""
        from gen_accel.video import VideoShape

        if self.model is None:
            return VideoShape(self.frames or 0, self.height or 0, self.width or 0, self.text)
        from gen_accel.measure.cost.model import subject_of
        from gen_accel.pipelines.generation.model_index import whole_run

        frames, height, width, _ = whole_run(self.model, self)
        subject = subject_of(model_named(self.model))
        seen = subject.seen(subject.grid(height, width, frames))
        return VideoShape(*seen.grid, text=self.text or seen.text)


@verb(app, ShowConfig, short_help="A picture of what a method keeps.", positional=("method",))
def show(config: ShowConfig) -> None:
    """Draw which blocks a method keeps, and what one token sees, before any model runs.

    The pattern of block_mixture, piecewise, sparse_linear, and reuse around them depends on q and
    k: it is drawn for smooth random ones.

    Sizes are in tokens, or with --model in frames and pixels: 161 frames of 720 x 1280 of Wan are
    41 x 45 x 80 tokens.

    \b
    gen-accel show radial --model wan
    gen-accel show radial --model wan --frames 161 --height 720 --width 1280
    gen-accel show radial --frames 33 --height 12 --width 12
    gen-accel show radial --frames 41 --height 45 --width 80 --set rule=paper --out mask.png
    gen-accel show neighborhood --frames 9 --height 12 --width 12 --set window=3,5,5 \\
        --token 0,0,0 --out corner.png
    gen-accel show --preset preset.json                     what `gen-accel tune` chose
    gen-accel show --preset preset.json --layer 7
    gen-accel show --model demo                             what it is run with by default
    gen-accel show --preset fast --model demo --frames 65   what was tuned for this length
    gen-accel show --preset preset.json --out preset.png    its settings, and the frontier
    gen-accel show --lora FastH3.safetensors                what a LoRA's file is, in words
    gen-accel show --extend all                             techniques for longer video
    gen-accel show --extend riflex --model demo --frames 129
        what riflex does to 129 frames, and what cannot be chosen beside it

    A tuned preset, given as a file or by name with --model, is shown as a table: the method of
    each head at each step, of a file on the grid that it was tuned for or another one. A name
    without a model, or for a model and sizes that nothing was tuned for, is a rule, drawn like its
    method, as `generate` and `estimate` take it. Without a method it is the preset balanced.
    """
    config.check()
    if config.lora is not None:
        with loading(None):
            from gen_accel.pipelines.generation.loading import file_of, lora_source
            from gen_accel.pipelines.generation.lora_words import words_of
        lines, about = words_of(file_of(lora_source(str(config.lora))[0]))
        width = terminal_width()
        config.show([part for line in lines for part in wrap(line, width)], about)
        return
    with without(*(unneeded(config.model) if config.extend is None else FOR_WEIGHTS)):
        _show(config)


def _show(config: ShowConfig) -> None:
    """Print what is no LoRA."""
    with loading(None if config.model is None else "diffusers"):
        from gen_accel.measure.pictures import mask_facts, mask_picture, mask_text
    if config.extend is not None:
        _show_techniques(config, () if config.extend == ("all",) else config.extend)
        return
    lines: list[str] = []
    if config.chosen_preset is None:
        chosen = config.built_method()
    else:
        chosen, when, tuned = _resolved(config, str(config.chosen_preset))
        if tuned is not None:
            _show_tuned(config, tuned)
            return
        if config.layer is not None:
            raise ValueError(
                f"--layer is of a tuned preset, and {config.chosen_preset} is a rule for "
                f"{config.model} at this size"
            )
        lines += wrap(
            brief(when), terminal_width(), subsequent_indent="  ", break_on_hyphens=False
        )
    video = config.grid()
    if config.out is not None:
        lines.append(str(mask_picture(chosen, video, config.out, token=config.token)))
    elif not config.is_quiet:
        lines += mask_text(chosen, video, terminal_width()).splitlines()
    config.show(lines, None if config.json_file is None else mask_facts(chosen, video))


def _resolved(config: ShowConfig, preset: str) -> "tuple[Method, Schedule | None, Preset | None]":
    """Find what a preset is, as `generate` does."""
    from gen_accel.measure.cost.model import subject_of
    from gen_accel.pipelines.generation.model_index import whole_run
    from gen_accel.pipelines.tuning import read_preset
    from gen_accel.pipelines.tuning.preset import by_rule, choose_preset

    if config.is_file:
        found = read_preset(preset)
        return found.method, None, found
    if config.model is None:
        return by_rule(preset, quiet=config.preset is None)
    frames, height, width, _ = whole_run(config.model, config)
    call = {"num_frames": frames, "height": height, "width": width}
    model = subject_of(model_named(config.model)).model
    return choose_preset(preset, model, None, call, quiet=config.preset is None)


def _show_tuned(config: ShowConfig, tuned: "Preset") -> None:
    """Print what a preset holds, with its rules as a table."""
    from gen_accel.measure.pictures import rules_text
    from gen_accel.pipelines.tuning import load_tuned, read_preset
    from gen_accel.video import VideoShape

    if config.token is not None:
        raise ValueError("a tuned preset is shown as a table: leave --token out")
    sizes: tuple[int | None, ...] = config.frames, config.height, config.width
    if config.model is not None:
        sizes = (None,) * 3 if None in sizes else config.grid().grid
    frames, rows, columns = (
        size if asked is None else asked
        for asked, size in zip(sizes, tuned.made_for.grid, strict=True)
    )
    heads = tuned.made_for.transformer.get("num_attention_heads")
    table = rules_text(
        tuned.method,
        VideoShape(frames, rows, columns, config.text),
        layer=config.layer,
        heads=heads if isinstance(heads, int) else None,
        width=min(terminal_width(), 80),
    )
    lines = [*preset_lines(tuned), "", *table.splitlines()]
    if config.out is not None:
        [file] = [
            one for one in preset_files(str(config.chosen_preset)) if read_preset(one) == tuned
        ]
        lines.append(str(load_tuned(file).plot(config.out)))
    config.show(lines, [tuned.to_dict()])


def _show_techniques(config: ShowConfig, chosen: tuple[str, ...]) -> None:
    """Print what each technique does, which of them a model takes at a length, and which go
    together; what cannot be chosen with the reason."""
    from gen_accel.pipelines.long_video import (
        excluded,
        extend,
        known_trained_frames,
        refusals,
        summary_of,
    )

    about: dict[str, Any] = {}
    does: dict[str, str] = {}
    if config.model is None:
        refused = excluded(chosen)
    else:
        from gen_accel.attention_processors.attached.clock import first_transformer
        from gen_accel.pipelines.generation.model_index import skeleton

        pipe = skeleton(model_named(config.model))
        trained = config.trained_frames or known_trained_frames(first_transformer(pipe))
        frames = config.frames or trained
        refused = refusals(pipe, chosen, num_frames=frames, trained_frames=trained)
        if chosen:
            longer = extend(pipe, chosen, num_frames=frames, trained_frames=trained)
            does = longer.effects
            longer.remove()
        about = {"model": config.model, "frames": frames, "trained_frames": trained}
    taken = {registry.split_technique(one)[0] for one in chosen}
    found = [
        {
            "name": name,
            "does": summary_of(name),
            "chosen": name in taken,
            "refused": refused.get(name),
            "effect": does.get(name),
        }
        for name in registry.TECHNIQUES
    ]
    config.show(_lines(about, found), {**about, "chosen": [*chosen], "techniques": found})


def _lines(about: Mapping[str, Any], found: list[dict[str, Any]]) -> Iterator[str]:
    width = terminal_width()
    if about:
        yield (
            f"{about['model']}, {about['frames']} frames, trained at {about['trained_frames']}:"
        )
        yield ""
    for one in found:
        yield from wrap(f"{one['name']}: {one['does']}", width, subsequent_indent=INDENT)
        told = ""
        if one["chosen"]:
            told = "chosen" + (f": {one['effect']}" if one["effect"] else "")
        elif one["refused"]:
            told = f"no: {one['refused']}"
        yield from wrap(told, width, initial_indent=INDENT, subsequent_indent=INDENT)
