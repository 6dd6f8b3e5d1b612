"""The demo: one clip of the embedded model, dense and sparse on one clock."""

import statistics
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from gen_accel import demo, registry
from gen_accel.attention_processors import Dense, Radial
from gen_accel.attention_processors.attached.recipe import OtherAttention, Recipe, read_recipe
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.methods.mixed import Mixed
from gen_accel.demo import ANONYMOUS, PROMPT, SEED, check_known, race
from gen_accel.demo.detector import detect
from gen_accel.demo.page import UNKNOWN, RunPage
from gen_accel.demo.race import Denoising, Entrant
from gen_accel.io import read_fields
from gen_accel.measure import check_writable, contact_sheet, quality, side_by_side
from gen_accel.measure.machine import ExternalLoad, environment
from gen_accel.measure.pictures import mask_picture
from gen_accel.method import Method
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.generation.compare import Comparison
from gen_accel.pipelines.generation.config import ImagePromptConfig
from gen_accel.pipelines.generation.decode import decode_stream, is_streamed
from gen_accel.pipelines.generation.inputs import open_image_prompt
from gen_accel.pipelines.generation.loading import Loading, find_device, load
from gen_accel.pipelines.generation.progress import Progress, ticker
from gen_accel.pipelines.generation.sampling import (
    Clip,
    Sample,
    check_clip,
    filled,
    sample,
    token_grid,
)
from gen_accel.pipelines.image_prompt.encoder import as_rgb
from gen_accel.pipelines.linear_layers import pack_linears, words_of
from gen_accel.pipelines.long_video import extend
from gen_accel.pipelines.tuning.preset import Preset, choose_preset
from gen_accel.registry import LinearKernel
from gen_accel.served import RUNS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RUN = RUNS[demo.NAME]
FRAMES, SIZE, STEPS = 4 * (demo.TRAINED_FRAMES - 1) + 1, RUN.height, RUN.steps
GUIDANCE_SCALE = 3.0
FPS = 16.0
SHEET_FRAMES = 9
STILL_SIZE, BICUBIC = 48, Image.Resampling.BICUBIC  # pixels, of an image that is looked at
METHOD = Radial()  # of a model without a LoRA
DENSE_START, DENSE_START_PICTURED = 0.2, 0.25  # of that, and with an image prompt
ALIKE = 4  # steps of dense attention that has what the sparse clip has beside it
SCORE = "score.json"  # beside a LoRA, by benchmarks/longer_videos.py --docs
CONFIGS = {"long_lora_guided": "demo_long.yaml", "long_lora": "demo_guided.yaml"}


def lora_path(*, guided: bool = False) -> Path:
    """Path of the demo model's LoRA that guidance is distilled into
    (configs/lora/demo_guided.yaml). With `guided`, of the LoRA that is sampled with guidance
    (configs/lora/demo_long.yaml)."""
    return Path(__file__).parent / ("long_lora_guided" if guided else "long_lora")


@dataclass(frozen=True)
class DemoAttention:
    """The attention that is set beside dense attention.

    Args:
        schedule: of a model without a LoRA.
        lora: a folder; None: the model alone. `recipe` is its own.
        preset: what gave the method and its schedule, see `gen_accel.attach`; None: nothing did.
    """

    method: Method
    schedule: Schedule | None
    lora: Path | None = None
    recipe: Recipe | None = None
    preset: str | Path | Preset | None = None

    @property
    def name(self) -> str:
        return "preset" if self.preset is not None else type(self.method).__name__.lower()

    @property
    def is_own(self) -> bool:
        """Whether the LoRA was trained through it."""
        recipe = None if self.preset is not None else self.recipe
        return recipe is not None and self.method == recipe.build_method()

    def enter(
        self,
        pipe: "DiffusionPipeline",
        stack: ExitStack,
        *,
        dense: bool = False,
        alike: LinearKernel | None = None,
    ) -> Entrant:
        """Attach it, or dense attention, until `stack` is closed, with the techniques for longer
        video that the LoRA was trained with.

        Args:
            alike: kernel of the linear layers; None leaves all beside the attention as it is, the
                padding of texts too.
        """
        timed, run = pipe.device.type == "cpu", None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OtherAttention)
            if dense:
                handle = attach(pipe, Dense(), timed=timed, padding_once=alike is not None)
            elif self.is_own:  # with its parameters and rule on positions
                handle = attach(pipe, from_lora=self.lora, timed=timed)
            elif isinstance(self.preset, Preset):
                handle = attach(pipe, preset=self.preset, timed=timed)
            else:
                schedule = self.schedule
                if self.preset is None and self.recipe is not None:
                    schedule = self.recipe.build_schedule()
                handle = attach(pipe, self.method, schedule=schedule, timed=timed)
        stack.enter_context(handle)
        if alike is not None:
            stack.enter_context(pack_linears(pipe, alike))
        if self.recipe is not None:
            rope = self.recipe.rope != "none" and (dense or not self.is_own)
            techniques = [*([self.recipe.rope] if rope else []), *self.recipe.techniques]
            if techniques:
                longer = extend(pipe, techniques, num_frames=self.recipe.frames)
                run = stack.enter_context(longer)
        if not dense:
            return Entrant(self.name, pipe, handle, run)
        if alike is None:
            return Entrant("dense", pipe, handle, run)
        return Entrant("dense, alike", pipe, handle, run, ALIKE)


def run(
    out: str | Path | None = None,
    *,
    image: str | Path | Image.Image | None = None,
    model: str | Path | None = None,
    prompt: str | None = None,
    seed: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    method: Method | None = None,
    preset: str | Path | Preset | None = None,
    device: str = "cpu",
    with_lora: bool | None = None,
    linear_kernel: LinearKernel = "auto",
) -> tuple[dict[str, object], dict[str, Path]]:
    """Generate one clip densely and with sparse attention, a step of each in turn, and write both
    with their comparison.

    The model is the embedded one with its long-video LoRA, through whose attention the sparse
    clip is made. What it makes without the LoRA is shown beside them. With an image prompt, the
    image shows the object and the text describes its motion; there is no LoRA.

    Args:
        out: a folder; None: outputs/demo, or outputs/demo_image with an image.
        image: a file or a PIL image of the object to move.
        model: a folder like the embedded model's, without a LoRA.
        frames: 1 more than a multiple of 4; None: 129, or 33 with an image.
        steps: None: as many as the preset was solved for, or 20.
        method: in place of the LoRA's own.
        preset: a file of `gen_accel.tune`, or a name, in place of a method; see `attach`.
        device: a GPU gains nothing on so small a model.
        with_lora: False leaves the LoRA away; None means True for the embedded model.
        linear_kernel: of the sparse clip, see `pack_linears`. The dense clip is made by the model
            as it is. On a CPU some more dense steps are timed with the same linear layers, and
            with padding counted once, as in the sparse clip.

    Returns:
        The report, and the files by what they are.

    Raises:
        FileNotFoundError: there is no model or image.
        ValueError: an invalid size, method, preset or prompt, or a file that is no image.
        OSError: `out` cannot be written.
    """
    pictured = image is not None
    known = ANONYMOUS if pictured else PROMPT
    prompt = known if prompt is None else prompt
    seed = (0 if pictured else SEED) if seed is None else seed
    frames = (demo.TRAINED_FRAMES if pictured else FRAMES) if frames is None else frames
    if method is not None and method.is_dense:
        raise ValueError("the demo sets a sparse method beside dense attention, got Dense()")
    if not prompt.strip():
        raise ValueError(f"the prompt is empty; one that the model knows: {known!r}")
    find_device(device)
    if model is None:
        check_known(prompt)
        if not (demo.path() / "model_index.json").exists():
            raise FileNotFoundError(
                f"the demo model is not at {demo.path()}: install the package again, or train it "
                "with `make remake-demo STAGES=model`"
            )
    if with_lora and (model is not None or pictured):
        other = "an image prompt" if pictured else f"model {model}"
        raise ValueError(f"the LoRA is the embedded model's: leave it or {other} out")
    given = None
    if pictured:
        adapter = demo.image_prompt_path()
        if not adapter.is_dir():
            raise FileNotFoundError(
                f"the demo model's image prompt is not at {adapter}: install the package again, "
                "or train it with `gen-accel train configs/image_prompt/demo.yaml`"
            )
        asked = ImagePromptConfig(image_prompt=(image,), image_adapter=str(adapter))
        given = open_image_prompt(asked)

    lora = recipe = None
    if model is None and not pictured and with_lora is not False:
        lora = lora_path(guided=True)
        recipe = read_recipe(lora)
    own = METHOD if recipe is None else recipe.build_method()
    start = Schedule(dense_start=DENSE_START_PICTURED if pictured else DENSE_START)
    sparse = DemoAttention(own if method is None else method, start, lora, recipe, preset)
    folder = Path(out or ("outputs/demo_image" if pictured else "outputs/demo"))
    page = RunPage(folder, f"{prompt}: dense and {sparse.name} attention", FPS)
    quality.check_installed()
    check_writable(page.files["dense"])

    on_cpu = find_device(device).type == "cpu"
    pipes = [loaded(model, device, lora) for _ in range(2 + on_cpu)]
    if preset is not None:
        call = {"num_frames": frames, "height": SIZE, "width": SIZE}
        call |= {"guidance_scale": GUIDANCE_SCALE, "num_inference_steps": steps}
        chosen, schedule, tuned = choose_preset(preset, pipes[1], None, call)
        sparse = DemoAttention(chosen, schedule, lora, recipe, tuned or preset)
    solved = sparse.method.steps if isinstance(sparse.method, Mixed) else None
    if steps is not None and solved is not None and steps != solved:
        raise registry.other_steps(preset, solved, steps)
    steps = (solved or STEPS) if steps is None else steps
    size = {"height": SIZE, "width": SIZE, "guidance_scale": GUIDANCE_SCALE, "fps": FPS}
    clip = filled(pipes[0], Clip(frames=frames, steps=steps, seed=seed, **size))
    if not is_streamed(pipes[0]):
        kind = type(pipes[0]).__name__
        raise ValueError(f"the demo is for pipelines whose latents it can decode, got {kind}")
    check_clip(pipes[0], clip, sparse.method)

    head = {"prompt": prompt, "seed": seed, "frames": frames, "method": repr(sparse.method)}
    page.write(head, next_part="the denoising")
    about: dict[str, object] = {}
    with ExitStack() as stack:
        if given is not None:
            held = [stack.enter_context(given.load(pipe)) for pipe in pipes]
            about["image"] = str(image) if isinstance(image, str | Path) else "a picture in memory"
            about["image_prompt"] = held[1].describe()
        entrants = [
            sparse.enter(pipes[0], stack, dense=True),
            sparse.enter(pipes[1], stack, alike=linear_kernel),
        ]
        alike = [sparse.enter(pipe, stack, dense=True, alike=linear_kernel) for pipe in pipes[2:]]
        others = ExternalLoad()
        made = race.race([*entrants, *alike], prompt, clip)
        made, timed = made[:2], made[2:]
        busy = others.busy() if on_cpu else None
        about |= _like_for_like(entrants, made, timed)
        result = _decoded(entrants, made, prompt, clip)
    shown = given.images[0] if given is not None else None
    clips = _add_clips(page, result, shown, with_times=busy is None)
    mask_picture(sparse.method, token_grid(pipes[0], clip), page.files["mask"])
    page.add("mask")
    report = _report(result, made, shown) | about | {"busy": busy}
    if lora is not None:
        default = (seed, frames, steps, prompt) == (SEED, FRAMES, STEPS, PROMPT)
        report["lora"] = about_lora(lora, sparse.is_own, default and sparse.is_own)
    page.write(report, next_part="the animation")
    page.add("race", race.animation(entrants, made, clips, fps=FPS))
    if lora is not None:
        page.write(report, next_part="the clip without the LoRA")
        pipe = loaded(None, device)  # the model as it was trained
        with Progress() as bar:
            plain = sample(pipe, prompt, clip, tick=ticker(bar, "without the LoRA"))
        labels = ["without the LoRA", f"with it, {type(sparse.method).__name__.lower()}"]
        page.add("without LoRA", side_by_side([plain.video, clips[1]], labels, scale=3))
        report["without_lora"] = _seen(plain.video)
    page.write(report)
    return report, page.made


def loaded(model: str | Path | None, device: str, lora: Path | None = None) -> "DiffusionPipeline":
    """Load a pipeline like the embedded one, with a LoRA fused into its weights."""
    loras = () if lora is None else (str(lora),)
    source = demo.path() if model is None else model
    pipe = load(source, Loading(dtype="float32", device=device, loras=loras))
    if loras:
        pipe.fuse_lora()  # a LoRA beside the weights would cost a tenth of a step
    return pipe


def _decoded(
    entrants: Sequence[Entrant], made: Sequence[Denoising], prompt: str, clip: Clip
) -> Comparison:
    """Decode each clip by itself."""
    samples = []
    for entrant, one in zip(entrants, made, strict=True):
        start = time.perf_counter()
        video = np.concatenate([*decode_stream(entrant.pipe, one.latents)])
        samples.append(Sample(video, one.total, time.perf_counter() - start))
    dense, sparse = (entrant.handle.summary() for entrant in entrants)
    return Comparison(
        prompt,
        clip,
        dense=samples[0],
        sparse=samples[1],
        dense_summary=dense,
        summary=sparse,
        compile_seconds=0.0,  # a step of each, of the same size, ran before
        environment=environment(entrants[0].pipe.device),
    )


def _like_for_like(
    entrants: Sequence[Entrant], made: Sequence[Denoising], alike: Sequence[Denoising]
) -> dict[str, object]:
    """Speed-up beside dense attention with all else as in the sparse clip, and what that is;
    nothing if none was timed, or nothing else differs."""
    layers, padding = words_of(entrants[1].pipe), entrants[1].handle.summary().padding
    words = "; ".join(filter(None, (layers, padding)))
    steps = [one.seconds[:ALIKE] for one in alike]
    shares = [b / a for one in steps for a, b in zip(made[0].seconds, one, strict=False)]
    if not words or len(shares) < 2:
        return {}
    share = statistics.median(shares[1:])  # the first step encodes the text too
    return {"alike": words, "speedup_alike": share * made[0].total / made[1].total}


def _report(
    result: Comparison, made: Sequence[Denoising], image: Image.Image | None
) -> dict[str, object]:
    ratios = [a / b for a, b in zip(made[0].seconds, made[1].seconds, strict=True)]
    spent = result.dense_summary.seconds, result.summary.seconds
    dense, sparse = _seen(result.dense.video), _seen(result.sparse.video)
    found = {"asked": result.prompt, "dense": dense, "sparse": sparse}
    if image is not None:
        small = np.asarray(image.resize((STILL_SIZE, STILL_SIZE), BICUBIC))
        seen = detect(np.stack([small] * 2))
        known = seen.color is not None and seen.shape is not None
        found["image"] = f"a {seen.color} {seen.shape}" if known else UNKNOWN
    return result.to_dict() | {
        "steps_seconds": {"dense": made[0].seconds, "sparse": made[1].seconds},
        "speedup_of_steps": {
            "least": min(ratios),
            "median": statistics.median(ratios),
            "most": max(ratios),
        },
        "attention_speedup": spent[0] / spent[1] if spent[0] and spent[1] else None,
        "detector": found | {"unchanged": dense["shows"] == sparse["shows"]},
    }


def _seen(video: np.ndarray) -> dict[str, object]:
    found = detect(video)
    return {"shows": found.caption, **asdict(found)}


def about_lora(lora: Path, is_own: bool, was_chosen: bool) -> dict[str, object]:
    """Describe an embedded LoRA, for the report.

    Args:
        is_own: whether the sparse clip is made by the attention that it was trained through.
        was_chosen: whether the prompt is the demo's own, with all else as it is by default. The
            score of the LoRA then goes with it.
    """
    return {
        "name": lora.name,
        "config": f"configs/lora/{CONFIGS[lora.name]}",
        "trained_frames": read_recipe(lora).trained_frames,
        "trained_through_the_same": is_own,
        "prompt_was_chosen": was_chosen,
        "score": read_fields(lora / SCORE),
    }


def _add_clips(
    page: RunPage, result: Comparison, image: Image.Image | None, *, with_times: bool
) -> list[np.ndarray]:
    """Add both clips, alone and together, an image prompt on their left. Returns the two."""
    clips, labels = [result.dense.video, result.sparse.video], result.labels
    together = result.pair(with_times=with_times)
    if image is not None:  # as the adapter sees it: squeezed to a square
        seen = np.asarray(as_rgb(image).resize((SIZE, SIZE), BICUBIC))[None]
        films = [seen.repeat(len(clips[0]), 0), *clips]
        caption = result.caption(with_times=with_times)
        together = side_by_side(films, ["image prompt", *labels], caption=caption, scale=2)
    sheet = contact_sheet(clips, labels, count=SHEET_FRAMES)[None]
    for name, pixels in zip(("dense", "sparse"), clips, strict=True):
        page.add(name, pixels)
    page.add("side by side", together)
    page.add("contact sheet", sheet)
    return clips
