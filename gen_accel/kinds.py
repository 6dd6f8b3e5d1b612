"""Kinds of input that make a video, by pipeline class of diffusers: text alone, frames or a video.

`PIPELINES` holds each class whose transformer or UNet is served and makes videos. A new one is one
line here; where its arguments are not plain pictures, also a function in
`pipelines/generation/inputs.py`. Classes of one set of weights can be loaded from each other's
folders, so that `choose` finds the class that what is given needs.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen_accel.json_files import read_fields

TEXT, FIRST, LAST, VIDEO = KINDS = ("text", "first frame", "last frame", "video")
PARTS = ("transformer", "transformer_2", "unet")
OPTIONS = {FIRST: "--image FIRST.png", LAST: "--last-image LAST.png", VIDEO: "--video IN.mp4"}

# (transformer's config, pipeline's index, kinds): why these weights cannot, "" where they can
Fits = Callable[[Mapping[str, Any], Mapping[str, Any], Collection[str]], str]


def _any_weights(config: Mapping[str, Any], index: Mapping[str, Any], asked: Any) -> str:
    return ""


@dataclass(frozen=True)
class Takes:
    """Inputs that the pipelines of one class make a video from.

    Args:
        weights: name of the weights; classes with the same name load each other's. Its first word
            is the name of a line of models.
        text: the prompt alone is enough.
        image, last_image, video: names of the arguments; "" where there is none.
        strength: name of the argument for the share of a video that is made anew.
        alone: a last frame needs no first frame.
        together: frames go with a video.
        role: how a video is used: "remade" from its own frames, "continued" in a video that begins
            with it, "prolonged" by as many frames as are asked, or as "control" of another one.
        by: function of `inputs.py` that makes the arguments, where they are not plain pictures.
        fits: why weights of this name cannot do what is asked, see `Fits`.
        model: a published model.
        both: the same for a first and a last frame, where it is another one.
        frames: the only number of frames.
        size: the default height and width, where neither signature nor config has them.
        multiple: divides heights and widths besides what the autoencoder and the patches ask for.
        joins: decodes by itself, as its latents alone do not hold its whole video.
    """

    weights: str
    text: bool = True
    image: str = ""
    last_image: str = ""
    video: str = ""
    strength: str = ""
    alone: bool = False
    together: bool = False
    role: str = ""
    by: str = "plain"
    fits: Fits = _any_weights
    model: str = ""
    both: str = ""
    frames: int | None = None
    size: tuple[int, int] | None = None
    multiple: int = 16
    joins: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        held = (self.text, self.image, self.last_image, self.video)
        return tuple(kind for kind, has in zip(KINDS, held, strict=True) if has)

    def lacks(self, asked: Collection[str]) -> bool:
        """Whether pipelines of this class do not take what is asked, or need more."""
        if any(kind not in self.kinds for kind in asked):
            return True
        if VIDEO in asked and len(asked) > 1:
            return not self.together
        if LAST in asked and FIRST not in asked:
            return not self.alone
        return not asked and not self.text

    def role_of(self, strength: float | None) -> str:
        """How a video is used; one that could be continued is remade where a strength is given."""
        return "remade" if strength is not None else self.role


def _wan_text(config: Mapping[str, Any], index: Mapping[str, Any], asked: Any) -> str:
    return "its weights need a first frame" if _is_wan_image(config) else ""


def _wan_video(config: Mapping[str, Any], index: Mapping[str, Any], asked: Any) -> str:
    if _is_wan_image(config):
        return "its weights need a first frame"
    if index.get("boundary_ratio") is not None:
        return "diffusers makes a video anew with one transformer, and it has two"
    if index.get("expand_timesteps"):
        return "diffusers does not make a video anew with Wan 2.2 TI2V"
    return ""


def _wan_image(config: Mapping[str, Any], index: Mapping[str, Any], asked: Collection[str]) -> str:
    if not config:
        return ""
    if index.get("expand_timesteps"):
        return "Wan 2.2 TI2V takes a first frame alone" if LAST in asked else ""
    if not _is_wan_image(config):
        return "its weights take no first frame"
    return _pair(config, asked)


def _pair(config: Mapping[str, Any], asked: Collection[str]) -> str:
    """An image encoder's features are of one picture, or of two, as the weights were trained."""
    two = config.get("pos_embed_seq_len") is not None
    if LAST in asked and config.get("image_dim") is not None and not two:
        return "its weights take a first frame alone"
    if LAST not in asked and two:
        return "its weights need a last frame too"
    return ""


def _skyreels_image(
    config: Mapping[str, Any], index: Mapping[str, Any], asked: Collection[str]
) -> str:
    return _pair(config, asked)


def _is_wan_image(config: Mapping[str, Any]) -> bool:
    """Weights that take the frames to keep beside the noisy latents."""
    channels = config.get("in_channels", 16)
    return channels > (config.get("out_channels") or channels)


def _cog_text(config: Mapping[str, Any], index: Mapping[str, Any], asked: Any) -> str:
    return "its weights need a first frame" if _is_wan_image(config) else ""


def _cog_image(config: Mapping[str, Any], index: Mapping[str, Any], asked: Any) -> str:
    return "" if _is_wan_image(config) or not config else "its weights take no first frame"


_CONTROLLED = (
    "it is controlled by a video of poses, edges or depth, which is made from another one"
)
_CONTROLNET = "it needs a ControlNet and the frames that it reads"
_PICTURES = "it makes pictures"
_FACES = "it keeps a face, whose features another program takes from a picture"
_LATENTS = "it goes on from latents of another pipeline"

# To what it takes, or why `generate` does not use it.
PIPELINES: dict[str, Takes | str] = {
    # Wan
    "WanPipeline": Takes("wan", fits=_wan_text, model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "WanImageToVideoPipeline": Takes(
        "wan",
        text=False,
        image="image",
        last_image="last_image",
        fits=_wan_image,
        model="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        both="Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
    ),
    "WanVideoToVideoPipeline": Takes(
        "wan", text=False, video="video", strength="strength", role="remade", fits=_wan_video
    ),
    "WanVACEPipeline": Takes(
        "wan vace",
        image="video",
        last_image="video",
        video="video",
        alone=True,
        together=True,
        role="control",
        by="vace",
        model="Wan-AI/Wan2.1-VACE-14B-diffusers",
    ),
    "LucyEditPipeline": Takes(
        "wan edit", text=False, video="video", role="remade", model="decart-ai/Lucy-Edit-Dev"
    ),
    "WanAnimatePipeline": (
        "it animates a picture by two videos, of poses and of faces, which a program of its own "
        "makes"
    ),
    "AnyFlowPipeline": Takes("anyflow", video="video", role="continued"),
    "ChronoEditPipeline": Takes(
        "chronoedit", text=False, image="image", frames=5, model="nvidia/ChronoEdit-14B-Diffusers"
    ),
    # SkyReels-V2
    "SkyReelsV2Pipeline": Takes(
        "skyreels t2v", model="Skywork/SkyReels-V2-T2V-14B-720P-Diffusers"
    ),
    "SkyReelsV2ImageToVideoPipeline": Takes(
        "skyreels i2v",
        text=False,
        image="image",
        last_image="last_image",
        fits=_skyreels_image,
        model="Skywork/SkyReels-V2-I2V-14B-540P-Diffusers",
    ),
    "SkyReelsV2DiffusionForcingPipeline": Takes(
        "skyreels df", model="Skywork/SkyReels-V2-DF-14B-540P-Diffusers"
    ),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": Takes(
        "skyreels df",
        text=False,
        image="image",
        last_image="last_image",
        joins=True,
        model="Skywork/SkyReels-V2-DF-14B-540P-Diffusers",
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": Takes(
        "skyreels df",
        text=False,
        video="video",
        role="prolonged",
        by="overlapping",
        joins=True,
        model="Skywork/SkyReels-V2-DF-14B-540P-Diffusers",
    ),
    # Helios
    "HeliosPipeline": Takes("helios", image="image", video="video", role="prolonged"),
    "HeliosPyramidPipeline": Takes(
        "helios pyramid", image="image", video="video", role="prolonged"
    ),
    # HunyuanVideo
    "HunyuanVideoPipeline": Takes("hunyuan t2v", model="hunyuanvideo-community/HunyuanVideo"),
    "HunyuanVideoImageToVideoPipeline": Takes(
        "hunyuan i2v",
        text=False,
        image="image",
        joins=True,
        model="hunyuanvideo-community/HunyuanVideo-I2V",
    ),
    "HunyuanSkyreelsImageToVideoPipeline": Takes("hunyuan skyreels", text=False, image="image"),
    "HunyuanVideoFramepackPipeline": Takes(
        "hunyuan framepack",
        text=False,
        image="image",
        last_image="last_image",
        model="lllyasviel/FramePackI2V_HY",
    ),
    "HunyuanVideo15Pipeline": Takes(
        "hunyuan15 t2v", model="hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v"
    ),
    "HunyuanVideo15ImageToVideoPipeline": Takes(
        "hunyuan15 i2v",
        text=False,
        image="image",
        model="hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v",
    ),
    # CogVideoX
    "CogVideoXPipeline": Takes("cogvideox", fits=_cog_text, model="zai-org/CogVideoX-5b"),
    "CogVideoXImageToVideoPipeline": Takes(
        "cogvideox",
        text=False,
        image="image",
        fits=_cog_image,
        model="zai-org/CogVideoX-5b-I2V",
    ),
    "CogVideoXVideoToVideoPipeline": Takes(
        "cogvideox",
        text=False,
        video="video",
        strength="strength",
        role="remade",
        fits=_cog_text,
    ),
    "CogVideoXFunControlPipeline": _CONTROLLED,
    "ConsisIDPipeline": _FACES,
    # LTX-Video
    "LTXPipeline": Takes("ltx", model="Lightricks/LTX-Video"),
    "LTXImageToVideoPipeline": Takes(
        "ltx", text=False, image="image", multiple=32, model="Lightricks/LTX-Video"
    ),
    "LTXConditionPipeline": Takes(
        "ltx",
        image="conditions",
        last_image="conditions",
        video="conditions",
        strength="denoise_strength",
        alone=True,
        role="continued",
        by="ltx",
        multiple=32,
        model="Lightricks/LTX-Video-0.9.5",
    ),
    "LTXI2VLongMultiPromptPipeline": "its windows have prompts of their own",
    # LTX-2
    "LTX2Pipeline": Takes("ltx2", model="Lightricks/LTX-2"),
    "LTX2ImageToVideoPipeline": Takes(
        "ltx2", text=False, image="image", multiple=32, model="Lightricks/LTX-2"
    ),
    "LTX2ConditionPipeline": Takes(
        "ltx2",
        image="conditions",
        last_image="conditions",
        video="conditions",
        alone=True,
        role="continued",
        by="ltx2",
        multiple=32,
        model="Lightricks/LTX-2",
    ),
    "LTX2DFRPipeline": Takes("ltx2 dfr"),
    "LTX2DFRTemporalRefinePipeline": _LATENTS,
    "LTX2HDRPipeline": "it makes a video of another one for high dynamic range, in linear light",
    "LTX2InContextPipeline": Takes("ltx2 in context"),
    # Kandinsky
    "Kandinsky5T2VPipeline": Takes(
        "kandinsky5 t2v", model="kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers"
    ),
    "Kandinsky5I2VPipeline": Takes(
        "kandinsky5 i2v",
        text=False,
        image="image",
        model="kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers",
    ),
    "Kandinsky5T2IPipeline": _PICTURES,
    "Kandinsky5I2IPipeline": _PICTURES,
    "Kandinsky6TI2VAPipeline": Takes("kandinsky6", image="image"),
    # Cosmos
    "CosmosTextToWorldPipeline": Takes(
        "cosmos1 t2w", model="nvidia/Cosmos-1.0-Diffusion-7B-Text2World"
    ),
    "CosmosVideoToWorldPipeline": Takes(
        "cosmos1 v2w",
        text=False,
        image="image",
        video="video",
        role="continued",
        model="nvidia/Cosmos-1.0-Diffusion-7B-Video2World",
    ),
    "Cosmos2TextToImagePipeline": _PICTURES,
    "Cosmos2VideoToWorldPipeline": Takes(
        "cosmos2 v2w",
        text=False,
        image="image",
        video="video",
        role="continued",
        model="nvidia/Cosmos-Predict2-2B-Video2World",
    ),
    "Cosmos2_5_PredictBasePipeline": Takes(
        "cosmos25",
        image="image",
        video="video",
        role="continued",
        model="nvidia/Cosmos-Predict2.5-2B",
    ),
    "Cosmos2_5_TransferPipeline": _CONTROLLED,
    "Cosmos3OmniPipeline": Takes(
        "cosmos3", image="image", video="video", role="continued", size=(720, 1280)
    ),
    # EasyAnimate
    "EasyAnimatePipeline": Takes(
        "easyanimate t2v", model="alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers"
    ),
    "EasyAnimateInpaintPipeline": Takes(
        "easyanimate inpaint",
        text=False,
        image="video",
        last_image="video",
        video="video",
        strength="strength",
        alone=True,
        role="remade",
        by="inpainted",
        model="alibaba-pai/EasyAnimateV5.1-12b-zh-InP-diffusers",
    ),
    "EasyAnimateControlPipeline": _CONTROLLED,
    # AnimateDiff
    "AnimateDiffPipeline": Takes("animatediff"),
    "AnimateDiffVideoToVideoPipeline": Takes(
        "animatediff", text=False, video="video", strength="strength", role="remade"
    ),
    "AnimateDiffPAGPipeline": Takes("animatediff pag"),
    "AnimateDiffSDXLPipeline": Takes("animatediff sdxl"),
    "AnimateDiffControlNetPipeline": _CONTROLNET,
    "AnimateDiffSparseControlNetPipeline": _CONTROLNET,
    "AnimateDiffVideoToVideoControlNetPipeline": _CONTROLNET,
    "PIAPipeline": Takes("pia", text=False, image="image"),
    # Others
    "MotifVideoPipeline": Takes("motif", model="Motif-Technologies/Motif-Video-2B"),
    "MotifVideoImage2VideoPipeline": Takes(
        "motif", text=False, image="image", model="Motif-Technologies/Motif-Video-2B"
    ),
    "AllegroPipeline": Takes("allegro", model="rhymes-ai/Allegro"),
    "LattePipeline": Takes("latte", model="maxin-cn/Latte-1"),
    "MochiPipeline": Takes("mochi", model="genmo/mochi-1-preview"),
}


def takes(name: Any) -> Takes | None:
    """Look up what pipelines of a class take; None for one that is not used or not known."""
    row = PIPELINES.get(name)
    return row if isinstance(row, Takes) else None


def kinds_of(name: str) -> tuple[str, ...]:
    """List what pipelines of a class make a video from, by name, of `KINDS`.

    A class counts with all classes that its folder can be loaded as. What its weights decide, such
    as Wan's channels, is not looked at.
    """
    row = takes(name)
    if row is None:
        return ()
    held = {kind for _, one in _siblings(name, row) for kind in one.kinds}
    return tuple(kind for kind in KINDS if kind in held)


def table() -> str:
    """Write in Markdown what each group of classes with the same weights makes a video from, where
    it is more than text, and the classes that are not used."""
    lines = [
        "| pipelines of diffusers | text | first frame | last frame | video | a published model |",
        "|---|---|---|---|---|---|",
    ]
    for weights in dict.fromkeys(one.weights for one in _used().values()):
        group = {name: one for name, one in _used().items() if one.weights == weights}
        held = {kind for one in group.values() for kind in one.kinds}
        if held == {TEXT}:
            continue
        roles = [one.role for one in group.values()]
        roles += ["remade" for one in group.values() if one.strength]
        cells = [
            ", ".join(f"`{name}`" for name in group),
            *("yes" if kind in held else "" for kind in (TEXT, FIRST, LAST)),
            ", ".join(dict.fromkeys(role for role in roles if role)),
            ", ".join(dict.fromkeys(one.model for one in group.values() if one.model)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    unused = [f"- `{name}`: {why}." for name, why in PIPELINES.items() if isinstance(why, str)]
    return "\n".join([*lines, "", "These are for Python alone:", "", *unused])


def pipeline_of(model: str) -> str | None:
    """Name the class of pipeline of a published model; None for one that is not in the list."""
    return next((name for name, one in _used().items() if one.model == model), None)


def _used() -> dict[str, Takes]:
    return {name: one for name, one in PIPELINES.items() if isinstance(one, Takes)}


def choose(
    index: Mapping[str, Any],
    config: Mapping[str, Any],
    asked: Collection[str],
    model: object,
    *,
    strength: bool = False,
) -> str:
    """Return the name of the pipeline class that makes a video from what is given.

    Args:
        index: contents of `model_index.json`.
        config: of its first transformer; empty where it is not known.
        asked: of `KINDS`, without "text".
        model: for messages.
        strength: whether the share that is made anew is given too.

    Raises:
        ValueError: the weights cannot, with the models that can; or they need more.
    """
    own = str(index.get("_class_name"))
    row = takes(own)
    if row is None:
        reason = PIPELINES.get(own)
        if isinstance(reason, str):
            raise ValueError(f"{own} of {model} is not for this: {reason}; call it in Python")
        if asked:
            raise ValueError(f"{own} of {model} is not known to take {_words(asked)}")
        return own
    able = [name for name, _ in _siblings(own, row) if not _why_not(name, config, index, asked)]
    for name in able:
        if not strength or PIPELINES[name].strength:  # pyright: ignore[reportAttributeAccessIssue]
            return name
    if able:
        raise ValueError(f"{able[0]}, for {model}, takes no strength: leave --strength out")
    raise ValueError(_refusal(own, row, config, index, asked, model))


def choose_in(folder: Path, asked: Collection[str], *, strength: bool = False) -> str:
    """Return what `choose` does for the pipeline in a folder."""
    index = read_fields(folder / "model_index.json")
    config = folder / part_of(index) / "config.json"
    found = read_fields(config) if config.is_file() else {}
    return choose(index, found, asked, folder, strength=strength)


def part_of(index: Mapping[str, Any]) -> str:
    """Name of the first transformer of a pipeline."""
    return next((part for part in PARTS if index.get(part)), PARTS[0])


def _siblings(own: str, row: Takes) -> list[tuple[str, Takes]]:
    """Classes of the same weights with what they take, its own first."""
    others = [
        (name, other)
        for name, other in _used().items()
        if name != own and other.weights == row.weights
    ]
    return [(own, row), *others]


def _why_not(
    name: str, config: Mapping[str, Any], index: Mapping[str, Any], asked: Collection[str]
) -> str:
    """Why pipelines of a class with these weights do not take what is asked; "" where they do."""
    row = PIPELINES[name]
    assert isinstance(row, Takes)
    return "its class does not" if row.lacks(asked) else row.fits(config, index, asked)


def _refusal(
    own: str,
    row: Takes,
    config: Mapping[str, Any],
    index: Mapping[str, Any],
    asked: Collection[str],
    model: object,
) -> str:
    """Say what the model takes, and what to give or which model to use instead."""
    can = [
        held
        for held in ((), (FIRST,), (LAST,), (FIRST, LAST), (VIDEO,))
        if any(not _why_not(name, config, index, held) for name, _ in _siblings(own, row))
    ]
    made = f"{own} of {model} makes a video from {' or '.join(map(_words, can))}"
    more = [set(held) - set(asked) for held in can if set(held) > set(asked)]
    if more:
        least = min(more, key=len)
        return f"{made}: give {' and '.join(OPTIONS[kind] for kind in KINDS if kind in least)}"
    line = row.weights.split()[0]
    others = [
        other.both if other.both and LAST in asked else other.model
        for other in _used().values()
        if other.weights.split()[0] == line and not other.lacks(asked)
    ]
    found = dict.fromkeys(name for name in others if name and name != str(model))
    use = f", or use {' or '.join(found)}" if found else ""
    held = max((held for held in can if set(held) < set(asked)), key=len, default=())
    extra = " and ".join(OPTIONS[kind].split()[0] for kind in asked if kind not in held)
    return f"{made}: leave {extra} out{use}"


def _words(asked: Collection[str]) -> str:
    """Name kinds in words: "a first frame and a last frame"."""
    return " and ".join(f"a {kind}" for kind in KINDS if kind in asked) or "text alone"
