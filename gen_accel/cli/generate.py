"""`gen-accel generate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gen_accel import names
from gen_accel.cli import early
from gen_accel.cli.app import app
from gen_accel.cli.from_settings import FromSettings, check_settings
from gen_accel.cli.json_out import JsonLines, JsonLinesFile
from gen_accel.cli.on_ray import RayAddress, RayVerb, RayWorkers, cluster_of, on_cluster
from gen_accel.cli.options import (
    DenseEnd,
    DenseKernel,
    DenseLayers,
    DenseStart,
    DenseSteps,
    GpuName,
    Kernel,
    MethodName,
    Metrics,
    PresetName,
    Settings,
    Steps,
    check_card,
    check_instead,
    check_metrics,
    check_only,
    method_of,
    schedule,
)
from gen_accel.cli.planned import plan_of, print_plan
from gen_accel.cli.printing import print_comparison, print_files, quiet
from gen_accel.cli.verb_fields import ConfigFile, PrintConfig, PrintSchema, show_config
from gen_accel.demo import NAME, adapter_named, model_named
from gen_accel.demo.words import check_known


@app.command(short_help="Videos from prompts, with any served pipeline.", cls=RayVerb)
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
    max_tokens: Annotated[
        int | None,
        typer.Option(help="That the text is padded or cut to. Without: the model's own."),
    ] = None,
    method: MethodName = "radial",
    settings: Settings = None,
    preset: PresetName = None,
    kernel: Kernel = "auto",
    dense_kernel: DenseKernel = None,
    dense_start: DenseStart = 0.0,
    dense_end: DenseEnd = 0.0,
    dense_steps: DenseSteps = 0,
    dense_layers: DenseLayers = "0",
    compare: Annotated[
        bool,
        typer.Option("--compare/--no-compare", help="Also run dense, and report the difference."),
    ] = False,
    metrics: Metrics = None,
    timed: Annotated[
        bool,
        typer.Option("--timed/--no-timed", help="Also measure the seconds spent in attention."),
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
            help="For video longer than the model was trained on, such as riflex, with an option "
            "riflex:k=4. Without: what --from-lora names; none: nothing.",
        ),
    ] = None,
    trained_frames: Annotated[
        int | None, typer.Option(help="That the model was trained on, where it is not known.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="First frame; see `gen-accel models`.")
    ] = None,
    last_image: Annotated[Path | None, typer.Option(metavar="FILE", help="Last frame.")] = None,
    video: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="To make anew, to go on from, or to be led by."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Share of --video to make anew, up to 1. Without: the model's own."),
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
        bool,
        typer.Option(
            "--overwrite/--no-overwrite", help="Of several prompts, make again what is done."
        ),
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what this run will cost, and do not run.")
    ] = False,
    gpu: GpuName = None,
    preview: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Each N steps, show what there is so far at OUT's .preview.png."
        ),
    ] = None,
    ray: RayAddress = None,
    ray_workers: RayWorkers = None,
    json: JsonLinesFile = None,
    keep_settings: Annotated[
        bool,
        typer.Option(
            "--settings/--no-settings",
            help="Keep in each file what it was made with, prompts and paths included.",
        ),
    ] = True,
    from_settings: FromSettings = None,
    config: ConfigFile = None,
    print_config: PrintConfig = False,
    print_schema: PrintSchema = False,
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

    Keep the first fifth or quarter of the steps dense: they decide what a video shows. With many
    steps, --dense-start 0.25 is a good start. Sizes that the model cannot make are refused, with
    the nearest that it can.
    """
    if print_config:
        show_config(context)
        return
    lines = JsonLines(context, json)
    techniques = _techniques(extend)
    early.check_video(out)
    early.check_output(save_latents, ".safetensors")
    early.check_model(model)
    if model == NAME:
        check_known(*(prompt or ()))
    early.check_names(
        method=method,
        kernels={"kernel": kernel, "dense_kernel": dense_kernel},
        device=device,
        techniques=techniques or (),
    )
    names.check_loading(dtype, offload)
    early.check_loras(lora or ())
    early.check_files("LoRA", [from_lora])
    early.check_preset(preset, steps)
    figures = check_metrics(metrics)
    if figures is not None and not compare:
        raise ValueError(f"--metrics {metrics} goes with --compare")
    check_instead(context, preset)
    if from_latents is not None:
        own = ("model", "out", "fps", "dtype", "device", "offload", "json")
        check_only(context, "from_latents", own)
    early.check_files("file of latents", [from_latents])
    early.check_files("file of prompts", [prompts])
    early.check_sources("adapter", image_adapter)
    early.check_sources("image encoder", image_encoder)
    early.check_files("image", [*(image_prompt or ()), *(image_mask or ()), image_negative])
    early.check_given(
        model, image, last_image, video, strength=strength, techniques=techniques or ()
    )
    check_settings(context)
    cluster = cluster_of(ray, ray_workers, device)
    if cluster is not None and plan:
        raise ValueError(f"--plan makes no videos: leave --ray {ray} out")
    check_card(gpu)
    if gpu is not None and not plan:
        raise ValueError(f"--gpu {gpu} is for --plan: a run takes --device")
    early.announce("torch and diffusers" if plan else "torch, diffusers and the model")
    quiet()
    from gen_accel.pipelines.generation.generate import decode_latents, read_prompts
    from gen_accel.pipelines.generation.generate import generate as run
    from gen_accel.pipelines.generation.given import Given
    from gen_accel.pipelines.generation.loading import Loading
    from gen_accel.pipelines.generation.sampling import Clip

    source = model_named(model)
    loading = Loading(dtype, device, offload, tuple(lora or ()))
    if from_latents is not None:
        path = decode_latents(source, from_latents, out=out, fps=fps, loading=loading)
        print_files({"video": path})
        lines.write([{"files": {"video": path}}])
        return
    texts = [*(prompt or ()), *(read_prompts(prompts) if prompts is not None else ())]
    if model == NAME:
        check_known(*texts)
    dense = schedule(dense_start, dense_end, dense_steps, dense_layers)
    unmade: list[ValueError] = []
    make = plan_of(gpu) if plan else run
    if cluster is not None:
        make = on_cluster(run, cluster, unmade)
    made = make(
        source,
        texts,
        out=out,
        **_attention(method, settings, dense, from_lora, preset),
        kernel=kernel,
        dense_kernel=dense_kernel,
        clip=Clip(
            frames, height, width, steps, guidance_scale, negative_prompt, seed, fps, max_tokens
        ),
        loading=loading,
        compare=compare,
        timed=timed,
        metrics=figures,
        techniques=techniques,
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
        given=Given(image, last_image, video, strength),
        numbered=prompts is not None,
        resume=not overwrite,
        preview=preview,
        settings=keep_settings,
        named=_names(model=model, image_adapter=image_adapter),
    )
    for one in made:
        (print_plan if plan else _print_made)(one)
    lines.write(one.to_dict() for one in made)
    for error in unmade:
        raise error


def _attention(
    method: str,
    settings: list[str] | None,
    dense: Any,
    from_lora: Path | None,
    preset: str | None,
) -> dict[str, Any]:
    """Return a method with its schedule, or a LoRA or preset, with its own schedule where none is
    given."""
    own = None if dense == schedule() else dense
    if preset is not None:
        return {"preset": preset, "from_lora": from_lora, "schedule": own}
    if from_lora is None:
        return {"method": method_of(method, settings), "schedule": dense}
    _check_method(from_lora, method, settings)
    return {"from_lora": from_lora, "schedule": own}


def _check_method(from_lora: Path, method: str, settings: list[str] | None) -> None:
    """Refuse another method than the LoRA's. A "module:Class" may name the LoRA's own method, as
    the file imports nothing."""
    from gen_accel.attention_processors import method_class
    from gen_accel.attention_processors.attached.recipe import read_recipe

    other = method != "radial"
    if ":" in method:
        kind = method_class(method)
        other = type(read_recipe(from_lora).build_method()) is not kind
    if other or settings:
        raise ValueError("--from-lora attaches its own method: leave --method and --set out")


def _techniques(extend: str | None) -> tuple[str, ...] | None:
    if extend is None:
        return None
    return () if extend == "none" else tuple(extend.split(","))


def _images(images: list[Path] | None, adapter: str | None, **options: Any) -> Any:
    """Build the image input; None without an image prompt."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if images and adapter is not None:
        from gen_accel.pipelines.generation.image_input import ImageInput

        return ImageInput(tuple(images), adapter_named(adapter), **given)
    # Prompt and adapter need each other, and the other options need both.
    names = [*(["prompt"] if images else []), *(["adapter"] if adapter is not None else [])]
    names += [name.removesuffix("s") for name in given]
    if not names:
        return None
    wrong = ", ".join(f"--image-{name}" for name in names)
    raise ValueError(f"an image prompt is --image-prompt and --image-adapter, got {wrong} alone")


def _names(**given: str | None) -> dict[str, str]:
    """Select the options that the embedded model or adapter is named by."""
    return {option: name for option, name in given.items() if name == NAME}


def _print_made(one: Any) -> None:
    typer.echo(f"{one.prompt}  (seed {one.seed}, {one.seconds:.1f} s)")
    if one.image:
        typer.echo(one.image)
    if one.report is None:
        typer.echo(str(one.summary))
        if one.extension:
            typer.echo(one.extension)
    else:
        print_comparison(one.report)
    print_files(one.files)
