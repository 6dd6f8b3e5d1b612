"""The plan of a training, against a training; and what it says of published models."""

import json
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from support.paths import ROOT

from gen_accel.lora import TrainConfig, forecast_training, read_config
from gen_accel.lora.step_trace import StepTracer
from gen_accel.measure.cost.forecast import STEP
from gen_accel.measure.cost.model import cast, subject_of
from gen_accel.measure.cost.rates import SHEET

pytestmark = pytest.mark.usefixtures("one_thread")

RESULTS = ROOT / "benchmarks" / "results"
QUICK = ("default",)
SLOW = (
    "no checkpointing",
    "fp8",
    "nf4",
    "int8",
    "swap 3",
    "offload, nf4, swap 3",
    "parts",
    "adamw8bit",
    "SGD",
    "Adafactor",
    "Prodigy",
    "schedule-free",
    "EMA",
    "piecewise",
)
MORE = ("2 clips", "2 micro-steps", "two stages", "float32")
WAN: dict[str, Any] = {"model": "Wan2.1-T2V-1.3B", "stages": ("17:100", "33:1")}
SMALL: dict[str, Any] = {
    **{"_class_name": "WanTransformer3DModel", "ffn_dim": 64, "patch_size": (1, 2, 2)},
    **{"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "freq_dim": 16},
}


BY_DAY = ("parts",)  # of the slow ones


def _by_night(option):
    mark = pytest.mark.slow if option in BY_DAY else pytest.mark.nightly
    return pytest.param(option, marks=mark)


@pytest.fixture
def benchmark(from_benchmarks):
    return from_benchmarks("train_memory")


@pytest.fixture
def plans(from_benchmarks):
    return from_benchmarks("train_plans")


@pytest.mark.slow
@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("option", [*QUICK, *(_by_night(one) for one in (*SLOW, *MORE))])
def test_a_training_needs_what_was_planned(benchmark, option, tmp_path):
    row = benchmark.measure("tiny", option, 1248, tmp_path, 0)
    assert abs(row["error"]) < 0.1, row


@pytest.mark.slow
def test_equal_blocks_need_no_trace_of_their_own():
    train = TrainConfig(
        rank=4, gradient_checkpointing="on", dense_layers=1, mixed_precision="bf16"
    )
    parts = {}
    for layers in (3, 7):
        subject = subject_of(SMALL | {"num_layers": layers})
        cast(subject.model, torch.bfloat16)
        tracer = StepTracer(subject, train)
        assert len({site.name for site in subject.sites}) == layers
        assert len(list(subject.model.get_submodule("blocks").children())) == layers, "put back"
        trace = tracer.trace(subject.grid(64, 96, 17), 0.5)
        parts[layers] = [part.kind for part in trace.parts]
        left = trace.parts[-1].segment.after - tracer.trainable()
        assert left == 4, "the gradients, and the loss"
    for kind in ("forward", "backward"):
        assert [kinds.count(kind) for kinds in parts.values()] == [3, 7]


@pytest.mark.slow
def test_memory_of_another_length_lies_on_the_line():
    subject = subject_of(SMALL | {"num_layers": 3})
    cast(subject.model, torch.bfloat16)
    config = TrainConfig(rank=16, gradient_checkpointing="on", mixed_precision="bf16")
    tracer = StepTracer(subject, config)
    one, two, three = (tracer.trace(subject.grid(96, 160, n), 0.3) for n in (17, 33, 49))
    for part, exact in zip(one.towards(three, 0.5).parts, two.parts, strict=True):
        assert part.segment.work.peak == pytest.approx(exact.segment.work.peak, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("starts", "before"),
    [("own", 1.5), ("teacher", 9.0), ("data", 0.0)],
    ids=["own", "teacher", "data"],
)
def test_a_step_of_a_student_has_as_many_calls_as_it_takes(starts, before):
    subject = subject_of(SMALL | {"num_layers": 2})
    grid = subject.grid(64, 96, 17)
    plain = {"rank": 4, "method": "dense", "objective": "distill", "mixed_precision": "no"}
    student = {"student_steps": 4, "teacher_steps": 12, "teacher_guidance": 3.0, "starts": starts}

    def work(**fields: Any) -> float:
        trace = StepTracer(subject, TrainConfig(**plain, **fields)).trace(grid, 1.0)
        assert all(min(astuple(one)) >= 0 for one in trace.moments(offload=False))
        return trace.work.attention

    one, two = work(), work(teacher_guidance=3.0)
    call = two - one  # of the teacher, without gradients
    assert work(**student) == pytest.approx(one + (6 + before - 1) * call)


@pytest.mark.slow
def test_14b_at_161_frames_on_one_24_gb_card():
    config = TrainConfig(
        model="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        stages=("161:600",),
        gradient_checkpointing="on",
        rank=128,
    )
    plan = forecast_training(config, gpus=["4090", "h100"], here=False)
    [stage] = plan.stages
    assert stage.tokens == 63_960
    assert stage.memory.weights / 1e9 == pytest.approx(28.6, abs=0.1)
    inputs = 63_960 * 5120 * 2 * 40  # of the blocks; the last one's is counted at work
    assert stage.memory.kept == pytest.approx(inputs, rel=0.05)
    small, large = plan.verdicts
    assert not small.fits
    advice = small.advice
    assert advice is not None
    assert advice.changes[0].option == "gradient_checkpointing offload"
    assert all(change.saves > 0 for change in advice.changes)
    assert advice.changes[-1].option == "checkpoint_parts true"
    assert advice.fits
    assert large.advice is not None
    assert [one.option for one in large.advice.changes] == ["gradient_checkpointing offload"]
    assert large.advice.fits


# Configs for streams, to the card that each says it fits.
CARDS = {
    "hunyuan_video-1.5-causal": "h100",
    "ltx-2-causal": "h100",
    "ltx-video-causal": "4090",
    "skyreels-v2-1.3b-causal": "4090",
    "skyreels-v2-14b-causal": "h100",
    "wan2.1-1.3b-causal": "4090",
    "wan2.1-14b-causal": "h100",
}


def _of_day(name):
    slowest = name.startswith("hunyuan")  # takes two minutes
    return pytest.param(name, marks=[pytest.mark.nightly] if slowest else [])


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize("name", map(_of_day, CARDS))
def test_a_config_for_streams_fits_its_card(name):
    path = ROOT / "configs" / "lora" / f"{name}.yaml"
    card = {"4090": "24 GB", "h100": "80 GB"}[CARDS[name]]
    assert f"one card of {card}" in " ".join(path.read_text().replace("#", "").split())
    [verdict] = forecast_training(read_config(path), gpus=[CARDS[name]], here=False).verdicts
    assert verdict.fits


def test_every_config_for_streams_has_a_card():
    assert {path.stem for path in (ROOT / "configs" / "lora").glob("*-causal.yaml")} == {*CARDS}


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [32, 64])
def test_14b_at_161_frames_with_these_options(rank):
    config = TrainConfig(
        model="Wan2.1-T2V-14B",
        stages=("161:600",),
        gradient_checkpointing="offload",
        checkpoint_parts=True,
        base="nf4",
        blocks_to_swap=30,
        rank=rank,
    )
    plan = forecast_training(config, gpus=["4090"], here=False)
    [verdict], [stage] = plan.verdicts, plan.stages
    assert stage.size == (161, 480, 832)
    assert verdict.fits
    assert verdict.peak < 23e9
    state = 63_960 * 5120 * 2  # of the block, in bfloat16
    assert 15 * state < stage.memory.block < 25 * state  # 36 without parts


@pytest.mark.nightly
def test_what_is_advised_fits():
    """The plan says yes with the options that are advised, and no more."""
    config = TrainConfig(
        model="Wan2.1-T2V-14B", stages=("161:10",), gradient_checkpointing="on", rank=32
    )
    [before] = forecast_training(config, gpus=["4090"], here=False).verdicts
    assert before.advice is not None
    assert before.advice.fits
    given: dict[str, Any] = dict(one.option.split() for one in before.advice.changes)
    if "blocks_to_swap" in given:
        given["blocks_to_swap"] = int(given["blocks_to_swap"])
    if "checkpoint_parts" in given:
        given["checkpoint_parts"] = True
    [after] = forecast_training(config.replaced(**given), gpus=["4090"], here=False).verdicts
    assert after.fits
    assert after.peak == before.peak - sum(one.saves for one in before.advice.changes)


@pytest.mark.slow
def test_validation_and_averages_are_counted():
    plain = forecast_training(TrainConfig(**WAN), gpus=["h100"], here=False)
    assert plain.sampling is plain.decoding is None
    given = {"validate_every": 5, "validation_prompts": ("a",), "ema_decay": 0.9}
    config = TrainConfig(**WAN | given)
    shown = forecast_training(config, gpus=["h100"], here=False)
    lora = 4 * shown.trainable
    assert shown.stages[0].memory.total - plain.stages[0].memory.total == lora
    assert shown.sampling is not None
    assert shown.decoding is not None
    assert shown.sampling > shown.stages[0].memory.weights


@pytest.mark.slow
def test_lines_are_as_wide_as_the_terminal():
    config = TrainConfig(**WAN)
    told: list[str] = []
    plan = forecast_training(config, gpus=["4090"], here=False, tell=told.append)
    assert told[0].endswith("its layers, without weights")
    assert [words for words in told if words.startswith("a step at")] == [
        "a step at 17 frames of 480 x 832",
        "a step at 33 frames of 480 x 832",
    ]
    [card] = plan.verdicts
    other = replace(card, rates_from=f"{SHEET}989 TFLOPS and 3.35 TB/s (there)")
    whole = replace(plan, verdicts=(card, other))
    many = replace(whole, stages=plan.stages * 4, without_parts=("SingleBlock",))
    for width in (80, 120):
        assert max(map(len, many.lines(width))) <= width
    said = " ".join(" ".join(many.lines()).split())
    assert "checkpoint_parts: SingleBlock is computed again as a whole" in said
    assert said.count("data sheet") == 1
    assert "; 989 TFLOPS and 3.35 TB/s (there)." in said
    text = " ".join(" ".join(plan.lines()).split())
    for words in ("33 frames", "one block at work", "fits in 24 GB", "caching"):
        assert words in text
    json.dumps(plan.to_dict())


@pytest.mark.slow
def test_many_steps_of_a_small_model_take_as_long_as_to_start_their_kernels():
    plan = forecast_training(TrainConfig(stages=("17:200",)), gpus=["h100"], here=False)
    [stage], [card] = plan.stages, plan.verdicts
    assert stage.seconds[card.device].high < STEP
    assert card.hours.high * 3600 == pytest.approx(200 * STEP)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "allegro"}, "no training for AllegroTransformer3DModel"),
        ({"adapter": "image_prompt"}, "--plan knows adapter lora, got 'image_prompt'"),
        ({"stages": ("82:5",)}, "num_frames must be 1 more than a multiple of 4, got 82"),
        ({"height": 100}, "height must be a multiple of 16, got 100"),
        ({"targets": ("attn1.to_w",)}, "'attn1.to_w' is no linear layer"),
    ],
    ids=str,
)
def test_what_is_refused(fields, message):
    given: dict[str, Any] = WAN | fields
    with pytest.raises(ValueError, match=message):
        forecast_training(TrainConfig(**given), gpus=[], here=False)


def test_unknown_cards_are_refused():
    with pytest.raises(ValueError, match="gpu must be one of"):
        forecast_training(TrainConfig(**WAN), gpus=["409"], here=False)


def test_the_tables_are_made_from_the_results(benchmark, plans, from_benchmarks):
    page = (ROOT / "docs" / "memory.md").read_text()
    table_in = from_benchmarks("pages").table_in
    for made in (benchmark, plans):
        assert table_in(page, made.MARK) == made.table(json.loads(made.RESULTS.read_text()))
    found = json.loads(plans.RESULTS.read_text())
    assert table_in(page, plans.PARTS_MARK) == plans.parts_table(found)


def test_every_option_was_held_to_a_training(benchmark):
    rows = json.loads(benchmark.RESULTS.read_text())["rows"]
    assert {row["option"] for row in rows} == {*benchmark.OPTIONS}
    assert [row["option"] for row in rows if abs(row["error"]) >= 0.1] == []
