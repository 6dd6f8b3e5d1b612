"""`gen-accel demo`."""

from pathlib import Path

from gen_accel.cli.app import app
from gen_accel.cli.loading import loading
from gen_accel.cli.printing import print_comparison, print_files
from gen_accel.cli.verb import verb
from gen_accel.config import Outputs, option
from gen_accel.demo import check_known
from gen_accel.hub import check_pipeline
from gen_accel.paths import DEMO, check_files, check_folder_path, expanded, model_files
from gen_accel.pipelines.generation.config import Device, LinearChoice, MethodChoice


class DemoConfig(Device, MethodChoice, LinearChoice, Outputs):
    """A clip of the embedded model, dense and sparse."""

    VERB = "demo"

    prompt: str | None = option(
        None, "Clip", "Caption of the clip, such as: a blue square moves up slowly."
    )
    image_prompt: Path | None = option(
        None, "Clip", "Picture of what moves.", metavar="IMAGE", accept="image"
    )
    frames: int | None = option(
        None, "Clip", "Number of frames, 1 more than a multiple of 4.", ge=1
    )
    steps: int | None = option(None, "Clip", "Number of denoising steps. Default: 20.", ge=1)
    seed: int | None = option(
        None, "Clip", "Seed of the noise that both clips start from.", ge=0, le=2**63 - 1
    )
    out: Path | None = option(
        None,
        "Clip",
        "Folder to write to. Default: outputs/demo, or outputs/demo_image, which the next demo "
        "replaces.",
        writes=True,
    )
    device: str = option(
        "cpu", "Model", "Device to run on: cpu, cuda or mps. A GPU gains nothing on so few layers."
    )
    model: str | None = option(
        None,
        "Model",
        "Folder of a model in place of the embedded one.",
        metavar="DIR",
        reads=model_files,
    )
    with_lora: bool | None = option(
        None, "Model", "The embedded model with its LoRA for longer videos. Default: with it."
    )

    def outputs(self) -> dict[str, list[Path]]:
        from gen_accel.demo.page import PARTS, REPORTS

        names = [*REPORTS, *(file for file, _ in PARTS.values())]
        return {} if self.out is None else {"out": [self.out / name for name in names]}


@verb(app, DemoConfig, short_help="One clip, dense and sparse, on one clock.")
def demo(config: DemoConfig) -> None:
    """Generate one clip dense and sparse with the embedded model, a step of each in turn.

    Writes report.html with everything on one page: the clips side by side, both denoisings on one
    clock, what the model makes without its LoRA, and the figures. Each of them is a file too.
    Needs no GPU and no download, and takes about two minutes on two cores.

    \b
    gen-accel demo
    gen-accel demo --prompt "a blue square moves up slowly" --seed 3
    gen-accel demo --frames 257                                 longer, and more to gain
    gen-accel demo --method radial --set decay_factor=0.5       sparser
    gen-accel demo --method neighborhood --set window=9,7,7
    gen-accel demo --preset balanced                            or a file of `gen-accel tune`
    gen-accel demo --image-prompt red_triangle.png              a shape to move

    The prompts that the model knows: a COLOUR SHAPE moves DIRECTION SPEED, with red, green, blue
    or yellow; circle, square or triangle; left, right, up or down; slowly or quickly.

    With --image-prompt, 33 frames of "something moves right slowly", or of --prompt: the text
    says how it moves, the picture what does. Without --method, the
    attention is the one that the LoRA was trained through, or radial.
    """
    config.check_method(config.steps)
    model = None if config.model == DEMO else config.model
    check_pipeline(model or DEMO)
    if model is None and config.prompt is not None:
        check_known(config.prompt)
    check_files("image", config.image_prompt)
    check_folder_path("out", config.out)
    if config.image_prompt is not None and config.with_lora is not None:
        raise ValueError("--with-lora and --without-lora do not go with --image-prompt")
    with loading():
        from gen_accel.demo.job import run
    report, files = run(
        None if config.out is None else expanded(config.out),
        image=config.image_prompt,
        model=model,
        prompt=config.prompt,
        seed=config.seed,
        frames=config.frames,
        steps=config.steps,
        method=config.built_method() if config.method is not None or config.set else None,
        preset=config.preset,
        device=config.device,
        with_lora=config.with_lora,
        linear_kernel=config.linear_kernel,
    )
    print_comparison(report)
    print_files(files)
