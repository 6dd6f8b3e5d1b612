"""`gen-accel generate`."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gen_accel.cli.app import app
from gen_accel.cli.loading import FOR_WEIGHTS, QUANTISERS, loading, without
from gen_accel.cli.printing import FiguresConfig, print_comparison, print_files, terminal_width
from gen_accel.cli.verb import verb
from gen_accel.config import option
from gen_accel.demo import check_known
from gen_accel.parsing import MOST_SHOWN, shown
from gen_accel.paths import DEMO
from gen_accel.pipelines.generation.config import GenerateConfig, prompts_of

if TYPE_CHECKING:
    from gen_accel.pipelines.generation.generate import Generated


class OtherThanMade(UserWarning):
    """A clip is made again with other versions or files."""


class GenerateLine(FiguresConfig):
    """Options of the command line alone."""

    from_settings: Path | None = option(
        None,
        "Options",
        "Clip to make again, by the settings in its .mp4, .gif, .png or .json; flags win.",
        metavar="CLIP",
    )
    plan: bool = option(False, "Options", "Cost of the run, in place of the run.")
    gpu: str | None = option(
        None,
        "Options",
        "Card for --plan: h100, h200, a100, 4090, 5090 and others. Default: this machine.",
        metavar="CARD",
    )
    json_file: Path | None = option(
        None,
        "Options",
        "File for a JSON object of each video, a line each; -: standard output, alone.",
        name="json",
        metavar="FILE",
        writes=True,
    )

    @property
    def writes_alone(self) -> bool:
        return self.plan


def read_clip(path: Path, typed: Mapping[str, object]) -> dict[str, object]:
    """Read the fields that a clip was made with.

    A file may come from anyone: it sets fields alone that a clip keeps, none of which names a
    place to write to, and reading it imports nothing.

    Args:
        typed: fields of the command line, which win.
    """
    from gen_accel.measure.clip_settings import read_settings

    found, known = read_settings(path), GenerateConfig.options()
    if wrong := [name for name in found.fields if name not in known or not known[name].kept]:
        raise ValueError(f"{path} sets {shown(wrong[0])}, which is no setting of a clip")
    method = found.fields.get("method")
    if ":" in str(method) and "method" not in typed:
        raise ValueError(
            f"{path} names code of its maker, {shown(method)}, which is imported only where you "
            f"ask for it: add --method {method}"
        )
    for name, value in found.wordless.items():
        if name not in typed and not (name == "method" and "preset" in typed):
            flag = name.replace("_", "-")
            told = str(value)[:MOST_SHOWN]
            raise ValueError(f"{path} was made with {told}, which no word gives: add --{flag}")
    own = {"out": path} if "resume" in typed and "out" not in typed else {}
    return {**found.fields, **own}


def tell_differences(path: Path, config: GenerateConfig) -> None:
    """Warn of versions and files that are others than a clip was made with."""
    from gen_accel.measure.clip_settings import fingerprint, other_versions, read_settings

    found, given = read_settings(path), config.kept()
    if others := other_versions(found.made_by):
        _warn(f"{path.name} was made by {others}: pixels may differ")
    for name, files in found.files.items():
        value = given.get(name)
        if value != found.fields.get(name) or not isinstance(files, dict):
            continue
        sources = GenerateConfig.options()[name].sources
        for file in map(str, value if isinstance(value, list) else [value]):
            earlier = files.get(file)
            if earlier is not None and fingerprint(*sources(file)) not in (None, earlier):
                _warn(f"{name} {file} is not what {path.name} was made with: pixels may differ")


def _warn(told: str) -> None:
    warnings.warn(told, OtherThanMade, stacklevel=3)


@verb(
    app,
    GenerateConfig,
    short_help="Videos from prompts, with any served pipeline.",
    more=GenerateLine,
    sources={"from_settings": read_clip},
    example={"model": DEMO},
)
def generate(config: GenerateConfig, line: GenerateLine) -> None:
    """Generate videos with any diffusers video pipeline of `gen-accel models`.

    \b
    gen-accel generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat surfs" \\
        --frames 161 --height 480 --width 832 --out cat.mp4
    gen-accel generate --model models/wan --prompt "a cat surfs" --compare --out cat.mp4
        also cat.dense.mp4, cat.side_by_side.mp4 and cat.json
    gen-accel generate --model models/wan --prompts prompts.txt --out clips/clip.gif
        clip-000.gif, clip-001.gif and so on, with seeds 0, 1, ...; again: the unfinished ones
    accelerate launch --num_processes 4 -m gen_accel generate --model models/wan \\
        --prompts prompts.txt --out clips/clip.mp4
        the same files, a part from each process, on a GPU of its own
    gen-accel generate --model /shared/wan --prompts prompts.txt --out /shared/clip.mp4 \\
        --ray head:6379
        the same files, by all GPUs of a cluster of Ray; what dies is tried elsewhere
    gen-accel generate --model models/wan --prompt "a cat" --method neighborhood \\
        --set window=9,12,12 --set is_causal=true,false,false --kernel flex
    gen-accel generate --model models/wan --prompt "a cat" --preset preset.json --out cat.mp4
        the attention that `gen-accel tune` found, at its number of steps
    gen-accel generate --model models/wan --prompt "a cat" --method dense --lora loras/long:0.8
    gen-accel generate --model models/wan --prompt "a cat" --from-lora outputs/lora/lora
    gen-accel generate --model models/wan --prompt "a cat" --frames 161 --extend riflex \\
        --save-latents cat.safetensors --out cat.mp4
    gen-accel generate --model models/wan --from-latents cat.safetensors --out cat.gif
    gen-accel generate --model Wan-AI/Wan2.1-I2V-14B-480P-Diffusers --prompt "it surfs" \\
        --image cat.png --out cat.mp4
    gen-accel generate --model models/wan --prompt "in oil" --video cat.mp4 --strength 0.7 \\
        --out oil.mp4
    gen-accel generate --model models/wan --prompt "it surfs" --image-prompt cat.png \\
        --image-adapter outputs/lora/image_prompt --image-scale 0.8 --out cat.mp4
    gen-accel generate --print-config --model models/wan > cat.yaml
    gen-accel generate --config cat.yaml --prompt "a cat surfs" --preview 5
        cat.yaml has every flag; a picture of what there is so far each five steps
    gen-accel generate --from-settings cat.mp4 --seed 8 --out another.mp4
        what made cat.mp4 lies in it, for whoever gets it; --no-settings leaves it out

    Without a method it is the preset balanced, with a fifth of the steps dense from the second on,
    as they decide what a video shows: keep them dense with a method too, --dense-start 0.2. Sizes
    that the model cannot make are refused, with the nearest that it can.
    """
    config.check()
    if line.from_settings is not None:
        tell_differences(line.from_settings, config)
    if config.model == DEMO:
        texts = prompts_of(config.prompt).values() if config.stream else config.texts
        check_known(*texts)
    if config.ray is not None and line.plan:
        raise ValueError(f"--plan makes no videos: leave --ray {config.ray} out")
    if line.gpu is not None and not line.plan:
        raise ValueError(f"--gpu {line.gpu} is for --plan: a run takes --device")
    unmade = None
    with line.objects() as out:
        if line.plan:
            out.append(_plan(config, line.gpu))
            return
        with without(*_unused(config)), loading():
            from gen_accel.pipelines.generation.generate import Unmade, decode_latents, generate_by
        if config.from_latents is not None:
            path = decode_latents(
                config.model,
                config.from_latents,
                out=config.target,
                fps=config.fps,
                loading=config,
            )
            print_files({"video": path})
            out.append({"files": {"video": path}})
            return
        try:
            made = generate_by(config)
        except Unmade as error:  # raised once the rest is printed
            made, unmade = error.made, error
        for one in made:
            _print_made(one)
            out.append(one.to_dict())
    if unmade is not None:
        raise unmade


def _unused(config: GenerateConfig) -> tuple[str, ...]:
    """Name packages that a run does without."""
    if config.loras or config.from_lora or config.image_adapter or config.quantize:
        return ()
    if config.stream:  # by an embedded LoRA
        return QUANTISERS
    return FOR_WEIGHTS if config.model == DEMO else ("peft",)


def _plan(config: GenerateConfig, gpu: str | None) -> dict[str, object]:
    """Print what a video of the run will cost, and return it."""
    from gen_accel.measure.cost.figures import card_named

    if gpu is not None:
        card_named(gpu)
    with loading():
        from gen_accel.pipelines.generation.plan import forecast_generate

    if len(config.texts) > 1:
        typer.echo(f"Each of {len(config.texts)} videos:")
    found = forecast_generate(config, gpu=gpu)
    for text in found.lines(terminal_width()):
        typer.echo(text)
    return found.to_dict()


def _print_made(one: "Generated") -> None:
    typer.echo(f"{one.prompt}  (seed {one.seed}, {one.seconds:.1f} s)")
    if one.image:
        typer.echo(one.image)
    if one.report is not None:
        print_comparison(one.report)
    else:
        typer.echo(one.summary)
        for told in filter(None, (one.extension, one.cached)):
            typer.echo(told)
    print_files(one.files)
