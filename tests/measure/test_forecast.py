"""Work that is traced, against work that is counted; and what a forecast says of a pipeline."""

import json

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from support.tiny import allegro
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from gen_accel import Dense, Radial, demo
from gen_accel.measure.cost import rates as measured
from gen_accel.measure.cost import work as works
from gen_accel.measure.cost.figures import Range, card_named, duration, span
from gen_accel.measure.cost.forecast import forecast
from gen_accel.measure.cost.model import components_of, subject_of
from gen_accel.measure.cost.rates import KINDS, fastest, measure_rates, rates_here, rates_of_card
from gen_accel.measure.cost.work import step_work, traced
from gen_accel.measure.machine import ExternalLoad, kept

SIZE = {"height": 480, "width": 832, "num_frames": 81}
DENSE = Dense()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ExternalLoad, "busy", lambda self: None)


def test_a_trace_counts_products_attention_and_what_is_alive():
    x = torch.zeros(10, 16, device="meta")
    linear = nn.Linear(16, 32, bias=False, device="meta")

    def call():
        y = linear(x)  # 1280 bytes
        z = y * 2  # 1280 more, while y is alive
        del y
        return z + 1  # 1280 more, while z is alive

    work = traced(call)
    assert work.products == 2 * 10 * 16 * 32
    assert work.peak == 2 * 1280
    assert work.moved == 4 * 1280  # each of two operators reads and writes as much
    q = torch.zeros(1, 2, 12, 8, device="meta")
    attention = traced(lambda: scaled_dot_product_attention(q, q, q))
    assert attention.attention == 4 * 2 * 12 * 12 * 8
    assert attention.products == 0
    assert attention.peak == q.numel() * 4, "scores are never in memory"


@pytest.mark.parametrize("name", ["Wan2.1-T2V-1.3B", "HunyuanVideo", "LTX-Video", "CogVideoX-5b"])
def test_traced_flops_are_those_of_the_layers(name):
    subject = subject_of(name)
    grid = subject.grid(480, 832, subject.frames(5))
    work, flops = step_work(subject, grid, 1), subject.flops(grid)
    assert work is not None
    assert work.products + work.attention == pytest.approx(sum(flops), rel=1e-3)
    assert work.attention > 0.99 * flops.attention


def test_equal_blocks_need_no_trace_of_their_own():
    config = {"_class_name": "WanTransformer3DModel", "num_layers": 5, "ffn_dim": 64}
    config |= {"num_attention_heads": 2, "attention_head_dim": 12, "patch_size": (1, 2, 2)}
    subject = subject_of(config)
    grid = subject.grid(64, 96, 17)
    assert subject.family.inputs is not None
    given = subject.family.inputs(subject.model, grid, 512, 1)
    whole = traced(lambda: subject.model(**given, return_dict=False))
    short = step_work(subject, grid, 1)
    assert short is not None
    for part in ("products", "attention", "moved", "peak"):
        assert getattr(short, part) == pytest.approx(getattr(whole, part)), part
    assert len(subject.model.blocks) == 5, "put back"


@pytest.mark.slow
def test_a_class_whose_arguments_are_not_known_gets_a_range():
    found = forecast("mochi", Dense(), gpu="h100", height=480, width=832, num_frames=43)
    assert 0 < found.activations.low < found.activations.high


@pytest.mark.slow
def test_memory_of_a_published_model():
    """Wan 2.1 14B in bf16: 28.6 GB, of which the norms and the timestep are in float32."""
    found = forecast("Wan2.1-T2V-14B", Radial(), gpu="4090", steps=50, **SIZE)
    sizes = {part.name: part.size / 1e9 for part in found.parts}
    assert sizes["transformer"] == pytest.approx(28.6, abs=0.2)
    assert sizes["text_encoder"] == pytest.approx(2 * 5.68, rel=0.01)
    assert sizes["vae"] == pytest.approx(0.254, rel=0.01)
    peaks = [found.peaks[mode].high for mode in ("none", "model", "group", "sequential")]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] == sum(p.size for p in found.parts) + max(
        found.activations.high, found.sparse_activations.high, found.decoded or 0
    )
    assert not found.fits
    assert found.remedy == "group"
    said = found.fitting()
    assert said.startswith("does not fit into 24 GB: ")
    assert "with --offload model" in said
    assert said.endswith("which fits")
    assert forecast("Wan2.1-T2V-14B", Radial(), gpu="h200", **SIZE).fits


@pytest.mark.slow
def test_two_transformers_lie_beside_each_other():
    one, two = (
        forecast(name, Dense(), gpu="h100", **SIZE)
        for name in ("Wan2.1-T2V-14B", "Wan2.2-T2V-A14B")
    )
    assert two.peaks["none"].high - one.peaks["none"].high == one.parts[0].size
    assert two.peaks["model"] == one.peaks["model"]


@pytest.mark.slow
def test_guidance_runs_twice_or_as_a_batch_of_two():
    guided, free = (
        forecast("Wan2.1-T2V-1.3B", Dense(), gpu="h100", guidance_scale=g, **SIZE)
        for g in (None, 1.0)
    )
    assert (guided.calls, guided.batch, free.calls) == (2, 1, 1)
    assert guided.dense.low == pytest.approx(2 * free.dense.low)
    assert guided.activations == free.activations
    batched = forecast("ltx", Dense(), gpu="h100", height=480, width=704, num_frames=41)
    assert (batched.calls, batched.batch) == (1, 2)
    distilled = forecast("HunyuanVideo", Dense(), gpu="h100", **SIZE)
    assert (distilled.calls, distilled.batch) == (1, 1)


@pytest.mark.slow
def test_sparse_seconds_follow_density_and_efficiency():
    dense = forecast("Wan2.1-T2V-14B", Dense(), gpu="h100", **SIZE)
    assert dense.sparse == Range(dense.dense.low, dense.dense.high, dense.sparse.source)
    assert dense.speedup.low == dense.speedup.high == 1
    given = [
        forecast("Wan2.1-T2V-14B", Radial(), gpu="h100", efficiency=e, **SIZE) for e in (0.5, 0.9)
    ]
    assert given[0].sparse.low > given[1].sparse.low
    ranged = forecast("Wan2.1-T2V-14B", Radial(), gpu="h100", **SIZE)
    assert ranged.sparse.low == pytest.approx(given[1].sparse.low)
    assert ranged.sparse.high == pytest.approx(given[0].sparse.high)
    assert "arXiv" in ranged.sparse.source


@pytest.mark.slow
def test_a_model_is_traced_once_at_each_size(monkeypatch):
    made, remembered = [], works.remembered

    def counting(key, trace):
        def counted():
            made.append(key[0])
            return trace()

        return remembered(key, counted)

    monkeypatch.setattr(works, "remembered", counting)
    monkeypatch.setattr(works, "MOST_TRACED", 4)  # of two lengths
    monkeypatch.setattr(works, "_TRACED", {})
    small = {"height": 32, "width": 32, "gpu": "h100"}

    def decoded(frames, method=DENSE):
        return forecast(demo.path(), method, num_frames=frames, **small).decoded

    first, longer = decoded(5), decoded(9)
    assert decoded(5, Radial()) == first != longer
    assert made == ["step", "decode"] * 2
    assert decoded(13) > longer  # in the place of the first
    assert decoded(5) == first
    assert made == ["step", "decode"] * 4


@pytest.mark.parametrize("first", ["encoding", "decoding"])
def test_what_is_traced_first_decides_nothing(first, tmp_path, monkeypatch):
    """Allegro's autoencoder encodes in tiles alone."""
    monkeypatch.setattr(works, "_TRACED", {})
    allegro.CASES[0].pipeline().save_pretrained(tmp_path)
    subject = subject_of(tmp_path)
    parts, _ = components_of(tmp_path, subject, torch.bfloat16)
    [vae] = [part for part in parts if part.name == "vae"]
    order = ["encoding", "decoding"] if first == "encoding" else ["decoding", "encoding"]
    for name in order:
        trace = getattr(works, name)
        assert trace(vae, subject, subject.grid(64, 64, subject.frames(2)), torch.bfloat16)


def test_a_folder_is_read_part_by_part():
    """The parameters of the embedded model, counted from configs, are those that it loads."""
    path = demo.path()
    subject = subject_of(path)
    parts, unknown = components_of(path, subject, torch.float32)
    assert {part.name for part in parts} == {"transformer", "text_encoder", "vae"}
    assert unknown == []
    pipe = WanPipeline.from_pretrained(path, dtype=torch.float32)
    for part in parts:
        loaded = getattr(pipe, part.name)
        assert part.parameters == sum(value.numel() for value in loaded.parameters()), part.name
        assert part.size == sum(v.numel() * v.itemsize for v in loaded.parameters())


def test_weights_that_stay_in_float32_are_counted_so():
    subject = subject_of("Wan2.1-T2V-1.3B")
    [transformer], _ = components_of(subject.model.config, subject, torch.bfloat16)
    assert 2 * transformer.parameters < transformer.size < 2.1 * transformer.parameters


def test_a_transformer_alone_says_what_is_not_counted():
    tiny = WanTransformer3DModel(num_layers=1, num_attention_heads=2, ffn_dim=64)
    found = forecast(tiny, Dense(), gpu="h100", **SIZE)
    assert found.decoding is None
    assert any("text encoder" in what for what in found.unknown)
    assert any("not counted: text encoder" in line for line in found.lines())


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_are_as_wide_as_the_terminal(width):
    found = forecast("Wan2.1-T2V-14B", Radial(), gpu="4090", **SIZE)
    lines = found.lines(width)
    if width >= 80:
        assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for words in ("32760 tokens", "predicted speed-up of the denoising", "arXiv:2410.02367"):
        assert words in text
    json.dumps(found.to_dict())


def test_spans():
    assert span(Range(41.2, 65.9, "")) == "41.2-65.9 s"
    assert span(Range(1234, 5678, "")) == "1,230-5,680 s"
    assert span(Range(1.04, 1.04, ""), "x") == "1.0x"


def test_seconds_are_no_finer_than_they_mean_something():
    told = ((0.001, 0.35), (0.5, 1.2), (300.0, 420.0), (72_000.0, 144_000.0))
    assert [duration(Range(*one, "")) for one in told] == [
        "below 1 s",
        "0.5-1.2 s",
        "5.0-7.0 min",
        "20.0-40.0 h",
    ]
    step = [duration(Range(*one, ""), 0.01) for one in ((0.0018, 0.0036), (0.34, 0.5))]
    assert step == ["below 0.01 s", "0.34-0.5 s"]


def test_rates_of_a_card_are_shares_of_its_peak():
    card = card_named("h100")
    found = rates_of_card(card)
    assert found.card
    assert not found.on_cpu
    assert found.attention.high == pytest.approx(0.75 * card.flops)


def test_rates_here_are_measured_once_and_never_kept_from_a_busy_machine(monkeypatch):
    calls = []

    def measure(*args):
        calls.append(args)
        return dict.fromkeys(KINDS, 1e9)

    monkeypatch.setattr(measured, "measure_rates", measure)
    monkeypatch.setattr(measured, "_memory", lambda device: 8 << 30)  # what is free changes
    given = torch.device("cpu"), torch.float32, 64
    first = rates_here(*given)
    assert first == rates_here(*given)
    assert len(calls) == 1
    assert first.on_cpu
    assert first.products.low < 1e9 < first.products.high
    rates_here(*given, again=True)
    assert len(calls) == 2
    monkeypatch.setattr(ExternalLoad, "busy", lambda self: "the machine was busy")
    busy = rates_here(torch.device("cpu"), torch.bfloat16, 64)
    assert "busy" in busy.origin
    assert "not kept" in busy.origin
    rates_here(torch.device("cpu"), torch.bfloat16, 64)
    assert len(calls) == 4, "measured again"


def test_what_is_kept_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "gen_accel" / "some.json"
    options = {"what": "it", "valid": lambda value: value > 0}
    assert kept(file, "a", lambda: 1.0, **options) == (1.0, "")
    assert kept(file, "a", lambda: 2.0, **options) == (1.0, "")
    assert kept(file, "a", lambda: 2.0, **options, again=True) == (2.0, "")
    file.write_text('{"a": -1.0}')
    assert kept(file, "a", lambda: 3.0, **options) == (3.0, "")


@pytest.mark.slow
def test_a_measurement_gives_a_rate_of_each_kind():
    found = measure_rates(torch.device("cpu"), torch.float32, 64)
    assert found.keys() == set(KINDS)
    assert all(1e6 < rate < 1e15 for rate in found.values())


@pytest.mark.parametrize(("takes", "calls"), [(0.01, 6), (0.4, 4), (5.0, 1)])
def test_a_slow_machine_is_measured_in_fewer_rounds(takes, calls):
    time, made = [0.0], []

    def call():
        made.append(None)
        time[0] += takes

    assert fastest(call, torch.device("cpu"), lambda: time[0]) == pytest.approx(takes)
    assert len(made) == calls
