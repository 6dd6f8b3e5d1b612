"""What each pipeline class makes a video from, held to the classes of the installed diffusers."""

import inspect
import re

import diffusers
import pytest
from support.paths import ROOT

from gen_accel.attention_processors.families import REFUSED, served_classes, video_classes
from gen_accel.attention_processors.families.base import PipelineInputs
from gen_accel.attention_processors.families.pipelines import (
    choose,
    pipelines,
    table,
)
from gen_accel.pipelines.generation.inputs import BY
from gen_accel.pipelines.generation.model_index import pipeline_class
from gen_accel.registry import FIRST, LAST, TEXT, VIDEO

# Arguments of a signature that hold pictures or video.
INPUTS = ("image", "last_image", "video", "conditions", "strength")
# Those that stay unused, and why.
LEFT = {
    ("LTXConditionPipeline", "image"): "conditions hold it",
    ("LTXConditionPipeline", "video"): "conditions hold it",
    ("LTXConditionPipeline", "strength"): "of a condition, not of what is remade",
    ("LTX2DFRPipeline", "conditions"): "for another stage than the first",
    ("LTX2InContextPipeline", "conditions"): "beside the reference that its LoRAs are for",
    ("PIAPipeline", "strength"): "of a picture",
}


def serving():
    """Pipeline classes to the classes of transformers that they take."""
    served, videos = served_classes(), {*video_classes()}
    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name)
        if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
            continue
        parts = inspect.signature(kind.__init__).parameters
        texts = " ".join(str(part.annotation) for part in parts.values())
        found = {one for one in served if re.search(rf"\b{one}\b", texts)}
        if kind is not diffusers.DiffusionPipeline and found & videos:
            yield name, kind
    for name in pipelines():  # of blocks
        if issubclass(getattr(diffusers, name, int), diffusers.ModularPipeline):
            yield name, pipeline_class(name)


SERVING = dict(serving())


def test_every_pipeline_of_a_served_model_of_video_is_in_the_table():
    assert {*SERVING} <= {*pipelines()}


def test_the_table_has_no_other_pipelines():
    """A class that this diffusers does not have yet may stand in it."""
    unknown = {name for name in pipelines() if hasattr(diffusers, name)} - {*SERVING}
    assert not unknown
    assert not {*pipelines()} & {*REFUSED}


@pytest.mark.parametrize("name", SERVING)
def test_a_row_agrees_with_the_signature(name):
    row = pipelines()[name]
    known = inspect.signature(SERVING[name].__call__).parameters
    if isinstance(row, str):
        assert row
        assert not row.endswith(".")
        return
    assert row.by in BY
    if row.by == "plain":
        used = {row.image, row.last_image, row.video, row.strength} - {""}
        assert used <= {*known}
        needed = {
            argument
            for argument, parameter in known.items()
            if parameter.default is parameter.empty
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            and argument not in ("self", "prompt")
        }
        assert needed <= used, "nothing gives them"
        assert not (needed and row.text), "text alone is not enough"
    assert bool(row.video) == bool(row.role)
    held = {row.image, row.last_image, row.video, row.strength}
    left = {argument for argument in INPUTS if argument in known} - held
    assert left == {argument for pipeline, argument in LEFT if pipeline == name}


def test_what_stays_unused_is_there():
    for name, argument in LEFT:
        assert argument in inspect.signature(SERVING[name].__call__).parameters


EXPECTED = {
    "WanPipeline": (TEXT, FIRST, LAST, VIDEO),  # of one class or another
    "WanVACEPipeline": (TEXT, FIRST, LAST, VIDEO),
    "SkyReelsV2Pipeline": (TEXT,),
    "SkyReelsV2ImageToVideoPipeline": (FIRST, LAST),
    "SkyReelsV2DiffusionForcingPipeline": (TEXT, FIRST, LAST, VIDEO),
    "HunyuanVideoPipeline": (TEXT,),
    "HunyuanVideoImageToVideoPipeline": (FIRST,),
    "HunyuanVideoFramepackPipeline": (FIRST, LAST),
    "CogVideoXPipeline": (TEXT, FIRST, VIDEO),
    "LTXPipeline": (TEXT, FIRST, LAST, VIDEO),
    "LTX2Pipeline": (TEXT, FIRST, LAST, VIDEO),
    "Cosmos2VideoToWorldPipeline": (FIRST, VIDEO),
    "AnimateDiffPipeline": (TEXT, VIDEO),
    "AllegroPipeline": (TEXT,),
    "MiniMaxH3ModularPipeline": (TEXT, FIRST, LAST, VIDEO),
    "WanAnimatePipeline": (),
    "NoSuchPipeline": (),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_kinds_of_a_class(name):
    rows = {one: row for one, row in pipelines().items() if isinstance(row, PipelineInputs)}
    weights = {rows[name].weights} if name in rows else set()
    held = {kind for row in rows.values() if row.weights in weights for kind in row.kinds}
    assert held == {*EXPECTED[name]}


TEXT_TO_VIDEO = {"in_channels": 16, "out_channels": 16}
IMAGE_TO_VIDEO = {"in_channels": 36, "out_channels": 16}
WITH_ENCODER = IMAGE_TO_VIDEO | {"image_dim": 1280}
OF_TWO = WITH_ENCODER | {"pos_embed_seq_len": 514}


@pytest.mark.parametrize(
    ("own", "config", "asked", "chosen"),
    [
        ("WanPipeline", TEXT_TO_VIDEO, (), "WanPipeline"),
        ("WanPipeline", TEXT_TO_VIDEO, (VIDEO,), "WanVideoToVideoPipeline"),
        ("WanVideoToVideoPipeline", TEXT_TO_VIDEO, (), "WanPipeline"),
        ("WanPipeline", IMAGE_TO_VIDEO, (FIRST,), "WanImageToVideoPipeline"),
        ("WanImageToVideoPipeline", IMAGE_TO_VIDEO, (FIRST, LAST), "WanImageToVideoPipeline"),
        ("WanImageToVideoPipeline", OF_TWO, (FIRST, LAST), "WanImageToVideoPipeline"),
        ("LTXPipeline", {}, (FIRST,), "LTXImageToVideoPipeline"),
        ("LTXImageToVideoPipeline", {}, (), "LTXPipeline"),
        ("LTXImageToVideoPipeline", {}, (FIRST, LAST), "LTXConditionPipeline"),
        ("NoSuchPipeline", {}, (), "NoSuchPipeline"),
    ],
)
def test_the_class_is_chosen_by_weights_and_what_is_given(own, config, asked, chosen):
    assert choose({"_class_name": own}, config, asked, "models/x") == chosen


@pytest.mark.parametrize(
    ("own", "config", "asked", "words"),
    [
        ("WanPipeline", TEXT_TO_VIDEO, (FIRST,), "use Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
        ("WanPipeline", TEXT_TO_VIDEO, (FIRST, LAST), "use Wan-AI/Wan2.1-FLF2V-14B-720P"),
        ("WanPipeline", IMAGE_TO_VIDEO, (), "from a first frame"),
        ("WanImageToVideoPipeline", WITH_ENCODER, (FIRST, LAST), "leave --last-image out, or use"),
        ("WanImageToVideoPipeline", OF_TWO, (FIRST,), "give --last-image LAST.png"),
        ("CogVideoXPipeline", TEXT_TO_VIDEO, (FIRST,), "use zai-org/CogVideoX-5b-I2V"),
        ("LTXPipeline", {}, (FIRST, VIDEO), "leave --video out"),
        ("WanAnimatePipeline", {}, (FIRST,), "call it in Python"),
        ("NoSuchPipeline", {}, (FIRST,), "is not known to take a first frame"),
    ],
)
def test_a_refusal_names_what_would_do(own, config, asked, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        choose({"_class_name": own}, config, asked, "models/x")
    assert "models/x" in str(error.value)


def test_a_row_says_which_frames_go_alone():
    assert not PipelineInputs("x", image="image", last_image="last").lacks((FIRST, LAST))
    assert PipelineInputs("x", image="image", last_image="last").lacks((LAST,))
    assert not PipelineInputs("x", last_image="last", alone=True).lacks((LAST,))
    assert PipelineInputs("x", image="image", video="video").lacks((FIRST, VIDEO))
    assert not PipelineInputs("x", image="image", video="video", together=True).lacks(
        (FIRST, VIDEO)
    )


def test_the_page_has_the_table():
    page = ROOT / "docs" / "generate.md"
    assert table() in page.read_text(encoding="utf-8")
