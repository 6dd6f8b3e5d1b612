"""Image prompts in each family: by which prompt its pipelines' calls go, and where frames are."""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import ClassifierFreeGuidance, FasterCacheConfig, UNetMotionModel
from diffusers.pipelines import ltx2 as ltx2_pipelines
from diffusers.pipelines.free_noise_utils import SplitInferenceModule
from support import image_adapters
from support.checks import assert_no_worse
from support.image_adapters import nested
from support.image_models import CASES, noise, output
from support.image_prompts import WIDTH, adapter, assert_as_before, sites, trace
from support.methods import MIXTURE, WINDOW
from support.tiny import animatediff, cases, kandinsky5, ltx2, skyreels

from gen_accel import attach, load_image_prompt
from gen_accel.attention_processors.families import classes_for
from gen_accel.attention_processors.image_prompt import ImageAdapter, new_adapter
from gen_accel.pipelines.image_prompt.formats import base_of, write_adapter
from gen_accel.pipelines.image_prompt.projectors import Linear

GUIDANCE = {"guidance_scale", "true_cfg_scale", "audio_guidance_scale"}
IMAGE, NEGATIVE = noise(1, WIDTH), noise(1, WIDTH, seed=2)
PIPED = {case.name: case for case in cases() if case.pipeline is not None}

# Frames of the video in each of three latents, and why they are not known in a call.
SPANS = {
    "anyflow": [(0, 1), (1, 5), (5, 9)],
    "anyflow far": "chunk after chunk",
    "helios without history": "chunk after chunk",
    "helios": "chunk after chunk",
    "helios telling": "chunk after chunk",
    "chronoedit": "leaves out all frames but the first and the last",
    "wan animate": "in segments, each behind the image",
    "kandinsky5": [(0, 1), (1, 5), (5, 9)],
    "kandinsky6": [(0, 1), (1, 5), (5, 9)],
    "kandinsky6 image": "given an image as one more frame",
    "ltx2": [(0, 1), (1, 9), (9, 17)],
    "ltx2 followed": "given key frames or videos beside",
    "motif": [(0, 1), (1, 5), (5, 9)],
    "latte": [(0, 1), (1, 2), (2, 3)],
    "animatediff": [(0, 1), (1, 2), (2, 3)],
}
DISTILLED = ("hunyuan_video",)  # its pipeline has no negative prompt by default
SPLIT = ["hidden_states", "encoder_hidden_states"]  # by frames, for FreeNoise
SPANS = {name: span for name, span in SPANS.items() if name in CASES}
# Which have queries of others as well.
BESIDE = ("anyflow far", "helios telling", "kandinsky6 image", "ltx2 followed")
NEW = [*SPANS, "allegro", "cosmos", "cosmos image", "pixart"]


def show(prompt: Any, mask: torch.Tensor | None = None) -> None:
    """An image to both samples, as a model alone does not know of guidance.

    Args:
        mask: (height, width), or (1, frames, height, width).
    """
    if mask is not None and mask.ndim == 4:
        mask = mask.expand(2, -1, -1, -1)
    prompt.set_embeds(noise(1, WIDTH).expand(2, -1), mask=mask, each=True)


def piped(names: Any = PIPED) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(PIPED[n], id=n) for n in names])


def model_of(pipe: Any) -> Any:
    return getattr(pipe, "transformer", None) or pipe.unet


def unguided(pipe: Any) -> None:
    """Whatever it is called with."""
    if hasattr(pipe, "guider"):
        pipe.guider = ClassifierFreeGuidance(guidance_scale=1.0)
        return

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        scales = inspect.signature(kind.__call__).parameters.keys() & GUIDANCE
        return kind.__call__(self, *args, **kwargs | dict.fromkeys(scales, 1.0))

    kind = type(pipe)
    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def rows_by_text(pipe: Any, generate: Any, prompt: Any) -> list[tuple[str, torch.Tensor]]:
    """By which image each row of each call went, and its text."""
    (part,) = prompt._parts.values()
    found = []

    def keep(model: Any, args: tuple, kwargs: dict) -> None:
        text = kwargs["encoder_hidden_states"]
        text = text[0] if isinstance(text, tuple) else text
        latents = args[0] if args else kwargs["hidden_states"]
        text = text[:: len(text) // len(latents)]  # AnimateDiff has one for each frame
        (term,) = part.branches[0].terms
        for keys, own in zip(term.k, text, strict=True):
            (side,) = [side for side, k in keys_of(prompt, part) if torch.equal(k, keys)]
            found.append((side, own))

    hook = model_of(pipe).register_forward_pre_hook(keep, with_kwargs=True)
    generate(pipe)
    hook.remove()
    return found


def keys_of(prompt: Any, part: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Of the image in the first attention, and of the negative one."""
    one, site = prompt.adapter, part.branches[0].site
    dtype = part.branches[0].terms[0].k.dtype
    for side, features in (("positive", IMAGE), ("negative", NEGATIVE)):
        yield side, one.keys_values(site, one.projector(features))[0][0].to(dtype)


@pytest.mark.turns(5)
@pytest.mark.slow
@torch.no_grad()
@piped(
    [n for n, case in PIPED.items() if type(case.build()).__name__ in classes_for("image prompts")]
)
def test_each_row_goes_by_the_side_of_its_text(case):
    """That of the prompt is known from a run without guidance."""
    pipe = case.pipeline()
    prompt = load_image_prompt(pipe, adapter(model_of(pipe)))
    prompt.set_embeds(IMAGE, negative=NEGATIVE)
    guided = rows_by_text(pipe, case.generate, prompt)
    unguided(pipe)
    alone = rows_by_text(pipe, case.generate, prompt)
    assert {side for side, _ in alone} == {"positive"}
    own = alone[0][1]
    assert all(torch.equal(text, own) for _, text in alone)
    sides = {"positive"} if case.name in DISTILLED else {"positive", "negative"}
    assert {side for side, _ in guided} == sides
    for side, text in guided:
        assert torch.equal(text, own) == (side == "positive")


@pytest.mark.slow
@torch.no_grad()
def test_tiles_of_a_distilled_model_go_by_the_prompt():
    """Its pipeline is not guided, names no calls, and makes four of them a step."""
    layout = pytest.importorskip("diffusers.pipelines.ltx2.dfr_layout")
    model = ltx2.transformer()
    pipe = ltx2.pipeline(model, ltx2_pipelines.LTX2DFRPipeline)
    prompt = load_image_prompt(pipe, adapter(model))
    prompt.set_embeds(IMAGE, negative=NEGATIVE)
    canvas, _, _ = layout.resolve_canvas(17, 8)
    tiles = layout.epilogue_tiles(((canvas - 1) // 8 + 1, 5, 7), 1, [])

    def generate(pipe: Any) -> None:
        pipe(
            prompt_embeds=noise(1, ltx2.TEXT, ltx2.TEXT_WIDTH, seed=6),
            prompt_attention_mask=torch.ones(1, ltx2.TEXT),
            height=160,
            width=224,
            num_frames=17,
            generate_slots=False,
            sigmas=[1.0, 0.5],
            video_tiles=tiles,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        )

    sides = [side for side, _ in rows_by_text(pipe, generate, prompt)]
    assert sides == ["positive"] * 2 * len(tiles)
    assert len(tiles) > 1
    prompt.set_scale(1.0, frames=(0, 1))
    with pytest.raises(ValueError, match="distilled models run tile after tile"):
        generate(pipe)


@torch.no_grad()
@pytest.mark.slow
def test_what_runs_some_rows_alone_is_refused():
    """FasterCache leaves out those of the negative prompt within the model."""
    pipe = PIPED["allegro"].pipeline()
    prompt = load_image_prompt(pipe, adapter(pipe.transformer))
    prompt.set_embeds(IMAGE, negative=NEGATIVE)
    skipped = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1),
        unconditional_batch_skip_range=4,
        unconditional_batch_timestep_skip_range=(-1, 2000),
        tensor_format="BCFHW",
        current_timestep_callback=lambda: 500,
    )
    pipe.transformer.enable_cache(skipped)
    with pytest.raises(ValueError, match=r"1 rows at a time, of 2 samples.*FasterCache"):
        PIPED["allegro"].generate(pipe)


def first(model: Any, given: dict[str, Any], grid: tuple[int, int, int]) -> torch.Tensor:
    """What the first attention gives, (2, frames, tokens of a frame, C)."""
    seen = []
    hook = sites(model)[0].module.register_forward_hook(lambda _, args, out: seen.append(out))
    output(model, given)
    hook.remove()
    (out,) = seen
    return out.reshape(2, grid[0], -1, out.shape[-1])


@pytest.mark.turns(5)
@pytest.mark.parametrize("name", [n for n, spans in SPANS.items() if isinstance(spans, list)])
@torch.no_grad()
def test_scales_and_masks_by_frame(name):
    case, spans = CASES[name], SPANS[name]
    model, given = case.build(), case.inputs()
    run = partial(first, model, given, case.grid)
    base = run()
    prompt = load_image_prompt(model, adapter(model))
    show(prompt)
    whole = run() - base
    assert (whole.abs().amax((0, 2, 3)) > 1e-3).all()
    for frame, span in enumerate(spans):
        prompt.set_scale(0.5, frames=span)
        delta = run() - base
        for other in range(3):
            wanted = 0.5 * whole[:, other] if other == frame else torch.zeros_like(whole[:, 0])
            torch.testing.assert_close(delta[:, other], wanted, atol=1e-5, rtol=1e-4)
    prompt.set_scale(1.0)
    mask = torch.zeros(1, spans[-1][1], *case.grid[1:])
    mask[:, slice(*spans[1]), :, :2] = 1.0
    show(prompt, mask)
    delta = (run() - base).unflatten(2, (-1, case.grid[2]))
    wanted = torch.zeros_like(delta)
    wanted[:, 1, :, :2] = whole.unflatten(2, (-1, case.grid[2]))[:, 1, :, :2]
    torch.testing.assert_close(delta, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n, spans in SPANS.items() if isinstance(spans, str)])
@torch.no_grad()
def test_frames_that_are_not_known(name):
    case = CASES[name]
    model, given = case.build(), case.inputs()
    prompt = load_image_prompt(model, adapter(model))
    show(prompt)
    prompt.set_scale(1.0, frames=(0, 1))
    with pytest.raises(ValueError, match=SPANS[name]):
        output(model, given)
    prompt.set_scale(1.0)
    assert torch.isfinite(output(model, given)).all()
    show(prompt, torch.ones(1, 9, 8, 8))
    with pytest.raises(ValueError, match=SPANS[name]):
        output(model, given)


@pytest.mark.turns(5)
@pytest.mark.parametrize("name", NEW)
@torch.no_grad()
def test_a_mask_for_all_frames(name):
    case = CASES[name]
    model, given = case.build(), case.inputs()
    prompt = load_image_prompt(model, adapter(model), scale=0.0)
    show(prompt)
    if name in BESIDE:
        prompt.set_scale(1.0)
        show(prompt, torch.ones(*case.grid[1:]))
        with pytest.raises(ValueError, match=r"for the 36 of |only 36 are of its output"):
            output(model, given)
        return
    run = partial(first, model, given, case.grid)
    base = run()
    prompt.set_scale(1.0)
    whole = run() - base
    mask = torch.zeros(*case.grid[1:])
    mask[1:, -1] = 0.5
    show(prompt, mask)
    torch.testing.assert_close(run() - base, whole * mask.flatten()[:, None], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_masks_and_frames_on_every_level_of_a_video_unet():
    """Of sides that its levels round up: in the middle, 3 x 5 x 7 are 3 x 3 x 4."""
    model, given = animatediff.unet(), animatediff.inputs(3, 5, 7)
    places = [site.name for site in sites(model)]
    middle = next(name for name in places if name.startswith("mid_block"))
    module, seen = model.get_submodule(middle), []
    module.register_forward_hook(lambda _, args, out: seen.append(out.unflatten(0, (2, 3))))

    def run():
        output(model, given)
        return seen[-1]

    prompt = load_image_prompt(model, adapter(model), scale=0.0)
    show(prompt)
    base = run()
    prompt.set_scale({middle: 1.0})
    whole = run() - base
    assert whole.shape[1:3] == (3, 12)
    mask = torch.zeros(5, 7)
    mask[:1, :2] = 1.0
    weights = F.interpolate(mask[None, None], size=(3, 4), mode="bicubic").flatten()
    show(prompt, mask)
    prompt.set_scale({middle: 1.0}, frames=(1, 2))
    delta = run() - base
    torch.testing.assert_close(delta[:, 1], whole[:, 1] * weights[:, None], atol=1e-5, rtol=1e-4)
    assert not delta[:, [0, 2]].any()


@torch.no_grad()
def test_latents_of_allegro_are_of_four_frames_each():
    case = PIPED["allegro"]
    pipe = case.pipeline()
    prompt = load_image_prompt(pipe, adapter(pipe.transformer))
    prompt.set_embeds(noise(1, WIDTH))
    seen = []
    site = sites(pipe.transformer)[0].module
    site.register_forward_hook(lambda _, args, out: seen.append(out.unflatten(1, (3, -1))))
    with prompt.paused():
        case.generate(pipe)
    base = seen[0]
    for frame in range(3):
        prompt.set_scale(1.0, frames=(4 * frame, 4 * frame + 4))
        seen.clear()
        case.generate(pipe)
        moved = (seen[0] - base).abs().amax((0, 2, 3)) > 1e-5
        assert moved.tolist() == [other == frame for other in range(3)]
    prompt.set_scale(1.0, frames=(12, 13))
    with pytest.raises(ValueError, match="beyond the video of 12 frames"):
        case.generate(pipe)


@torch.no_grad()
def test_chunks_of_cosmos_transfer():
    pipe = PIPED["cosmos_transfer"].pipeline()
    prompt = load_image_prompt(pipe, adapter(pipe.transformer))
    prompt.set_embeds(noise(1, WIDTH))
    prompt.set_scale(1.0, frames=(0, 1))
    with pytest.raises(ValueError, match=r"Transfer2\.5 makes a video chunk after chunk"):
        PIPED["cosmos_transfer"].generate(pipe)


@torch.no_grad()
def test_diffusion_forcing_of_skyreels():
    """In parts, where a video is longer than they are."""
    model = CASES["skyreels"].build()
    prompt = load_image_prompt(model, adapter(model))
    show(prompt)
    prompt.set_scale(1.0, frames=(0, 1))
    output(model, skyreels.inputs(2, 3, 4))
    with pytest.raises(ValueError, match="in parts where it runs with diffusion forcing"):
        output(model, skyreels.forced_inputs(2, 3, 4))


@pytest.mark.parametrize("name", ["allegro"])
def test_frames_that_the_pipeline_alone_knows(name):
    model = CASES[name].build()
    prompt = load_image_prompt(model, adapter(model))
    show(prompt, torch.ones(1, 9, 8, 8))
    with pytest.raises(ValueError, match="only the pipeline knows how many a latent is of: load"):
        output(model, CASES[name].inputs())
    with pytest.raises(ValueError, match=r"how many a latent of \w+3DModel is of: load"):
        prompt.set_scale(1.0, frames=(0, 1))


@pytest.mark.slow
@torch.no_grad()
def test_split_inference_of_animatediff_is_refused():
    pipe = animatediff.animated()
    prompt = load_image_prompt(pipe, adapter(pipe.unet))
    prompt.set_embeds(noise(1, WIDTH))
    pipe.unet.enable_forward_chunking(1, 1)  # of feed-forward layers, which is no matter
    animatediff.animate(pipe)
    prompt.remove()
    split = SplitInferenceModule(pipe.unet.down_blocks[0].attentions[0], 2, 0, SPLIT)
    pipe.unet.down_blocks[0].attentions[0] = split
    prompt = load_image_prompt(pipe, adapter(pipe.unet))
    prompt.set_embeds(noise(1, WIDTH))
    with pytest.raises(ValueError, match=r"2 rows at a time, of 2 videos of 3.*split inference"):
        animatediff.animate(pipe)


def test_kandinsky_with_its_own_sparse_attention():
    """Its tokens are in tiles then, which matters to masks alone."""
    model, given = CASES["kandinsky5"].build(), CASES["kandinsky5"].inputs()
    prompt = load_image_prompt(model, adapter(model))
    show(prompt, torch.ones(3, 4))
    sparse = {"sparse_params": {"P": 0.9}}
    with pytest.raises(ValueError, match=r"None .* where the places of its tokens count"):
        kandinsky5.call(model, given | sparse)


@pytest.mark.skipif("motif" not in CASES, reason="not in this diffusers")
def test_motif_without_cross_attention():
    model = CASES["motif"].build()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.cross_attn = None
    with pytest.raises(ValueError, match=r"Motif.* has no cross-attention to its text"):
        sites(model)


# Files


def saved(model: Any, folder: Any) -> tuple[ImageAdapter, Any]:
    """An adapter of random weights, and the file of it."""
    torch.manual_seed(1)
    made = new_adapter(model, Linear(WIDTH, sites(model)[0].width), variant="base")
    for parameter in made.trained:
        torch.nn.init.normal_(parameter, std=0.5)
    return made, write_adapter(folder, made, base_of(model))


@pytest.mark.turns(5)
@pytest.mark.parametrize("name", NEW)
@torch.no_grad()
def test_a_file_of_the_adapter(name, tmp_path):
    case = CASES[name]
    model, given = case.build(), case.inputs()
    made, path = saved(model, tmp_path / "adapter")
    with load_image_prompt(model, made) as prompt:
        show(prompt)
        pictured = output(model, given)
    assert not torch.allclose(pictured, output(model, given), atol=1e-4)
    with load_image_prompt(model, path) as prompt:
        show(prompt)
        assert torch.equal(output(model, given), pictured)
    with pytest.raises(ValueError, match="is for another model: one of the family"):
        load_image_prompt(CASES["mochi"].build(), path)


def test_families_that_share_their_attentions_share_adapters(tmp_path):
    _, path = saved(CASES["wan"].build(), tmp_path / "wan")
    for name in (
        "skyreels",
        "vace",
        "wan animate",
        "chronoedit",
        "anyflow",
        "anyflow far",
        "helios",
    ):
        if name in CASES:
            load_image_prompt(CASES[name].build(), path)
    unet = image_adapters.sd_unet()
    _, path = saved(unet, tmp_path / "sd")
    load_image_prompt(UNetMotionModel.from_unet2d(unet), path)
    _, path = saved(type(unet).from_config(unet.config, attention_head_dim=4), tmp_path / "four")
    with pytest.raises(ValueError, match=r"another model: 4 heads in layer 1, and down\S* has 2"):
        load_image_prompt(UNetMotionModel.from_unet2d(unet), path)
    _, path = saved(CASES["ltx"].build(), tmp_path / "ltx")
    with pytest.raises(ValueError, match="one of the family 'ltx', and LTX2VideoTransformer"):
        load_image_prompt(CASES["ltx2"].build(), path)


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "guided"),
    [("base", True), ("base", False), ("plus", True), ("plus", False)],
)
@torch.no_grad()
def test_animatediff_gives_what_diffusers_does(variant, guided, tmp_path):
    groups = nested(variant, animatediff.unet())
    path = image_adapters.write(tmp_path / f"{variant}.safetensors", groups)
    picture, scale = image_adapters.picture(), 3.0 if guided else 1.0

    def generate(pipe: Any, **given: Any) -> torch.Tensor:
        given = image_adapters.arguments("sd", size=(24, 32), guided=guided) | given
        dtype = pipe.unet.dtype
        given = {k: x.to(dtype) if isinstance(x, torch.Tensor) else x for k, x in given.items()}
        latents = noise(1, 4, animatediff.FRAMES, 12, 16).to(dtype)
        given |= {"latents": latents, "guidance_scale": scale}
        return pipe(**given, num_frames=animatediff.FRAMES).frames

    def theirs(dtype: torch.dtype) -> torch.Tensor:
        pipe = animatediff.animated().to(dtype)
        pipe.load_ip_adapter(str(tmp_path), "", path.name, image_encoder_folder=None)
        return generate(pipe.to(dtype), ip_adapter_image=picture)

    low, exact = theirs(torch.float32), theirs(torch.float64)
    pipe = animatediff.animated()
    without = generate(pipe)
    prompt = load_image_prompt(pipe, path)
    prompt.set_image(picture)
    assert (low - without).abs().max() > 0.01 * without.abs().max(), "the image does nothing"
    assert_no_worse(generate(pipe), low, exact, factor=4.0)
    prompt.remove()
    assert torch.equal(generate(pipe), without)


@pytest.mark.slow
def test_a_face_on_animatediff(tmp_path):
    """Its LoRA goes where it goes on the UNet that this is made of: diffusers' own loading counts
    the attentions over time too."""
    unet = image_adapters.sd_unet()
    path = image_adapters.write(tmp_path / "face.safetensors", nested("faceid", unet))
    found = []
    for model in (unet, UNetMotionModel.from_unet2d(unet)):
        pipe = image_adapters.pipeline("sd") if model is unet else animatediff.animated()
        pipe.unet = model
        load_image_prompt(pipe, path)
        state = {name: x for name, x in model.state_dict().items() if ".lora_" in name}
        found.append(state)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


# Beside sparse attention


@pytest.mark.turns(5)
@pytest.mark.slow
@pytest.mark.parametrize("method", [WINDOW, MIXTURE], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("name", [*NEW, "vace", "skyreels", "ltx", "unet"])
@torch.no_grad()
def test_beside_sparse_attention_in_any_order(name, method):
    case = CASES[name]
    model, given = case.build(), case.inputs()
    before, base = trace(model), output(model, given)
    one = adapter(model)
    handle = attach(model, method)
    sparse = output(model, given)
    prompt = load_image_prompt(model, one)
    show(prompt)
    both = output(model, given)
    assert not torch.equal(both, sparse)
    with prompt.paused():
        assert torch.equal(output(model, given), sparse)
    handle.detach()
    pictured = output(model, given)
    handle = attach(model, method)
    assert torch.equal(output(model, given), both)
    prompt.remove()
    assert torch.equal(output(model, given), sparse)
    handle.detach()
    assert torch.equal(output(model, given), base)
    assert not torch.equal(pictured, base)
    assert_as_before(model, before)
