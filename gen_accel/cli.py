"""gen-accel: each verb calls one function of the library and prints what it returns."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gen_accel.lora import commands

BAD_INPUT, INTERRUPTED = 2, 130


class OneLineErrors(TyperGroup):
    """What the library or the parser refuses becomes one line on stderr, without a traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["args"] = [*args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            _leave()
            return result
        except typer.Exit:
            _leave()
            raise
        except KeyboardInterrupt:
            typer.echo("interrupted; no file was left half written", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # nobody reads on, as in `| head`; the parser ends the program
            raise
        except (ValueError, TypeError, OSError) as error:
            if ctx.params.get("traceback"):
                raise
            message = str(error) or type(error).__name__
        except _USAGE_ERROR as error:
            message = error.format_message() + _what_came(error, ctx.meta["args"])
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise typer.Exit(BAD_INPUT)


# ClickException, of whichever Click it is that typer carries.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[2]


def _what_came(error: Any, args: list[str]) -> str:
    """The value that an option refused, which the parser's own messages leave out."""
    if not isinstance(error, typer.BadParameter):
        return ""
    for name in getattr(error.param, "opts", ()):
        for i, arg in enumerate(args[:-1]):
            if arg == name:
                return f", got {args[i + 1]!r}"
    return ""


def _leave() -> None:
    """Leave the other processes of a launch. The threads that wait for them would be cut off when
    the interpreter ends, which can abort it."""
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # terminals that know no block characters
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    app()


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"gen-accel {version('gen_accel')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the code an error arose.")
    ] = False,
) -> None:
    """Sparse attention that makes video diffusion models faster.

    \b
    gen-accel demo                 one clip, dense and sparse, side by side; no download
    gen-accel list                 methods with their options, kernels
    gen-accel models               the models that are served, and what of them
    gen-accel show radial --frames 33 --height 12 --width 12
    gen-accel estimate --model Wan2.1-T2V-1.3B --height 480 --width 832 --frames 161
    gen-accel simulate neighborhood --frames 30 --height 48 --width 80 --density 0.1
    gen-accel generate --model DIR_OR_REPO --prompt "a cat surfs" --out cat.mp4 --compare
    gen-accel train lora.yaml      a LoRA for longer videos; `cache` encodes its clips before
    gen-accel metrics cat.mp4      loops, drift, motion and flicker; or against a reference
    gen-accel doctor               versions, devices, what is missing

    A method says which tokens see which and changes the answer; a kernel computes it and does not.
    `gen-accel VERB --help` has examples.
    """


MethodName = Annotated[str, typer.Option("--method", help="See `gen-accel list`.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Set a field of the method. May be repeated."
    ),
]
Kernel = Annotated[str, typer.Option(help="auto, or a name that never falls back to another.")]
DenseStart = Annotated[float, typer.Option(help="Share of the first steps that stay dense.")]
DenseEnd = Annotated[float, typer.Option(help="Share of the last steps that stay dense.")]
DenseSteps = Annotated[int, typer.Option(help="How many of the first steps stay dense.")]
DenseLayers = Annotated[
    str, typer.Option(help="How many of the first layers stay dense, or their numbers: 0,7.")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. Without: the model's own.")]


@app.command(short_help="One clip, dense and sparse, side by side.")
def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write to. Without: outputs/demo, or outputs/demo_image with an image.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="A caption such as: a blue square moves up slowly.")
    ] = None,
    image_prompt: Annotated[
        Path | None,
        typer.Option(metavar="IMAGE", help="What moves is what this picture shows."),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="1 more than a multiple of 4.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise that both start from.")] = 0,
    method: Annotated[
        str | None, typer.Option(help="Without: radial. See `gen-accel list`.")
    ] = None,
    settings: Settings = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or mps. The model is too small for a GPU to gain.")
    ] = "cpu",
    model: Annotated[
        Path | None, typer.Option(help="Another folder than the embedded model.")
    ] = None,
    with_lora: Annotated[
        bool | None,
        typer.Option(
            "--with-lora/--without-lora",
            help="Also 129 frames with the long-video LoRAs and without. [the embedded model]",
        ),
    ] = None,
) -> None:
    """Generate one clip dense and sparse with the embedded model, and compare them.

    Writes the clips side by side and each alone, a picture of the mask, report.html with
    everything on one page, and report.json. Needs no GPU and no download.

    \b
    gen-accel demo
    gen-accel demo --prompt "a blue square moves up slowly" --seed 3
    gen-accel demo --frames 129 --steps 10                      shorter, and less to gain
    gen-accel demo --method radial --set decay_factor=0.5       sparser
    gen-accel demo --method neighborhood --set window=9,7,7
    python -m gen_accel.demo.clips --images --out outputs/stills --frames 5 --count 72
    gen-accel demo --image-prompt outputs/stills/0008.png

    The prompts that the model knows: a COLOUR SHAPE moves DIRECTION SPEED, with red, green, blue
    or yellow; circle, square or triangle; left, right, up or down; slowly or quickly.

    With --image-prompt, 33 frames of "something moves right slowly", or of --prompt: the text
    says how it moves, a picture such as those of the first command what does. Without --out, into
    outputs/demo_image.
    """
    commands.quiet()
    from gen_accel.attention_processors.options import method_from

    given: dict[str, Any] = {"prompt": prompt, "frames": frames, "steps": steps, "model": model}
    if method is not None or settings:
        given["method"] = method_from(method or "radial", settings or ())
    if image_prompt is None:
        from gen_accel.demo.job import run

        given |= {"out": out, "with_lora": with_lora}
    else:
        from gen_accel.demo.image_prompts import run

        if with_lora is not None:
            raise ValueError("--with-lora and --without-lora do not go with --image-prompt")
        given |= {"out": out, "image": image_prompt}
    chosen = {name: value for name, value in given.items() if value is not None}
    report, files = run(seed=seed, device=device, **chosen)
    _print_comparison(report)
    _print_files(files)


@app.command(short_help="Videos from prompts, with any served pipeline.")
def generate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(help="Folder of a diffusers pipeline, a hub repo, or demo: the embedded."),
    ],
    out: Annotated[
        Path, typer.Option(help=".mp4, .gif, .png, or no suffix for a folder of PNG frames.")
    ] = Path("outputs/video.mp4"),
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to show. May be repeated.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A text file with one prompt on each line; outputs are numbered."
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    frames: Annotated[int | None, typer.Option(help="Without: the model's own number.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    steps: Steps = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="1 is without guidance. Without: the model's own, or 1 with a LoRA that holds it."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Each further prompt takes the next.")] = 0,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Frames a second of the file, which some models are told too. Without: the "
            "model's own."
        ),
    ] = None,
    method: MethodName = "radial",
    settings: Settings = None,
    kernel: Kernel = "auto",
    dense_start: DenseStart = 0.0,
    dense_end: DenseEnd = 0.0,
    dense_steps: DenseSteps = 0,
    dense_layers: DenseLayers = "0",
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run dense, and report the difference.")
    ] = False,
    timed: Annotated[
        bool, typer.Option("--timed", help="Also measure the seconds spent in attention.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    offload: Annotated[
        str, typer.Option(help="What waits in CPU memory: none, model, group or sequential.")
    ] = "none",
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR_OR_REPO[:WEIGHT]", help="May be repeated."),
    ] = None,
    from_lora: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Load a LoRA of `gen-accel train`, and attach what it knows."
        ),
    ] = None,
    extend: Annotated[
        str | None,
        typer.Option(
            metavar="TECHNIQUE[,TECHNIQUE]",
            help="For video longer than the model was trained on, such as riflex. Without: what "
            "--from-lora names; none: nothing.",
        ),
    ] = None,
    trained_frames: Annotated[
        int | None, typer.Option(help="That the model was trained on, where it is not known.")
    ] = None,
    image_prompt: Annotated[
        list[Path] | None,
        typer.Option(metavar="IMAGE", help="Go by it beside the text. Several act together."),
    ] = None,
    image_adapter: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="What reads it: a file, folder, hub repo, or demo."),
    ] = None,
    image_scale: Annotated[
        float | None, typer.Option(help="How strongly; 0 is not at all. Without: 1.")
    ] = None,
    image_negative: Annotated[
        Path | None,
        typer.Option(metavar="IMAGE", help="What the negative prompt goes by. Without: no image."),
    ] = None,
    image_mask: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="White where the image acts. One, or one for each image."
        ),
    ] = None,
    image_encoder: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_REPO", help="A CLIP vision model, where the adapter needs one."
        ),
    ] = None,
    save_latents: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also keep the latents, as .safetensors; not of every model."
        ),
    ] = None,
    from_latents: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Decode what --save-latents kept.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Of several prompts, make again what is done.")
    ] = False,
) -> None:
    """Generate videos with any diffusers video pipeline of `gen-accel models`.

    \b
    gen-accel generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat surfs" \\
        --frames 161 --height 480 --width 832 --dense-start 0.25 --out cat.mp4
    gen-accel generate --model models/wan --prompt "a cat surfs" --compare --out cat.mp4
        also cat.dense.mp4, cat.side_by_side.mp4 and cat.json
    gen-accel generate --model models/wan --prompts prompts.txt --out clips/clip.gif
        clip-000.gif, clip-001.gif and so on, with seeds 0, 1, ...; again: what is not done yet
    accelerate launch --num_processes 4 -m gen_accel generate --model models/wan \\
        --prompts prompts.txt --out clips/clip.mp4
        the same files, a part from each process, on a GPU of its own
    gen-accel generate --model models/wan --prompt "a cat" --method neighborhood \\
        --set window=9,12,12 --set is_causal=true,false,false --kernel flex
    gen-accel generate --model models/wan --prompt "a cat" --method dense --lora loras/long:0.8
    gen-accel generate --model models/wan --prompt "a cat" --from-lora outputs/lora/lora
    gen-accel generate --model models/wan --prompt "a cat" --frames 161 --extend riflex \\
        --save-latents cat.safetensors --out cat.mp4
    gen-accel generate --model models/wan --from-latents cat.safetensors --out cat.gif
    gen-accel generate --model models/wan --prompt "it surfs" --image-prompt cat.png \\
        --image-adapter outputs/lora/image_prompt --image-scale 0.8 --out cat.mp4

    Keep the first fifth or quarter of the steps dense: they decide what a video shows. With many
    steps, --dense-start 0.25 is a good start. Sizes that the model cannot make are refused, with
    the nearest that it can.
    """
    commands.quiet()
    from gen_accel.attention_processors.options import method_from
    from gen_accel.pipelines.generate import decode_latents, read_prompts
    from gen_accel.pipelines.generate import generate as run
    from gen_accel.pipelines.sampling import Clip, Loading

    loading = Loading(dtype, device, offload, tuple(lora or ()))
    if from_latents is not None:
        _only(context, "from_latents", ("model", "out", "fps", "dtype", "device", "offload"))
        path = decode_latents(model, from_latents, out=out, fps=fps, loading=loading)
        _print_files({"video": path})
        return
    texts = [*(prompt or ()), *(read_prompts(prompts) if prompts is not None else ())]
    chosen: dict[str, Any] = {
        "method": method_from(method, settings or ()),
        "schedule": _schedule(dense_start, dense_end, dense_steps, dense_layers),
    }
    if from_lora is not None:
        if method != "radial" or settings:
            raise ValueError("--from-lora attaches its own method: leave --method and --set out")
        given = chosen["schedule"]
        chosen = {"from_lora": from_lora, "schedule": None if given == _schedule() else given}
    made = run(
        model,
        texts,
        out=out,
        **chosen,
        kernel=kernel,
        clip=Clip(
            frames,
            height,
            width,
            steps,
            guidance_scale,
            negative_prompt,
            seed,
            fps,
        ),
        loading=loading,
        compare=compare,
        timed=timed,
        techniques=_techniques(extend),
        trained_frames=trained_frames,
        latents=save_latents,
        image=_images(
            image_prompt,
            image_adapter,
            scale=image_scale,
            negative=image_negative,
            masks=tuple(image_mask or ()),
            encoder=image_encoder,
        ),
        numbered=prompts is not None,
        resume=not overwrite,
    )
    for one in made:
        typer.echo(f"{one.prompt}  (seed {one.seed}, {one.seconds:.1f} s)")
        if one.image:
            typer.echo(one.image)
        if one.report is None:
            typer.echo(str(one.summary))
            if one.extension:
                typer.echo(one.extension)
        else:
            _print_comparison(one.report)
        _print_files(one.files)


@app.command(short_help="A picture of what a method keeps.")
def show(
    method: Annotated[str, typer.Argument(help="See `gen-accel list`.")],
    frames: Annotated[int, typer.Option(help="In tokens: of the latent video.")],
    height: Annotated[int, typer.Option(help="In tokens.")],
    width: Annotated[int, typer.Option(help="In tokens.")],
    text: Annotated[int, typer.Option(help="Text tokens in the same attention.")] = 0,
    settings: Settings = None,
    token: Annotated[
        str | None,
        typer.Option(metavar="F,R,C", help="Frame, row and column of the token to look from."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A .png to write instead of drawing here.")
    ] = None,
) -> None:
    """Draw which blocks a method keeps, and what one token sees, before any model runs.

    Of block_mixture and sparse_linear, whose pattern depends on q and k, it is that of smooth
    random ones.

    Sizes are in tokens. From pixels, for Wan: frames (n - 1) / 4 + 1, height / 16, width / 16,
    so that 161 frames of 720 x 1280 are 41 x 45 x 80. For the demo model: height / 8, width / 8.

    \b
    gen-accel show radial --frames 33 --height 12 --width 12
    gen-accel show radial --frames 41 --height 45 --width 80 --set rule=paper --out mask.png
    gen-accel show neighborhood --frames 9 --height 12 --width 12 --set window=3,5,5 \\
        --token 0,0,0 --out corner.png
    """
    from gen_accel.attention_processors.options import method_from
    from gen_accel.measure.pictures import mask_picture, mask_text
    from gen_accel.video import VideoShape

    chosen = method_from(method, settings or ())
    video = VideoShape(frames, height, width, text)
    if out is not None:
        typer.echo(mask_picture(chosen, video, out, token=_token(token)))
    elif token is not None:
        raise ValueError("--token is drawn in a picture only: add --out mask.png")
    else:
        typer.echo(mask_text(chosen, video, _terminal_width()))


@app.command(short_help="The speed-up to expect, without running.")
def estimate(
    model: Annotated[
        str,
        typer.Option(
            help="Folder of a Wan pipeline, Wan2.1-T2V-1.3B, Wan2.1-T2V-14B and other names of "
            "Wan's, or demo: the embedded."
        ),
    ],
    frames: Annotated[int, typer.Option(help="Of the video, not latents.")],
    height: Annotated[int, typer.Option(help="Pixels.")],
    width: Annotated[int, typer.Option(help="Pixels.")],
    method: MethodName = "radial",
    settings: Settings = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    dense_start: DenseStart = 0.0,
    dense_end: DenseEnd = 0.0,
    dense_steps: DenseSteps = 0,
    dense_layers: DenseLayers = "0",
    efficiency: Annotated[
        float | None,
        typer.Option(help="Share of the ideal speed-up that the kernel reaches; else measured."),
    ] = None,
) -> None:
    """Tokens, FLOPs and the speed-up to expect, without running or loading the model.

    \b
    gen-accel estimate --model Wan2.1-T2V-14B --height 720 --width 1280 --frames 161
    gen-accel estimate --model models/wan --height 480 --width 832 --frames 81 \\
        --set decay_factor=0.2 --dense-start 0.25 --dense-layers 1
    gen-accel estimate --model Wan2.1-T2V-1.3B --height 480 --width 832 --frames 81 \\
        --efficiency 0.7

    Kernel efficiency is measured on this machine the first time, which takes seconds.
    """
    from gen_accel.attention_processors.options import method_from
    from gen_accel.measure.estimate import estimate as run

    result = run(
        model,
        method_from(method, settings or ()),
        height=height,
        width=width,
        num_frames=frames,
        schedule=_schedule(dense_start, dense_end, dense_steps, dense_layers),
        steps=steps,
        efficiency=efficiency,
    )
    typer.echo(str(result))


@app.command(short_help="The bound that tiles put on a speed-up.")
def simulate(
    method: Annotated[str, typer.Argument(help="neighborhood.")],
    frames: Annotated[int, typer.Option(help="In tokens: of the latent video.")],
    height: Annotated[int, typer.Option(help="In tokens.")],
    width: Annotated[int, typer.Option(help="In tokens.")],
    window: Annotated[
        str | None, typer.Option(metavar="F,R,C", help="Without: searched under --density.")
    ] = None,
    stride: Annotated[
        str | None, typer.Option(metavar="F,R,C", help="Without: the best are listed.")
    ] = None,
    dilation: Annotated[str, typer.Option(metavar="F,R,C")] = "1,1,1",
    is_causal: Annotated[str, typer.Option(metavar="F,R,C")] = "false,false,false",
    tile_q: Annotated[
        str | None,
        typer.Option(metavar="F,R,C", help="Query tile. Without: NATTEN's on Hopper, Blackwell."),
    ] = None,
    tile_k: Annotated[str | None, typer.Option(metavar="F,R,C", help="Key tile.")] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Key tiles start at the first key, not on a grid.")
    ] = False,
    density: Annotated[
        float | None, typer.Option(help="Most of the token pairs that may be kept, 0 to 1.")
    ] = None,
    top: Annotated[int, typer.Option(help="How many choices to list.")] = 10,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the figures there.")
    ] = None,
) -> None:
    """How much faster neighborhood attention can be, for a stride and tiles, without running.

    A kernel computes whole tiles of keys, so that a window often costs more than the pairs that it
    keeps. Sizes are in tokens: see `gen-accel show --help`.

    \b
    gen-accel simulate neighborhood --frames 30 --height 48 --width 80 --window 18,24,24
        the best strides and tiles for a window
    gen-accel simulate neighborhood --frames 30 --height 48 --width 80 --density 0.1
        the best windows too, that keep a tenth of all pairs or a little less
    gen-accel simulate neighborhood --frames 30 --height 48 --width 80 --window 18,24,24 \\
        --stride 16,8,8 --tile-q 4,8,8 --tile-k 2,8,8 --json bound.json
        one choice
    gen-accel simulate neighborhood --frames 1 --height 256 --width 256 --window 1,80,80 \\
        --tile-q 1,16,16 --tile-k 1,16,8
        an image; the best strides for a kernel's tiles

    Of two choices with one bound, take the smaller stride: its windows are centred better.
    """
    from gen_accel.attention_processors.options import method_from
    from gen_accel.measure import write_json
    from gen_accel.measure.simulate import TILES, best_choices
    from gen_accel.measure.simulate import simulate as run
    from gen_accel.video import VideoShape

    if method != "neighborhood":
        raise ValueError(f"simulate knows the method 'neighborhood', got {method!r}")
    tiles = _tiles(tile_q, tile_k)
    if stride is not None and (window is None or not tiles or density is not None):
        raise ValueError(
            "--stride is for one choice, with --window, --tile-q and --tile-k, without --density"
        )
    given = {"window": window or "1,1,1", "stride": stride or "1,1,1"}
    given |= {"dilation": dilation, "is_causal": is_causal}
    chosen = method_from(method, [f"{name}={value}" for name, value in given.items()])
    video = VideoShape(frames, height, width)
    if stride is None:
        bounds = best_choices(
            video,
            chosen.window if window else None,
            density=density,
            dilation=chosen.dilation,
            is_causal=chosen.is_causal,
            tiles=tiles or TILES,
            dynamic=dynamic,
            top=top,
        )
        _print_bounds(bounds)
    else:
        [(query, key)] = tiles
        bounds = [run(video, chosen, tile_q=query, tile_k=key, dynamic=dynamic)]
        typer.echo(str(bounds[0]))
    if json is not None:
        write_json(json, [bound.to_dict() for bound in bounds])
        typer.echo(json)


@app.command(short_help="What a video does over time, or its distance to another.")
def metrics(
    video: Annotated[Path, typer.Argument(help="A video file, or a folder of PNG frames.")],
    reference: Annotated[
        Path | None, typer.Argument(help="To compare with: the same scene, made another way.")
    ] = None,
    lag: Annotated[
        int | None,
        typer.Option(help="Frames: also the similarity that far apart. Without a reference."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the figures there.")
    ] = None,
) -> None:
    """Loops, drift, motion and flicker of a video; or PSNR, SSIM and LPIPS against a reference.

    \b
    gen-accel metrics long.mp4
    gen-accel metrics long.mp4 --lag 81 --json long.json
        how alike frames are that lie 81 apart: 1 is a repetition, 0 as alike as any two
    gen-accel metrics sparse.mp4 dense.mp4

    Frames are read once, a few at a time, so that any length fits. LPIPS needs torchvision and
    its weights on this machine; nothing is downloaded.
    """
    from gen_accel.measure import write_json
    from gen_accel.measure.motion import measure_file
    from gen_accel.measure.quality import compare_files

    if reference is None:
        found: Any = measure_file(video, lag=lag)
        _print_motion(found)
    else:
        if lag is not None:
            raise ValueError(f"--lag is for a video without a reference, got {lag}")
        found = compare_files(video, reference)
        _print_fidelity(found)
    if json is not None:
        write_json(json, found.to_dict())
        typer.echo(json)


@app.command(name="list", short_help="Methods with their options, and kernels.")
def list_() -> None:
    """Methods with their options, and kernels with where they run.

    \b
    gen-accel list
    gen-accel generate ... --method radial --set decay_factor=0.5 --set sink=false

    A kernel that cannot run on this machine is listed with the reason.
    """
    from gen_accel import inventory

    typer.echo("Methods, which change the answer:")
    for method in inventory.methods():
        typer.echo(f"\n  {method.name}: {method.description}")
        for field, (default, values) in method.fields.items():
            typer.echo(f"    {field}={default}".ljust(30) + f" {values}")
    typer.echo("\nKernels, which do not:")
    for kernel in inventory.kernels():
        typer.echo(f"\n  {kernel.name}: {kernel.description}")
        for where, reasons in kernel.refused.items():
            verdict = f"no: {'; '.join(reasons)}" if reasons else "yes"
            typer.echo(f"    {where}".ljust(20) + verdict)
    typer.echo("\nModels: see `gen-accel models`.")


@app.command(short_help="The models that are served, as a table.")
def models(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As the page docs/models.md.")
    ] = False,
) -> None:
    """Classes of diffusers that are served, with their methods, the order of their tokens, what a
    LoRA trains, and whether they take image prompts; and those that are refused, with the reason.

    \b
    gen-accel models
    gen-accel models --markdown > docs/models.md
    """
    from rich.console import Console
    from rich.table import Table

    from gen_accel import inventory

    if markdown:
        typer.echo(inventory.models_page(), nl=False)
        return
    found = inventory.models()
    table = Table("models")
    table.add_column("class", no_wrap=True)
    for name in ("methods", "tokens", "LoRA targets", "image prompts"):
        table.add_column(name)
    for model in found:
        if not model.refused:
            targets = ", ".join(model.lora_targets["attention"])
            images = "yes" if model.image_prompts else ""
            methods = inventory.methods_of(model)
            table.add_row(model.models, model.name, methods, model.order, targets, images)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    for model in found:
        if model.refused:
            typer.echo(f"{model.name} cannot be served: {model.refused}")


@app.command(short_help="Compile the CPU kernel for this machine.")
def build() -> None:
    """Compile the kernel `native` for this machine: 15 seconds, once. It is the fastest on a CPU,
    forward and backward, and "auto" takes it from then on; all methods run without it too.

    Needs a C++ compiler, on Linux and x86-64. Lies in the user's cache; a new version, another
    torch or another processor needs it built anew.

    \b
    gen-accel build
    """
    from gen_accel.kernels.native.build import build as compile_kernel

    try:
        typer.echo(compile_kernel())
    except RuntimeError as error:
        raise ValueError(str(error)) from error


@app.command(short_help="Versions, devices, and what is missing.")
def doctor() -> None:
    """Versions and devices, what is missing, and the command that adds it.

    \b
    gen-accel doctor
    """
    from gen_accel.measure.environment import checks

    found = checks()
    _print_rows({check.name: check.found or "missing" for check in found})
    for check in found:
        if check.found is None:
            typer.echo(f"{check.name}: {check.fix}")


def _only(context: Any, option: str, others: tuple[str, ...]) -> None:
    """Refuse what the user gave besides `option` and `others`, before it is ignored."""
    given = [
        parameter
        for parameter in context.command.params
        if getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    ]
    wrong = [p.opts[0] for p in given if p.name not in (option, *others)]
    if wrong:
        allowed = ", ".join(f"--{name}" for name in others)
        name = option.replace("_", "-")
        raise ValueError(f"--{name} goes with {allowed} only, got {', '.join(wrong)}")


def _techniques(extend: str | None) -> tuple[str, ...] | None:
    if extend is None:
        return None
    return () if extend == "none" else tuple(extend.split(","))


def _schedule(start: float = 0.0, end: float = 0.0, steps: int = 0, layers: str = "0") -> Any:
    from gen_accel.pipelines.schedule import Schedule

    numbers = _numbers(layers, "--dense-layers")
    return Schedule(
        dense_layers=numbers if "," in layers else numbers[0],
        dense_steps=steps,
        dense_start=start,
        dense_end=end,
    )


def _images(images: list[Path] | None, adapter: str | None, **options: Any) -> Any:
    """None without an image prompt."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if images and adapter is not None:
        from gen_accel.pipelines.generate import ImageInput

        return ImageInput(tuple(images), adapter, **given)
    # Neither is of use without the other, and the rest not without both.
    names = [*(["prompt"] if images else []), *(["adapter"] if adapter is not None else [])]
    names += [name.removesuffix("s") for name in given]
    if not names:
        return None
    wrong = ", ".join(f"--image-{name}" for name in names)
    raise ValueError(f"an image prompt is --image-prompt and --image-adapter, got {wrong} alone")


def _tiles(query: str | None, key: str | None) -> Any:
    if query is None and key is None:
        return ()
    if query is None or key is None:
        raise ValueError("--tile-q and --tile-k go together, got one of them")
    return ((_numbers(query, "--tile-q"), _numbers(key, "--tile-k")),)


def _token(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    numbers = _numbers(text, "--token")
    if len(numbers) != 3:
        raise ValueError(f"--token needs a frame, a row and a column, as in 0,3,3, got {text!r}")
    return numbers[0], numbers[1], numbers[2]


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.strip(",").split(","))
    except ValueError:
        raise ValueError(f"{option} takes whole numbers, as in 0,3,3, got {text!r}") from None


def _print_comparison(report: dict[str, Any]) -> None:
    density = report["density"]
    rows = {
        "dense": f"{report['dense_seconds']:.1f} s for {report['steps']} steps",
        "sparse": f"{report['sparse_seconds']:.1f} s, {report['speedup']:.2f}x as fast",
        "with decoding": f"{report['total_speedup']:.2f}x as fast",
        "tokens": f"{report['tokens']}",
        "density": "all dense" if density is None else f"{density:.3f} where sparse",
        "kernel": report["kernel"],
        "PSNR, SSIM": f"{report['psnr_db']:.1f} dB, {report['ssim']:.3f} against dense",
    }
    if report["compile_seconds"]:
        rows["compiling"] = f"{report['compile_seconds']:.1f} s, not counted"
    if "detector" in report:
        rows["dense shows"] = report["detector"]["dense"]["shows"]
        rows["sparse shows"] = report["detector"]["sparse"]["shows"]
    if "longer" in report:
        made = report["longer"]
        rows[f"{made['frames']} frames"] = f"{made['dense']['shows']} (dense, no LoRA)"
        for name, clip in made["trained"].items():
            title = ", ".join((name, *clip["techniques"]))
            rows[title] = f"{clip['shows']}, {clip['times_as_fast']:.2f}x as fast"
    _print_rows(rows)


def _print_motion(found: Any) -> None:
    red, green, blue = found.color_drift
    at = "" if found.loop_lag is None else f", after {found.loop_lag} frames"
    rows = {
        "frames": f"{found.frames} at {found.fps:g} a second",
        "loop score": f"{found.loop_score:.3f}{at}",
        "colour drift": f"{red:+.4f} red, {green:+.4f} green, {blue:+.4f} blue in 100 frames",
        "contrast drift": f"{found.contrast_drift:+.4f} in 100 frames",
        "dynamic degree": f"{found.dynamic_degree:.3f}, the fastest move {found.flow:.2f} pixels",
        "flicker": f"{found.flicker:.4f}, 1 is still",
    }
    if found.similarity is not None:
        rows["similarity"] = f"{found.similarity:.3f} at the lag asked for"
    _print_rows(rows)


def _print_fidelity(found: Any) -> None:
    rows = {
        "frames": f"{found.frames}",
        "PSNR": f"{found.psnr_db:.2f} dB",
        "SSIM": f"{found.ssim:.4f}",
    }
    if found.lpips is not None:
        rows["LPIPS"] = f"{found.lpips:.4f}, 0 is identical"
    _print_rows(rows)
    if found.lpips_missing is not None:
        typer.echo(found.lpips_missing)


def _print_files(files: dict[str, Path]) -> None:
    _print_rows({name: str(path) for name, path in files.items()})


def _print_rows(rows: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print()


def _print_bounds(bounds: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    first = bounds[0]
    typer.echo(f"{first.video} = {first.video.tokens} tokens")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("window")
    for name in ("stride", "tile-q", "tile-k", "bound", "by FLOPs", "most", "of", "unmasked"):
        table.add_column(name, justify="left" if "-" in name or name == "stride" else "right")
    for bound in bounds:
        sides = (bound.method.window, bound.method.stride, bound.tile_q, bound.tile_k)
        table.add_row(
            *(",".join(map(str, side)) for side in sides),
            f"{bound.speedup:.2f}x",
            f"{bound.flop_speedup:.2f}x",
            f"{bound.most}",
            f"{bound.key_tiles:g}",
            f"{bound.whole:.0%}",
        )
    Console(highlight=False, markup=False).print(table)
    typer.echo("most of the key tiles that a query tile visits; share of them without a mask")


def _terminal_width() -> int:
    from shutil import get_terminal_size

    return get_terminal_size().columns


commands.add_to(app)
