"""Image prompts in each family: by which prompt its pipelines' calls go, and where frames are."""

import inspect
from functools import partial
from typing import Any

import image_adapters
import pytest
import torch
from checks import assert_no_worse
from diffusers import ClassifierFreeGuidance
from diffusers.pipelines.free_noise_utils import SplitInferenceModule
from image_models import CASES, noise, output
from methods import MIXTURE, WINDOW
from test_image_prompt import WIDTH, adapter, assert_as_before, sites, trace
from tiny import animatediff, cases, kandinsky5

from gen_accel import attach, load_image_prompt
from gen_accel.attention_processors.families import image_classes
from gen_accel.attention_processors.image_prompt import ImageAdapter, new_adapter
from gen_accel.pipelines.image_prompt.formats import base_of, write_adapter
from gen_accel.pipelines.image_prompt.guidance import Guidance
from gen_accel.pipelines.image_prompt.projectors import Linear

GUIDANCE = {"guidance_scale", "true_cfg_scale", "audio_guidance_scale"}
PIPED = {case.name: case for case in cases() if case.pipeline is not None}

# Frames of the video in each of three latents, and why they are not known in a call.
SPANS = {
    "anyflow": [(0, 1), (1, 5), (5, 9)],
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
BESIDE = ("helios telling", "kandinsky6 image", "ltx2 followed")  # queries of others as well
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


def rows_by_text(pipe: Any, generate: Any, monkeypatch: Any) -> list[tuple[str, torch.Tensor]]:
    """What each row of each call went by, and its text."""
    layouts, texts = [], []
    real = Guidance.layout

    def layout(*args: Any, **kwargs: Any) -> Any:
        layouts.append(real(*args, **kwargs))
        return layouts[-1]

    def keep(model: Any, args: tuple, kwargs: dict) -> None:
        text = kwargs["encoder_hidden_states"]
        latents = args[0] if args else kwargs["hidden_states"]
        texts.append(text[:: len(text) // len(latents)])  # AnimateDiff has one for each frame

    monkeypatch.setattr(Guidance, "layout", layout)
    hook = model_of(pipe).register_forward_pre_hook(keep, with_kwargs=True)
    generate(pipe)
    hook.remove()
    monkeypatch.undo()
    found = []
    for rows, text in zip(layouts, texts, strict=True):
        sides = [side for side, count in rows for _ in range(count)]
        found += zip(sides, text, strict=True)
    return found


@pytest.mark.slow
@torch.no_grad()
@piped([n for n, case in PIPED.items() if type(case.build()).__name__ in image_classes()])
def test_each_row_goes_by_the_side_of_its_text(case, monkeypatch):
    """That of the prompt is known from a run without guidance."""
    pipe = case.pipeline()
    model = model_of(pipe)
    prompt = load_image_prompt(pipe, adapter(model))
    prompt.set_embeds(noise(1, WIDTH), negative=noise(1, WIDTH, seed=1))
    guided = rows_by_text(pipe, case.generate, monkeypatch)
    unguided(pipe)
    alone = rows_by_text(pipe, case.generate, monkeypatch)
    assert {side for side, _ in alone} == {"positive"}
    own = alone[0][1]
    assert all(torch.equal(text, own) for _, text in alone)
    sides = {"positive"} if case.name in DISTILLED else {"positive", "negative"}
    assert {side for side, _ in guided} == sides
    for side, text in guided:
        assert torch.equal(text, own) == (side == "positive")


def first(model: Any, given: dict[str, Any], grid: tuple[int, int, int]) -> torch.Tensor:
    """What the first attention gives, (2, frames, tokens of a frame, C)."""
    seen = []
    hook = sites(model)[0].module.register_forward_hook(lambda _, args, out: seen.append(out))
    output(model, given)
    hook.remove()
    (out,) = seen
    return out.reshape(2, grid[0], -1, out.shape[-1])


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
        with pytest.raises(ValueError, match=r"for the 36 of |only 36 are of what it makes"):
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
    """Of sides that its levels round up, in all of its attentions."""
    model, given = animatediff.unet(), animatediff.inputs(3, 5, 7)
    prompt = load_image_prompt(model, adapter(model))
    show(prompt, torch.ones(5, 7))
    prompt.set_scale(1.0, frames=(0, 3))
    masked = output(model, given)
    show(prompt)
    torch.testing.assert_close(masked, output(model, given), atol=1e-5, rtol=1e-4)


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


@pytest.mark.parametrize("name", ["allegro", "cosmos"])
def test_frames_that_the_pipeline_alone_knows(name):
    model = CASES[name].build()
    prompt = load_image_prompt(model, adapter(model))
    with pytest.raises(ValueError, match=r"how many a latent of \w+3DModel is of: load"):
        prompt.set_scale(1.0, frames=(0, 1))


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
    with pytest.raises(ValueError, match=r"2 frames at a time.*split inference; disable it"):
        animatediff.animate(pipe)


def test_kandinsky_with_its_own_sparse_attention():
    """Its tokens are in tiles then, which matters to masks alone."""
    model, given = CASES["kandinsky5"].build(), CASES["kandinsky5"].inputs()
    prompt = load_image_prompt(model, adapter(model))
    show(prompt, torch.ones(3, 4))
    sparse = {"sparse_params": {"P": 0.9}}
    with pytest.raises(ValueError, match=r"None .* where the places of its tokens count"):
        kandinsky5.call(model, given | sparse)


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
    for name in ("skyreels", "vace", "wan animate", "chronoedit", "anyflow", "helios"):
        load_image_prompt(CASES[name].build(), path)
    _, path = saved(image_adapters.sd_unet(), tmp_path / "sd")
    load_image_prompt(animatediff.unet(), path)
    _, path = saved(CASES["ltx"].build(), tmp_path / "ltx")
    with pytest.raises(ValueError, match="one of the family ltx, and LTX2VideoTransformer"):
        load_image_prompt(CASES["ltx2"].build(), path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["base", "plus"])
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@torch.no_grad()
def test_animatediff_gives_what_diffusers_does(variant, guided, tmp_path):
    groups = image_adapters.nested(variant, animatediff.unet())
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


# Beside sparse attention


@pytest.mark.slow
@pytest.mark.parametrize("method", [WINDOW, MIXTURE], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("name", NEW)
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
