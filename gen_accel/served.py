"""Models by their names: those that are served, and the classes that are not, with the reason."""

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

from gen_accel.parsing import shown

DEMO = "demo"  # the embedded model, and its image prompt
STEPS = 50  # of denoising, where neither a model nor its pipeline says how many


class RunSize(NamedTuple):
    """Size of a run: frames, height and width of the clip in pixels, and denoising steps."""

    frames: int
    height: int
    width: int
    steps: int = STEPS


class Published(NamedTuple):
    """A published model.

    Args:
        run: what it is run with where nothing is said.
        repository: on huggingface.co, as diffusers loads it.
        also: other names of it, and its repositories in another layout.
        kind: the class of its transformer; "" for the first of the family.
        blocks: its pipeline is a modular one, of blocks.
    """

    run: RunSize
    repository: str
    also: tuple[str, ...] = ()
    kind: str = ""
    blocks: bool = False


class Served(NamedTuple):
    """A family of models.

    Args:
        home: its module in `attention_processors.families`, and its class there.
        transformers: the classes of diffusers that it serves.
        published: models that are known by name.
        also: other names of the family.
        unsized: further models to their repositories, whose configs are not known here.
    """

    home: str
    transformers: tuple[str, ...]
    published: Mapping[str, Published] = MappingProxyType({})
    also: tuple[str, ...] = ()
    unsized: Mapping[str, str] = MappingProxyType({})


class ModelRow(NamedTuple):
    """The row that a name of a model stands for.

    Args:
        family: in `FAMILIES`; "" if its class is refused.
        kind: the class of its transformer.
        published: in `PUBLISHED`; "" if no model of the class is.
        repository: of the model; "" if none of the class is known.
        refused: why no family serves the class.
    """

    family: str
    kind: str
    published: str = ""
    repository: str = ""
    refused: str = ""


WAN_480P = RunSize(81, 480, 832)
SKYREELS_540P, SKYREELS_720P = RunSize(97, 544, 960), RunSize(121, 720, 1280)
COGVIDEOX = RunSize(49, 480, 720)


FAMILIES: dict[str, Served] = {
    "wan": Served(
        "wan:Wan",
        ("WanTransformer3DModel", "WanVACETransformer3DModel"),
        {
            "Wan2.1-T2V-1.3B": Published(
                WAN_480P, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", ("Wan-AI/Wan2.1-T2V-1.3B",)
            ),
            "Wan2.1-T2V-14B": Published(
                WAN_480P, "Wan-AI/Wan2.1-T2V-14B-Diffusers", ("Wan-AI/Wan2.1-T2V-14B",)
            ),
            "Wan2.1-I2V-14B": Published(
                WAN_480P,
                "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
                ("Wan-AI/Wan2.1-I2V-14B-480P",),
            ),
            "Wan2.1-VACE-14B": Published(
                WAN_480P,
                "Wan-AI/Wan2.1-VACE-14B-diffusers",
                ("Wan-AI/Wan2.1-VACE-14B", "wan vace"),
                kind="WanVACETransformer3DModel",
            ),
            "Wan2.2-T2V-A14B": Published(
                WAN_480P, "Wan-AI/Wan2.2-T2V-A14B-Diffusers", ("Wan-AI/Wan2.2-T2V-A14B",)
            ),
            "Wan2.2-I2V-A14B": Published(
                WAN_480P, "Wan-AI/Wan2.2-I2V-A14B-Diffusers", ("Wan-AI/Wan2.2-I2V-A14B",)
            ),
            "Wan2.2-TI2V-5B": Published(
                RunSize(121, 704, 1280),
                "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
                ("Wan-AI/Wan2.2-TI2V-5B",),
            ),
        },
    ),
    "skyreels": Served(
        "wan:SkyReels",
        ("SkyReelsV2Transformer3DModel",),
        {
            "SkyReels-V2-T2V-14B": Published(
                SKYREELS_720P,
                "Skywork/SkyReels-V2-T2V-14B-720P-Diffusers",
                ("Skywork/SkyReels-V2-T2V-14B-720P",),
            ),
            "SkyReels-V2-DF-1.3B": Published(
                SKYREELS_540P,
                "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers",
                ("Skywork/SkyReels-V2-DF-1.3B-540P",),
            ),
        },
    ),
    "wan_animate": Served(
        "wan:WanAnimate",
        ("WanAnimateTransformer3DModel",),
        {
            "Wan2.2-Animate-14B": Published(  # frames of a segment
                RunSize(77, 720, 1280, 20),
                "Wan-AI/Wan2.2-Animate-14B-Diffusers",
                ("Wan-AI/Wan2.2-Animate-14B",),
            )
        },
    ),
    "chronoedit": Served(
        "wan:ChronoEdit",
        ("ChronoEditTransformer3DModel",),
        {
            "ChronoEdit-14B": Published(
                WAN_480P, "nvidia/ChronoEdit-14B-Diffusers", ("nvidia/ChronoEdit-14B",)
            )
        },
    ),
    "helios": Served(
        "wan:Helios",
        ("HeliosTransformer3DModel",),
        {  # of which it makes four chunks of 33
            "Helios-Base": Published(RunSize(129, 384, 640), "BestWishYsh/Helios-Base")
        },
    ),
    "anyflow": Served(
        "anyflow:AnyFlow",
        ("AnyFlowTransformer3DModel",),
        {"AnyFlow-Wan2.1-T2V-14B": Published(WAN_480P, "nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers")},
    ),
    "anyflow_far": Served(
        "anyflow:AnyFlowFAR",
        ("AnyFlowFARTransformer3DModel",),
        {
            f"AnyFlow-FAR-Wan2.1-{size}": Published(
                WAN_480P, f"nvidia/AnyFlow-FAR-Wan2.1-{size}-Diffusers"
            )
            for size in ("1.3B", "14B")
        },
    ),
    "hunyuan_video": Served(
        "hunyuan_video:HunyuanVideo",
        ("HunyuanVideoTransformer3DModel",),
        {
            "HunyuanVideo": Published(
                RunSize(129, 720, 1280),
                "hunyuanvideo-community/HunyuanVideo",
                ("tencent/HunyuanVideo", "hunyuan video 13B", "hunyuan video 1.0"),
            )
        },
    ),
    "hunyuan_video15": Served(
        "hunyuan_video:HunyuanVideo15",
        ("HunyuanVideo15Transformer3DModel",),
        {
            "HunyuanVideo-1.5": Published(
                RunSize(121, 480, 848),
                "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
                ("tencent/HunyuanVideo-1.5", "hunyuan video 1.5 8.3B"),
            )
        },
    ),
    "framepack": Served(
        "hunyuan_video:FramePack",
        ("HunyuanVideoFramepackTransformer3DModel",),
        {
            "FramePackI2V_HY": Published(
                RunSize(129, 720, 1280), "lllyasviel/FramePackI2V_HY", ("FramePack I2V HY",)
            )
        },
    ),
    "kandinsky5": Served(
        "kandinsky:Kandinsky5",
        ("Kandinsky5Transformer3DModel",),
        {
            "Kandinsky-5.0-T2V-Lite": Published(
                RunSize(121, 512, 768),
                "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
                ("ai-forever/Kandinsky-5.0-T2V-Lite-sft-5s", "kandinsky 5 t2v lite"),
            )
        },
    ),
    "kandinsky6": Served(
        "kandinsky:Kandinsky6", ("Kandinsky6Transformer3DModel",), also=("kandinsky 6.0",)
    ),
    "motif": Served(
        "joint:Motif",
        ("MotifVideoTransformer3DModel",),
        unsized={"Motif-Video-2B": "Motif-Technologies/Motif-Video-2B"},
    ),
    "minimax_h3": Served(
        "minimax_h3:MiniMaxH3",
        ("MiniMaxH3Transformer3DModel",),
        {
            "MiniMax-H3": Published(
                RunSize(124, 768, 1344),
                "MiniMaxAI/MiniMax-H3",
                ("MiniMax H3 33B", "hailuo h3", "h3"),
                blocks=True,
            )
        },
    ),
    "cogvideox": Served(
        "cogvideox:CogVideoX",
        ("CogVideoXTransformer3DModel",),
        {
            "CogVideoX-2b": Published(COGVIDEOX, "THUDM/CogVideoX-2b", ("zai-org/CogVideoX-2b",)),
            "CogVideoX-5b": Published(COGVIDEOX, "THUDM/CogVideoX-5b", ("zai-org/CogVideoX-5b",)),
            "CogVideoX1.5-5b": Published(
                RunSize(81, 768, 1360), "THUDM/CogVideoX1.5-5B", ("zai-org/CogVideoX1.5-5B",)
            ),
        },
        also=("cogvideo",),
    ),
    "consisid": Served("cogvideox:ConsisID", ("ConsisIDTransformer3DModel",)),
    "ltx": Served(
        "ltx:LTX",
        ("LTXVideoTransformer3DModel",),
        {"LTX-Video": Published(RunSize(161, 512, 704), "Lightricks/LTX-Video", ("ltxv",))},
    ),
    "ltx2": Served(
        "ltx:LTX2",
        ("LTX2VideoTransformer3DModel",),
        {"LTX-2": Published(RunSize(121, 512, 768, 30), "Lightricks/LTX-2", ("ltxv 2",))},
        unsized={"LTX-2.5": "Lightricks/LTX-2.5-Diffusers"},
    ),
    "mochi": Served(
        "joint:Mochi",
        ("MochiTransformer3DModel",),
        {"mochi-1-preview": Published(RunSize(163, 480, 848, 64), "genmo/mochi-1-preview")},
    ),
    "easyanimate": Served(
        "cogvideox:EasyAnimate",
        ("EasyAnimateTransformer3DModel",),
        {
            "EasyAnimateV5.1-12b": Published(
                RunSize(49, 512, 512), "alibaba-pai/EasyAnimateV5.1-12b-zh"
            )
        },
    ),
    "allegro": Served(
        "latte:Allegro",
        ("AllegroTransformer3DModel",),
        {"Allegro": Published(RunSize(88, 720, 1280, 100), "rhymes-ai/Allegro")},
    ),
    "latte": Served(
        "latte:Latte", ("LatteTransformer3DModel",), unsized={"Latte-1": "maxin-cn/Latte-1"}
    ),
    "cosmos": Served(
        "cosmos:Cosmos",
        ("CosmosTransformer3DModel",),
        {
            "Cosmos-Predict2-2B-Video2World": Published(
                RunSize(93, 704, 1280, 35), "nvidia/Cosmos-Predict2-2B-Video2World"
            ),
            "Cosmos-1.0-Diffusion-7B": Published(
                RunSize(121, 704, 1280, 36), "nvidia/Cosmos-1.0-Diffusion-7B-Text2World"
            ),
        },
    ),
    "cosmos3": Served("cosmos:Cosmos3", ("Cosmos3OmniTransformer",)),
    "animatediff": Served("stable_diffusion:AnimateDiff", ("UNetMotionModel",)),
    "flux": Served("images:Flux", ("FluxTransformer2DModel",), also=("flux.1", "flux dev")),
    "flux2": Served("images:Flux2", ("Flux2Transformer2DModel",), also=("flux.2 dev",)),
    "flux3": Served("images:Flux3", ("Flux3Transformer2DModel",), also=("flux.3 dev",)),
    "sd3": Served(
        "images:StableDiffusion3", ("SD3Transformer2DModel",), also=("stable diffusion 3", "sd3.5")
    ),
    "qwenimage": Served("images:QwenImage", ("QwenImageTransformer2DModel",)),
    "hidream": Served("images:HiDream", ("HiDreamImageTransformer2DModel",)),
    "z_image": Served("images:ZImage", ("ZImageTransformer2DModel",), also=("z-image turbo",)),
    "pixart": Served(
        "images:PixArt", ("PixArtTransformer2DModel",), also=("pixart sigma", "pixart alpha")
    ),
    "hunyuan_image": Served(
        "images:HunyuanImage", ("HunyuanImageTransformer2DModel",), also=("hunyuan image 2.1",)
    ),
    "joyimage_edit_plus": Served(
        "images:JoyImageEditPlus", ("JoyImageEditPlusTransformer3DModel",)
    ),
    "krea2": Served("images:Krea2", ("Krea2Transformer2DModel",), also=("krea 2",)),
    "stable_diffusion": Served(
        "stable_diffusion:StableDiffusion", ("UNet2DConditionModel",), also=("sdxl", "sd 1.5")
    ),
}
# What models that are known by name are run with where nothing is said. The published ones: the
# defaults of their pipelines, or what their makers advise where these are another model's.
RUNS: dict[str, RunSize] = {
    DEMO: RunSize(33, 96, 96, 20),
    **{name: one.run for served in FAMILIES.values() for name, one in served.published.items()},
}
PUBLISHED = tuple(name for name in RUNS if name != DEMO)

# Classes of diffusers that cannot be served, and why not.
LINEAR = "its self-attention is linear, without pairs of tokens to leave out"
BIAS = (
    "its pipelines add the mask of the text to the scores as a bias of 0 or 1, which weighs "
    "padding down without hiding it"
)
SMALL = (
    "its pictures are of some 4,000 tokens, at which sparse attention gains nothing, and no "
    "family was written for it"
)
SOUND = "it makes sound, whose tokens have no grid of frames, rows and columns"
PART = "it is a part of other models: attach to the whole model"
OWN = "gen_accel.attach_own runs its own sparse attention by our kernels"
REFUSED: dict[str, str] = {
    "AceStepTransformer1DModel": SOUND,
    "AuraFlowTransformer2DModel": SMALL,
    "BriaFibo2Transformer2DModel": SMALL,
    "BriaFiboTransformer2DModel": SMALL,
    "BriaTransformer2DModel": SMALL,
    "ChromaTransformer2DModel": BIAS,
    "CogView3PlusTransformer2DModel": SMALL,
    "CogView4Transformer2DModel": BIAS,
    "DiTTransformer2DModel": "its pictures are of 1,024 tokens at most, too few to gain by",
    "DreamLiteTransformer2DModel": PART,
    "DualTransformer2DModel": PART,
    "ErnieImageTransformer2DModel": SMALL,
    "GlmImageTransformer2DModel": BIAS,
    "HunyuanDiT2DModel": SMALL,
    "Ideogram4Transformer2DModel": (
        "text and picture are packed into one sequence by a mask of all pairs of tokens"
    ),
    "JoyImageEditTransformer3DModel": SMALL,
    "Kandinsky6SRTransformer3DModel": (
        "its tokens come in tiles of 8 x 8, among which a sparse attention of its own, which "
        f"cannot be turned off, chooses by a block mask of FlexAttention; {OWN}"
    ),
    "LongCatAudioDiTTransformer": SOUND,
    "LongCatImageTransformer2DModel": SMALL,
    "Lumina2Transformer2DModel": SMALL,
    "LuminaNextDiT2DModel": SMALL,
    "MiniMaxMusic3RVQDepthDecoder": PART,
    "MiniMaxMusic3Transformer1DModel": SOUND,
    "NucleusMoEImageTransformer2DModel": SMALL,
    "OmniGenTransformer2DModel": (
        "its text is causal and its pictures are not, by a mask of all pairs of tokens"
    ),
    "OvisImageTransformer2DModel": SMALL,
    "PRXTransformer2DModel": SMALL,
    "PriorTransformer": "it makes one vector for a prompt, and no picture",
    "QwenImage21Transformer2DModel": (
        "its text is causal and kept as keys from step to step, so that its attention is several "
        f"calls, or one by a block mask of FlexAttention; for that one, {OWN}"
    ),
    "RFD4ProteinaTransformer": "it makes proteins, whose tokens have no grid of rows and columns",
    "SanaControlNetModel": LINEAR,
    "SanaTransformer2DModel": LINEAR,
    "SanaVideoTransformer3DModel": LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": (
        "its forward pass takes tokens without the grid that they come from"
    ),
    "SanaWMTransformer3DModel": (
        "its self-attention is a gated delta rule, or softmax in modules that have no processor "
        "to replace"
    ),
    "StableAudio3DiTModel": SOUND,
    "StableAudioDiTModel": SOUND,
    "T5FilmDecoder": SOUND,
    "Transformer2DModel": PART,
    "TransformerTemporalModel": PART,
    "WanAnimate2Transformer3DModel": (
        "a frame sees the reference's tokens of its own time alone, by a block mask of "
        f"FlexAttention over padded tokens; {OWN}"
    ),
}


# Parts of names that say how weights are stored or at which height they were trained.
_STORED = re.compile(r"diffusers|hf|fp32|bf16|fp16|fp8|e4m3fn|e5m2|scaled|gguf|\d+p")


def _words(name: str) -> tuple[str, ...]:
    """Words and numbers of a name: (wan, 22, t, 2v, a, 14b) of "Wan2.2-T2V-A14B-Diffusers", and
    of "wan2_2 t2v a14b"."""
    plain = re.sub(r"v(?=\d)", "", name.lower())
    plain = re.sub(r"(?<![\d.])(\d)[._](\d)(?!\d)", r"\1\2", plain)
    parts = (part for part in re.split(r"[^a-z\d]+", plain) if not _STORED.fullmatch(part))
    return tuple(word for part in parts for word in re.findall(r"[a-z]+|\d+[a-z]*", part))


def _named_rows() -> Iterator[tuple[ModelRow, tuple[str, ...]]]:
    """Rows with their names, published models before their classes and their family."""
    for family, served in FAMILIES.items():
        known = dict[str, ModelRow]()  # the first of each class
        for name, one in served.published.items():
            kind = one.kind or served.transformers[0]
            row = ModelRow(family, kind, name, one.repository)
            known.setdefault(kind, row)
            yield row, (name, one.repository, *one.also)
        for name, repository in served.unsized.items():
            row = ModelRow(family, served.transformers[0], repository=repository)
            known.setdefault(row.kind, row)
            yield row, (name, repository)
        for kind in served.transformers:
            of_family = (family, *served.also) if kind == served.transformers[0] else ()
            yield known.get(kind, ModelRow(family, kind)), (kind, _plain_kind(kind), *of_family)
    for kind, why in REFUSED.items():
        yield ModelRow("", kind, refused=why), (kind, _plain_kind(kind))


def _plain_kind(kind: str) -> str:
    """Name a class without what all classes are called: "MiniMaxH3"."""
    return re.sub(r"(Transformer)?(\dD)?(Model)?$", "", kind)


@cache
def _index() -> tuple[dict[str, ModelRow], dict[tuple[str, ...], ModelRow]]:
    """Rows by their names in one word, and of published models by the words of their names."""
    whole, published = dict[str, ModelRow](), dict[tuple[str, ...], ModelRow]()
    for row, names in _named_rows():
        for words in (_words(name.rpartition("/")[2]) for name in names):
            whole.setdefault("".join(words), row)
            if row.repository:
                published.setdefault(words, row)
    return whole, published


def row_of(name: str) -> ModelRow | None:
    """Find what a name of a model stands for; None for one that is not known here.

    A name is a published model's, its repository's, a family's or a class's. Case and separators
    do not count, nor how weights are stored. Words of a published name may be left out but the
    first: "wan 2.2 14b" is Wan2.2-T2V-A14B, and "wan 2.2" the first of that version. A repository
    of another owner is another model.
    """
    owner, slash, rest = name.rpartition("/")
    words, (whole, published) = _words(rest), _index()
    if not words or "/" in owner or (slash and not owner):
        return None
    found = [whole["".join(words)]] if "".join(words) in whole else []
    for known, row in published.items():
        left = iter(known)
        if known[0] == words[0] and all(word in left for word in words):
            found.append(row)
    if slash:
        found = [row for row in found if owner.lower() in map(str.lower, _owners(row))]
    return found[0] if found else None


def _owners(row: ModelRow) -> list[str]:
    return [name.partition("/")[0] for name in (row.repository, *_other_names(row)) if "/" in name]


def _other_names(row: ModelRow) -> tuple[str, ...]:
    return FAMILIES[row.family].published[row.published].also if row.published else ()


def repository_of(name: str) -> str:
    """Name the repository that diffusers loads a published model from; other names, and a
    repository that is not of another layout, are as they were."""
    row = row_of(name)
    if row is None or not row.repository:
        return name
    other = map(str.lower, _other_names(row))
    return name if "/" in name and name.lower() not in other else row.repository


def is_of_blocks(name: str) -> bool:
    """Whether a published model's pipeline is made of blocks."""
    row = row_of(name)
    return bool(row and row.published and FAMILIES[row.family].published[row.published].blocks)


def check_row(name: str, *, sizes: bool = True) -> None:
    """Raise ValueError for a name that is known and cannot be run: with the reason why no family
    serves it, or if no published model is known of it.

    Args:
        sizes: whether a repository is not enough.
    """
    row = row_of(name)
    if row is None or row.published:
        return
    if row.refused:
        raise ValueError(f"{row.kind} cannot be served: {row.refused}")
    if not row.repository:
        raise ValueError(
            f"no published model of {row.kind} is known by name here: give the folder of a saved "
            "pipeline, or the repository of one"
        )
    if sizes and name != row.repository:
        raise ValueError(
            f"the sizes of {name} are not known here: give the folder of its pipeline, or its "
            f"repository, {row.repository}, which the hub is asked for"
        )


def no_model(name: str) -> ValueError:
    """Make the error for a name that is no folder, repository or known model."""
    return ValueError(
        "model must be the folder of a saved pipeline, a repository or one of "
        f"{', '.join(PUBLISHED)}, got {shown(name)}{nearest_model(name)}"
    )


def nearest_model(name: str, *, all: bool = False) -> str:
    """Suggest the nearest name of a published model, as the end of a message.

    Args:
        all: also families and classes of which no published model is known.
    """
    found = {
        "".join(_words(one)): one
        for row, names in _named_rows()
        if row.published or all
        for one in (*names, row.published)
        if one and "/" not in one
    }
    near = get_close_matches("".join(_words(name)), found, n=1)
    return f"; did you mean {found[near[0]]!r}?" if near else ""
