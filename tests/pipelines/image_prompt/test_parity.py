"""Image prompts give what diffusers' own loading of the same file gives, in its own pipelines."""

from functools import cache

import numpy as np
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from support import image_adapters as tiny
from support.checks import assert_no_worse

from gen_accel.pipelines.image_prompt import load_image_prompt

UNET = ("base", "plus", "full", "faceid", "faceid_plus", "faceid_plus_v2", "portrait")
SEEN = ("base", "plus", "full")  # those that images can be given to
NAMES = {"faceid_plus": "faceid-plus", "faceid_plus_v2": "faceid-plusv2"}
PICTURES = tuple(tiny.picture(i) for i in range(4))


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of a variant for a kind of pipeline, in one folder."""
    folder = tmp_path_factory.mktemp("adapters")

    @cache
    def make(kind, variant, seed=0):
        model = tiny.model_of(pipeline(kind))
        name = f"{kind}_{NAMES.get(variant, variant)}_{seed}.safetensors"
        return tiny.write(folder / name, tiny.nested(variant, model, seed))

    return make


@cache
def pipeline(kind):
    """With nothing loaded, to read and not to change."""
    return tiny.pipeline(kind)


@cache
def plain(kind, **options):
    """What the pipeline gives without any image."""
    pipe = tiny.pipeline(kind, **{k: x for k, x in options.items() if k == "joint"})
    return tiny.generate(pipe, kind, **options)


def theirs(kind, *paths, dtype=torch.float32, **options):
    """A pipeline that loaded the files by diffusers' own code."""
    pipe = tiny.pipeline(kind, **options)
    folder, names = str(paths[0].parent), [path.name for path in paths]
    if kind == "flux":
        pipe.load_ip_adapter(
            folder, names, subfolder="", image_encoder_pretrained_model_name_or_path=None
        )
    else:
        pipe.load_ip_adapter(folder, "", names, image_encoder_folder=None)
        for path, module in zip(
            paths, pipe.unet.encoder_hid_proj.image_projection_layers, strict=True
        ):
            module.shortcut = "plusv2" in path.name
    pipe.to(dtype)
    return pipe


def compare(kind, paths, reference, ours, **options):
    """The same output within the error budget.

    Args:
        reference: calls the pipeline of diffusers it is given.
        ours: the same with ours, in which the files are loaded by the names 0, 1, ...
    """
    pipe_options = {k: options.pop(k) for k in ("joint",) if k in options}
    low = reference(theirs(kind, *paths, **pipe_options))
    exact = reference(theirs(kind, *paths, dtype=torch.float64, **pipe_options))
    pipe = tiny.pipeline(kind, **pipe_options)
    prompts = [load_image_prompt(pipe, path, name=str(i)) for i, path in enumerate(paths)]
    actual = ours(pipe, *prompts)
    without = plain(kind, **pipe_options, **options)
    assert (low - exact).abs().max() < 1e-4 * exact.abs().max(), "the budget means nothing"
    assert (low - without).abs().max() > 0.01 * without.abs().max(), "the image does nothing"
    assert_no_worse(actual, low, exact, factor=4.0)


def faces(images=1, seed=0):
    return tiny.Random(30 + seed)(images, tiny.FACE)


def theirs_of_faces(pipe, kind, variant, given, **options):
    """Vectors as diffusers takes them, the half for the negative prompt first."""
    dtype = tiny.model_of(pipe).dtype
    if variant.startswith("faceid_plus"):
        states, none = pipe.encode_image([PICTURES[0]], "cpu", 1, True)
        projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
        projection.clip_embeds = torch.stack([none, states]).to(dtype)
    embeds = torch.stack([torch.zeros_like(given), given]).to(dtype)
    return tiny.generate(pipe, kind, ip_adapter_image_embeds=[embeds], **options)


@pytest.mark.turns(5)
@pytest.mark.parametrize(
    ("kind", "variant"),
    [("sd", variant) for variant in UNET]
    + [("sdxl", variant) for variant in SEEN]
    # Their LoRA on each of many attentions takes PEFT a while.
    + [pytest.param("sdxl", v, marks=pytest.mark.nightly) for v in UNET if v not in SEEN],
)
def test_each_variant(kind, variant, files):
    path = files(kind, variant)

    def reference(pipe):
        if variant in SEEN:
            return tiny.generate(pipe, kind, ip_adapter_image=PICTURES[0])
        return theirs_of_faces(pipe, kind, variant, faces())

    def ours(pipe, prompt):
        if variant in SEEN:
            prompt.set_image(PICTURES[0])
        elif variant.startswith("faceid_plus"):
            states, none = pipe.encode_image([PICTURES[0]], "cpu", 1, True)
            given, against = {"id": faces(), "clip": states}, None
            if variant == "faceid_plus_v2":  # said, and not left to the encoder
                against = {"id": torch.zeros(1, tiny.FACE), "clip": none}
            prompt.set_embeds(given, negative=against)
        else:
            prompt.set_embeds(faces())
        return tiny.generate(pipe, kind)

    compare(kind, [path], reference, ours)


def test_the_pickled_files_give_the_same(files, tmp_path):
    groups = tiny.nested("plus", pipeline("sd").unet)
    path = tiny.write(tmp_path / "plus.bin", groups)
    outputs = []
    for one in (path, files("sd", "plus")):
        pipe = tiny.pipeline("sd")
        load_image_prompt(pipe, one).set_image(PICTURES[0])
        outputs.append(tiny.generate(pipe, "sd"))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("variant", ["base", "plus"])
def test_several_prompts_and_images(variant, guided, files):
    """Two images together, on each of three prompts, with guidance and without."""
    shape = {"prompts": 3, "guided": guided}

    def reference(pipe):
        return tiny.generate(pipe, "sd", ip_adapter_image=[[*PICTURES[:2]]], **shape)

    def ours(pipe, prompt):
        prompt.set_image([*PICTURES[:2]])
        return tiny.generate(pipe, "sd", **shape)

    compare("sd", [files("sd", variant)], reference, ours, **shape)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_two_adapters_with_scales_of_their_own(kind, files):
    paths = [files(kind, "base"), files(kind, "plus", 1)]

    def reference(pipe):
        pipe.set_ip_adapter_scale([0.7, 0.4])
        return tiny.generate(pipe, kind, ip_adapter_image=[*PICTURES[:2]])

    def ours(pipe, one, other):
        one.set_image(PICTURES[0])
        other.set_image(PICTURES[1])
        one.set_scale(0.7)
        other.set_scale(0.4)
        return tiny.generate(pipe, kind)

    compare(kind, paths, reference, ours)


def test_a_face_and_a_picture(files):
    """The LoRA of one of two adapters is part of both."""
    paths = [files("sd", "faceid"), files("sd", "plus", 1)]
    given = faces()

    def reference(pipe):
        states, none = pipe.encode_image([PICTURES[1]], "cpu", 1, True)
        pairs = [torch.stack([torch.zeros_like(given), given]), torch.stack([none, states])]
        pairs = [pair.to(pipe.unet.dtype) for pair in pairs]
        return tiny.generate(pipe, "sd", ip_adapter_image_embeds=pairs)

    def ours(pipe, face, picture):
        face.set_embeds(given)
        picture.set_image(PICTURES[1])
        return tiny.generate(pipe, "sd")

    compare("sd", paths, reference, ours)


def test_a_negative_image(files):
    def reference(pipe):
        states, _ = pipe.encode_image([PICTURES[0]], "cpu", 1, True)
        against, _ = pipe.encode_image([PICTURES[1]], "cpu", 1, True)
        pair = torch.stack([against, states])
        return tiny.generate(pipe, "sd", ip_adapter_image_embeds=[pair])

    def ours(pipe, prompt):
        prompt.set_image(PICTURES[0], negative=PICTURES[1])
        return tiny.generate(pipe, "sd")

    compare("sd", [files("sd", "plus")], reference, ours)


def halves(height, width):
    """Two masks that share a soft border."""
    left = np.zeros((height, width), np.float32)
    left[:, : width // 2] = 1
    left[:, width // 2] = 0.6
    return [Image.fromarray((255 * m).astype(np.uint8)) for m in (left, 1 - left)]


def mask_of(images):
    """As `IPAdapterMaskProcessor` reads it: grey values to 0 and 1."""
    return torch.stack([torch.tensor(np.array(m)) / 255 > 0.5 for m in images]).float()


@pytest.mark.turns(3)
@pytest.mark.parametrize(
    ("kind", "variant", "size"),
    [("sd", "base", (16, 16)), ("sd", "plus", (16, 32)), ("sdxl", "plus", (16, 16))],
    ids=str,
)
def test_masks(kind, variant, size, files):
    masks = halves(*size)
    processed = IPAdapterMaskProcessor().preprocess(masks, height=size[0], width=size[1])
    assert torch.equal(processed[:, 0], mask_of(masks))

    def reference(pipe):
        pipe.set_ip_adapter_scale([[0.8, 0.8]])
        given = processed[:, 0][None].to(pipe.unet.dtype)
        return tiny.generate(
            pipe,
            kind,
            size=size,
            ip_adapter_image=[[*PICTURES[:2]]],
            cross_attention_kwargs={"ip_adapter_masks": [given]},
        )

    def ours(pipe, prompt):
        prompt.set_scale(0.8)
        prompt.set_image([*PICTURES[:2]], mask=mask_of(masks))
        return tiny.generate(pipe, kind, size=size)

    compare(kind, [files(kind, variant)], reference, ours, size=size)


BLOCKS = {
    "sd": [
        {"down": {"block_0": [0.5]}},
        {"mid": 0.6, "up": 0.3},
        {"down": 0.2, "up": {"block_1": [0.9, 0.1]}},
    ],
    "sdxl": [
        {"up": {"block_0": [0.0, 0.7, 0.2]}},
        {"down": {"block_1": 0.4, "block_2": [0.1, 1.0]}, "mid": 0.5},
        {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}},
    ],
}


@pytest.mark.turns(3)
@pytest.mark.parametrize(
    ("kind", "scale"), [(kind, scale) for kind, all_ in BLOCKS.items() for scale in all_], ids=str
)
def test_scales_by_block(kind, scale, files):
    def reference(pipe):
        pipe.set_ip_adapter_scale(scale)
        return tiny.generate(pipe, kind, ip_adapter_image=PICTURES[0])

    def ours(pipe, prompt):
        prompt.set_image(PICTURES[0])
        prompt.set_scale(scale)
        return tiny.generate(pipe, kind)

    compare(kind, [files(kind, "base")], reference, ours)


@pytest.mark.parametrize(
    ("preset", "scale"),
    [
        ("style", {"up": {"block_0": [0.0, 1.0, 0.0]}}),
        (
            "style+layout",
            {"up": {"block_0": [0.0, 1.0, 0.0]}, "down": {"block_2": [0.0, 1.0]}},
        ),
    ],
)
def test_presets_of_instant_style(preset, scale, files):
    def reference(pipe):
        pipe.set_ip_adapter_scale(scale)
        return tiny.generate(pipe, "sdxl", ip_adapter_image=PICTURES[0])

    def ours(pipe, prompt):
        prompt.set_image(PICTURES[0])
        prompt.set_scale(preset)
        return tiny.generate(pipe, "sdxl")

    compare("sdxl", [files("sdxl", "plus")], reference, ours)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_flux(guided, files):
    """With guidance, the negative prompt goes by a black image."""

    def reference(pipe):
        pipe.set_ip_adapter_scale(0.8)
        return tiny.generate(pipe, "flux", ip_adapter_image=PICTURES[0], guided=guided)

    def ours(pipe, prompt):
        prompt.set_image(PICTURES[0])
        prompt.set_scale(0.8)
        return tiny.generate(pipe, "flux", guided=guided)

    compare("flux", [files("flux", "flux")], reference, ours, guided=guided)


def test_flux_with_a_negative_image_two_adapters_and_scales_by_block(files):
    paths = [files("flux", "flux"), files("flux", "flux", 1)]

    def reference(pipe):
        pipe.set_ip_adapter_scale([[0.3, 0.9], 0.5])
        return tiny.generate(
            pipe,
            "flux",
            ip_adapter_image=[*PICTURES[:2]],
            negative_ip_adapter_image=[*PICTURES[2:]],
        )

    def ours(pipe, one, other):
        one.set_image(PICTURES[0], negative=PICTURES[2])
        other.set_image(PICTURES[1], negative=PICTURES[3])
        one.set_scale([0.3, 0.9])
        other.set_scale(0.5)
        return tiny.generate(pipe, "flux")

    compare("flux", paths, reference, ours)


def test_flux_with_sixteen_tokens(tmp_path):
    """Which diffusers knows by the width of Flux's text alone."""
    joint = 4096
    some = tiny.Random(2)
    model = tiny.flux_transformer(joint=joint)
    projector = some.linear("proj", 16 * joint, tiny.EMBEDDING) | some.norm("norm", joint)
    path = tmp_path / "v2.safetensors"
    tiny.write(path, {"image_proj": projector, "ip_adapter": tiny.flux_layers(model)})

    def reference(pipe):
        return tiny.generate(pipe, "flux", joint=joint, ip_adapter_image=PICTURES[0])

    def ours(pipe, prompt):
        assert prompt.adapter.projector.tokens == 16
        prompt.set_image(PICTURES[0])
        return tiny.generate(pipe, "flux", joint=joint)

    compare("flux", [path], reference, ours, joint=joint)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_scale_0_and_remove_are_the_model_as_it_came(kind, files):
    variant = "flux" if kind == "flux" else "plus"
    pipe = tiny.pipeline(kind)
    model = tiny.model_of(pipe)
    before = tiny.generate(pipe, kind)
    processors = dict(model.attn_processors)
    parts = pipe.image_encoder, pipe.feature_extractor
    prompt = load_image_prompt(pipe, files(kind, variant))
    prompt.set_image(PICTURES[0])
    assert not torch.allclose(tiny.generate(pipe, kind), before, atol=1e-3)
    prompt.set_scale(0.0)
    assert torch.equal(tiny.generate(pipe, kind), before)
    prompt.set_scale(1.0)
    prompt.remove()
    assert torch.equal(tiny.generate(pipe, kind), before)
    assert all(model.attn_processors[name] is one for name, one in processors.items())
    assert (pipe.image_encoder, pipe.feature_extractor) == parts


def test_a_face_comes_off_with_its_lora(files):
    pipe = tiny.pipeline("sd")
    before, kinds = tiny.generate(pipe, "sd"), [type(m) for m in pipe.unet.modules()]
    prompt = load_image_prompt(pipe, files("sd", "faceid"))
    prompt.set_embeds(faces())
    assert not torch.allclose(tiny.generate(pipe, "sd"), before, atol=1e-3)
    prompt.remove()
    assert torch.equal(tiny.generate(pipe, "sd"), before)
    assert [type(m) for m in pipe.unet.modules()] == kinds
