"""`gen-accel push`, `gen-accel export` and `gen-accel assemble`."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from gen_accel.cli.app import app
from gen_accel.cli.loading import loading
from gen_accel.cli.printing import print_rows
from gen_accel.cli.verb import verb
from gen_accel.config import Config, Outputs, option
from gen_accel.hub import check_pipeline, check_repository
from gen_accel.lora.experts import NOISE, SECOND
from gen_accel.paths import (
    check_files,
    check_output,
    expanded,
    model_files,
    part_of,
    weights_named,
)

if TYPE_CHECKING:
    from gen_accel.lora.publish import Push


class PushConfig(Config):
    """An upload to the hub."""

    VERB = "push"

    folder: Path = option(
        ..., "Upload", "Folder lora or image_prompt of a training, or of presets.", metavar="DIR"
    )
    repository: str = option(
        ..., "Upload", "OWNER/NAME of the repository, made if it is missing.", metavar="REPO"
    )
    private: bool = option(
        False, "Upload", "A private repository; a public one of that name is refused."
    )
    dry_run: bool = option(False, "Upload", "Files, sizes and the card alone, without network.")
    message: str | None = option(None, "Upload", "Message of the commit.")


@verb(
    app,
    PushConfig,
    short_help="Upload a LoRA, an image prompt or presets to the hub.",
    positional=("folder", "repository"),
)
def push(config: PushConfig) -> None:
    """Upload a LoRA, an image prompt or presets to the hub, with a model card, in one commit.

    \b
    gen-accel push outputs/lora/lora OWNER/NAME --dry-run
    gen-accel push outputs/lora/lora OWNER/NAME --private

    What gen_accel wrote is uploaded: safetensors, JSON and README.md. All other files in the
    folder are left out and listed. The license is yours to name, in the head of README.md. The
    token is the one of `hf auth login`, or HF_TOKEN.
    """
    check_files("folder", config.folder)
    check_repository(config.repository)
    with loading():
        from gen_accel.lora import push as upload

    _print(
        upload(
            config.folder,
            config.repository,
            private=config.private,
            message=config.message,
            dry_run=config.dry_run,
        )
    )


def _print(done: "Push") -> None:
    from gen_accel.io import megabytes

    sizes = {
        name: megabytes(size) if size >= 1e5 else f"{size:,} bytes"
        for name, size in done.files.items()
    }
    whole = megabytes(sum(done.files.values()))
    print_rows({done.kind: f"{len(done.files)} files, {whole}, for {done.repository}", **sizes})
    if done.left_out:
        typer.echo(f"left out: {', '.join(done.left_out)}")
    for note in done.notes:
        typer.echo(f"note: {note}")
    if done.url is None:
        made = "the card that would be made" if done.is_new_card else "the card"
        typer.echo(f"{made}:\n\n{done.card}")
        typer.echo("nothing was uploaded: leave --dry-run out")
        return
    typer.echo(done.url)


class ExportConfig(Outputs):
    """A LoRA in the names of the original model."""

    VERB = "export"

    folder: Path = option(..., "LoRA", "Folder lora of a training, or its file.", metavar="DIR")
    out: Path = option(..., "LoRA", "File to write, .safetensors.", metavar="FILE", writes=True)
    format: Literal["comfyui"] = option(
        "comfyui", "LoRA", "Names of the layers; comfyui: those of the original model."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "LoRA", "Type of the matrices."
    )

    def outputs(self) -> dict[str, list[Path]]:
        place = expanded(self.folder)
        has_second = ((place if place.is_dir() else place.parent) / SECOND).is_dir()
        ends = [f"_{end}" for end in NOISE.values()] if has_second else [""]
        return {"out": [self.out.with_stem(f"{self.out.stem}{end}") for end in ends]}


@verb(app, ExportConfig, short_help="Write a LoRA as ComfyUI loads it.", positional=("folder",))
def export(config: ExportConfig) -> None:
    """Write a LoRA in the names of the original model, as ComfyUI loads it.

    \b
    gen-accel export outputs/lora/lora --out ComfyUI/models/loras/longer.safetensors
    gen-accel export outputs/lora/lora --out longer.safetensors --dtype bfloat16

    Any LoRA loader of ComfyUI loads the file. The node Load LoRA (gen_accel) attaches the
    attention that it was trained with, too. A LoRA for two experts becomes two files.
    """
    check_files("folder", config.folder)
    check_output(config.out, ".safetensors")
    with loading(None):
        from gen_accel.io import megabytes
        from gen_accel.lora.comfyui import export as write

    done = write(
        config.folder,
        config.out,
        format=config.format,
        dtype=config.dtype,
        overwrite=config.overwrite,
    )
    method = done.recipe.build_method()
    rows = {
        str(path): f"{layers} layers, {megabytes(path.stat().st_size)}"
        for path, layers in done.files.items()
    }
    print_rows({**rows, "largest rank": str(done.rank), "trained with": repr(method)})


class AssembleConfig(Outputs):
    """A model of single files."""

    VERB = "assemble"

    files: tuple[str, ...] = option(
        (),
        "Model",
        "File of weights, .safetensors or .gguf, as of ComfyUI; PART=FILE where it fits two.",
        metavar="FILE",
        reads=lambda text: part_of(text)[1],
    )
    base: str | None = option(
        None,
        "Model",
        "Folder or hub repository of a diffusers pipeline, for configs, tokenizer, and models "
        "without a file. Default: as diffusers knows the files.",
        metavar="DIR_OR_REPO",
        reads=model_files,
    )
    plus: str | None = option(
        None,
        "Model",
        "File of a part's weights after a training, whose difference to --minus is added to the "
        "part's file, as the sparse attention of TurboDiffusion; PART=FILE where it fits two.",
        metavar="FILE",
        reads=lambda text: part_of(text)[1],
    )
    minus: str | None = option(
        None,
        "Model",
        "File of the same weights before that training.",
        metavar="FILE",
        reads=lambda text: part_of(text)[1],
    )
    out: Path = option(
        ..., "Model", "Folder to make, which holds links to the files.", metavar="DIR", writes=True
    )


@verb(
    app,
    AssembleConfig,
    short_help="Make a model of single files, as ComfyUI has them.",
    positional=("files",),
)
def assemble(config: AssembleConfig) -> None:
    """Make a model of single files, as ComfyUI and musubi-tuner have them.

    \b
    gen-accel assemble wan2.1_t2v_1.3B_fp16.safetensors wan_2.1_vae.safetensors \\
        umt5_xxl_fp8_e4m3fn_scaled.safetensors --out models/wan
    gen-accel assemble transformer=high_noise.safetensors transformer_2=low_noise.safetensors \\
        --base Wan-AI/Wan2.2-T2V-A14B-Diffusers --out models/wan22
    gen-accel assemble rcm.safetensors --plus sla.safetensors --minus wan.safetensors \\
        --base Wan-AI/Wan2.1-T2V-1.3B-Diffusers --out models/turbowan
        rcm + (sla - wan), with the linear branches of sla, for --method turbowan

    The folder holds links to the files, and what else a pipeline needs: it is a --model for every
    verb and the page. Nothing is copied but configs and the tokenizer; a sum is written.
    """
    if not config.files:
        raise ValueError("give FILE: a file of weights, .safetensors or .gguf")
    for text in config.files:
        weights_named(text)
    if config.base is not None:
        check_pipeline(config.base)
    with loading():
        from gen_accel.pipelines.generation.assemble import assemble as make

    made = make(config.out, config.files, base=config.base, plus=config.plus, minus=config.minus)
    rows = {name: str(path) for name, path in made.files.items()}
    if made.merged:
        rows[made.merged] += f" + {config.plus} - {config.minus}"
    rows |= dict.fromkeys(made.others, f"from {made.base}")
    typer.echo(f"{made.folder}: a model, by the configs of {made.base}")
    print_rows(rows)
