import inspect
import json
import math

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    LatteTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from support.products import NIGHTLY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import gen_accel
from gen_accel import Dense, Neighborhood, Radial, Reuse, Schedule
from gen_accel.measure.cost.estimate import Estimate, over_lengths
from gen_accel.measure.cost.model import presets, subject_of
from gen_accel.measure.cost.rates import efficiency_file, measure_efficiency
from gen_accel.measure.machine import ExternalLoad, interleaved
from gen_accel.served import PUBLISHED, RUNS, RunSize, repository_of

# The name `gen_accel.measure.cost.estimate` is a module; this is how a user calls it.
estimate = gen_accel.estimate
module = "gen_accel.measure.cost.rates"

TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
P480 = {"height": 480, "width": 832, "num_frames": 81}
CLIP = {"height": 64, "width": 96, "num_frames": 17}  # 5 x 4 x 6 tokens of TINY


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own, and no measurement that was not asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refuse(*args):
        raise AssertionError("measured")

    monkeypatch.setattr(f"{module}.measure_efficiency", refuse)
    monkeypatch.setattr(ExternalLoad, "busy", lambda self: None)


def counted(transformer, *args, **kwargs):
    """FLOPs of one call, as torch counts them; attention as its two products."""
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        transformer(*args, **kwargs)
    return counter.get_total_flops()


def latents(channels=16):
    return torch.randn(1, channels, 5, 8, 12)


TIME, PROMPT = torch.tensor([500]), torch.randn(1, 512, 32)


def test_flops_are_those_of_a_run():
    transformer = WanTransformer3DModel(**TINY)
    found = estimate(transformer, Dense(), **CLIP)
    assert found.step_flops == pytest.approx(2 * counted(transformer, latents(), TIME, PROMPT))
    assert found.attention_flops == 2 * 3 * 4 * 120**2 * 24


def test_flops_of_image_to_video_are_those_of_a_run():
    config = TINY | {"in_channels": 36, "added_kv_proj_dim": 24, "image_dim": 20}
    transformer = WanTransformer3DModel(**config, out_channels=16)
    inputs = latents(36), TIME, PROMPT, torch.randn(1, 257, 20)
    found = estimate(transformer, Dense(), **CLIP)
    assert found.step_flops == pytest.approx(2 * counted(transformer, *inputs))


def test_flops_of_vace_are_those_of_a_run():
    transformer = WanVACETransformer3DModel(**TINY, vace_layers=[0, 2], vace_in_channels=96)
    control = {"control_hidden_states": latents(96)}
    found = estimate(transformer, Dense(), **CLIP)
    run = counted(transformer, latents(), TIME, PROMPT, **control)
    assert found.step_flops == pytest.approx(2 * run)
    assert found.attention_flops == 2 * 5 * 4 * 120**2 * 24


@pytest.mark.parametrize(
    ("model", "size", "grid", "tokens"),
    [
        ("Wan2.1-T2V-1.3B", (480, 832, 81), (21, 30, 52), 32760),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (720, 1280, 81), (21, 45, 80), 75600),
        ("Wan2.2-TI2V-5B", (704, 1280, 121), (31, 22, 40), 27280),
    ],
)
def test_token_grids_of_public_models(model, size, grid, tokens):
    height, width, num_frames = size
    found = estimate(model, Dense(), height=height, width=width, num_frames=num_frames)
    assert (found.video.grid, found.tokens) == (grid, tokens)


def test_flops_of_a_public_model_by_hand():
    found = estimate("Wan2.1-T2V-1.3B", Dense(), **P480)
    N, C, T = 32760, 12 * 128, 512
    attention = 30 * 4 * N * N * C
    rest = 30 * 2 * (N * (6 * C * C + 2 * C * 8960) + 2 * T * C * C + 2 * N * T * C)
    assert found.attention_flops == 2 * attention
    assert found.step_flops == pytest.approx(2 * (attention + rest), rel=0.01)
    assert found.attention_share == pytest.approx(attention / (attention + rest), rel=0.01)
    assert 0.65 < found.attention_share < 0.75


def test_speedup_follows_the_formula():
    schedule = Schedule(dense_layers=3, dense_start=0.2)
    given = {"schedule": schedule, "steps": 10, "efficiency": 0.8}
    found = estimate("Wan2.1-T2V-1.3B", Radial(), **P480, **given)
    plan = Radial().plan(found.video)
    assert found.density == plan.density
    assert found.computed_density == plan.computed_density
    assert found.sparse_share == pytest.approx(27 / 30 * 8 / 10)
    gain = found.attention_share * found.sparse_share
    expected = 1 / (1 - gain * (1 - plan.computed_density / 0.8))
    assert found.speedup == pytest.approx(expected)
    assert found.limit == pytest.approx(1 / (1 - gain))
    executed = found.attention_flops * plan.computed_density
    assert found.sparse_attention_flops == pytest.approx(executed)


@pytest.mark.slow
def test_pays_from_is_where_the_speedup_begins():
    def at(num_frames):
        size = P480 | {"num_frames": num_frames}
        return estimate("Wan2.1-T2V-1.3B", Radial(), **size, efficiency=0.7)

    first = at(81).pays_from
    assert (first - 1) % 4 == 0
    assert at(first).pays
    assert not at(first - 4).pays
    for asked in (1, 33, 257):
        assert at(asked).pays_from == first
    assert f"pays off (1.1x or more) from {first} frames" in str(at(257))


def test_what_does_not_pay_is_said_plainly():
    short = estimate("Wan2.1-T2V-1.3B", Radial(), **P480 | {"num_frames": 5}, efficiency=0.7)
    assert not short.pays
    assert "do not bother: " in str(short)
    assert f"from {short.pays_from} frames" in str(short)

    tiny = estimate(TINY | {"ffn_dim": 10**6}, Radial(), **CLIP, efficiency=1.0)
    assert tiny.pays_from is None
    assert "no length up to 1021 frames reaches 1.1x" in str(tiny)

    slow = estimate(TINY, Radial(), **CLIP, efficiency=0.01)
    assert slow.speedup < 1
    assert slow.pays_from is None


@pytest.mark.slow
def test_what_is_kept_from_step_to_step_is_counted():
    given = {"schedule": Schedule(dense_layers=3, dense_steps=2), "steps": 10, "efficiency": 0.8}
    inner = Radial()
    plain, found, held = (
        estimate("Wan2.1-T2V-1.3B", method, **P480, **given)
        for method in (inner, Reuse(inner, every=4), Reuse(inner, residual="cpu", layers=(3, 4)))
    )
    assert plain.sparse_share == held.sparse_share == pytest.approx(27 / 30 * 8 / 10)
    assert found.sparse_share == pytest.approx(27 / 30 * 6 / 10)  # without steps 5 and 9
    bytes_of_layer = 32760 * 12 * 128 * torch.float32.itemsize * 2  # calls
    assert found.to_dict()["memory_bytes"] == 27 * bytes_of_layer
    assert held.to_dict()["host_memory_bytes"] == 2 * bytes_of_layer
    assert "on the model's device, both guidance calls: 10.9 GB a sample in torch." in str(found)
    assert "kept from step" not in str(plain)
    never = Schedule(dense_layers=3)
    first = estimate("Wan2.1-T2V-1.3B", Reuse(inner), **P480, **given | {"schedule": never})
    assert first.sparse_share == pytest.approx(27 / 30 * 9 / 10)


def test_dense_neither_gains_nor_measures():
    found = estimate("Wan2.1-T2V-1.3B", Dense(), **P480)
    assert (found.speedup, found.density, found.pays_from) == (1.0, 1.0, None)


def test_a_window_longer_than_the_shortest_clips():
    found = estimate(TINY, Neighborhood((9, 4, 4)), **CLIP | {"num_frames": 201}, efficiency=1.0)
    assert found.pays_from >= 33
    with pytest.raises(ValueError, match="window 9 is larger than the 5 frames"):
        estimate(TINY, Neighborhood((9, 4, 4)), **CLIP, efficiency=1.0)


def pipeline(transformer, **vae):
    autoencoder = AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1, **vae)
    parts = {"tokenizer": None, "text_encoder": None, "scheduler": UniPCMultistepScheduler()}
    return WanPipeline(**parts, vae=autoencoder, transformer=transformer)


def test_every_kind_of_model_gives_the_same(tmp_path):
    transformer = WanTransformer3DModel(**TINY)
    pipe = pipeline(transformer)
    pipe.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    sources = [TINY, transformer, transformer.config, pipe, tmp_path, str(tmp_path)]
    found = [estimate(source, Radial(), **CLIP, efficiency=0.7) for source in sources]
    assert len({(e.step_flops, e.video, e.speedup, e.pays_from) for e in found}) == 1


def test_the_autoencoder_sets_the_grid(tmp_path):
    transformer = WanTransformer3DModel(**TINY | {"patch_size": (1, 1, 1)})
    pipe = pipeline(transformer, scale_factor_temporal=2, scale_factor_spatial=16)
    pipe.save_pretrained(tmp_path)
    assert estimate(pipe, Dense(), **CLIP).video.grid == (9, 4, 6)
    assert estimate(tmp_path, Dense(), **CLIP).video.grid == (9, 4, 6)
    assert estimate(transformer, Dense(), **CLIP).video.grid == (5, 8, 12)


def test_sizes_that_cannot_be_made_name_the_nearest():
    size = {"height": 481, "width": 840, "num_frames": 80}
    with pytest.raises(ValueError, match="multiple of 16, got 481; nearest: 480 or 496") as error:
        estimate("Wan2.1-T2V-1.3B", Radial(), **size)
    assert "width must be a multiple of 16, got 840; nearest: 832 or 848" in str(error.value)
    assert "multiple of 4, got 80; nearest: 77 or 81" in str(error.value)
    with pytest.raises(ValueError, match="multiple of 32, got 720; nearest: 704 or 736"):
        estimate("Wan2.2-TI2V-5B", Radial(), height=720, width=1280, num_frames=81)
    with pytest.raises(ValueError, match=r"got -3; nearest: 1; .*got 0; nearest: 16"):
        estimate("Wan2.1-T2V-1.3B", Radial(), height=0, width=832, num_frames=-3)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("Wan2.1-T2V-1.3", {}, "did you mean 'Wan2.1-T2V-1.3B'"),
        (3, {}, "a folder or one of .*got int"),
        (torch.nn.Linear(1, 1), {}, "WanTransformer3DModel.*got Linear"),
        ({"_class_name": "WanPipeline"}, {}, "got WanPipeline"),
        ({"num_layers": 2}, {}, "lacks num_attention_heads, attention_head_dim, ffn_dim"),
        (TINY | {"num_layers": 0}, {}, "has no layers of self-attention, by its config"),
        (TINY | {"patch_size": (2, 2, 2)}, {}, "patch_size must be 1 in time"),
        (TINY, {"steps": 0}, "steps must be at least 1, got 0"),
        (TINY, {"efficiency": 0.0}, "efficiency must be positive, got 0.0"),
        (TINY, {"efficiency": math.nan}, "efficiency must be positive"),
        (TINY, {"method": Radial}, "must be an instance"),
    ],
)
def test_refuses(source, options, message):
    with pytest.raises(ValueError, match=message):
        estimate(source, **{"method": Radial(), **CLIP, **options})


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no transformer/config\.json"):
        estimate(tmp_path, Radial(), **CLIP)


def test_efficiency_is_measured_once_and_kept(monkeypatch, device):
    calls = []

    def measured(*args):
        calls.append(args)
        return 0.5

    monkeypatch.setattr(f"{module}.measure_efficiency", measured)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    first = estimate(TINY, Radial(), **CLIP)
    assert efficiency_file().exists()
    assert estimate(TINY, Radial(), **CLIP) == first
    assert [(d.type, *rest) for d, *rest in calls] == [(device.type, dtype, 12, False)]
    assert first.efficiency == 0.5
    assert "measured on " in first.efficiency_from

    estimate(TINY, Neighborhood((-1, 2, 2)), **CLIP)  # with a rule on pairs
    estimate(WanTransformer3DModel(**TINY).to(torch.bfloat16), Radial(), **CLIP)
    assert [(dtype, windows) for _, dtype, _, windows in calls[1:]] == [
        (dtype, True),
        (torch.bfloat16, False),
    ]
    kept = json.loads(efficiency_file().read_text())
    assert set(kept.values()) == {0.5}
    assert len(kept) == 3
    assert all(torch.__version__ in key for key in kept)
    assert [path.name for path in efficiency_file().parent.iterdir()] == ["efficiency.json"]


def test_a_busy_machine_is_said_and_its_measurement_not_kept(monkeypatch):
    busy = "the machine was busy: other processes used 1.2 of 2 cores"
    monkeypatch.setattr(ExternalLoad, "busy", lambda self: busy)
    monkeypatch.setattr(f"{module}.measure_efficiency", lambda *args: 0.25)
    found = estimate(TINY, Radial(), **CLIP)
    assert found.efficiency == 0.25
    assert busy in found.efficiency_from
    assert not efficiency_file().exists()


def test_other_lengths_are_estimated_as_by_themselves():
    options = {"efficiency": 0.7, "schedule": Schedule(dense_steps=5), "steps": 20}
    known = estimate(TINY, Radial(), **CLIP, **options)
    found = over_lengths(TINY, known)
    frames = [one.num_frames for one in found]
    assert frames == sorted({*frames})
    assert known in found
    assert frames[0] == 1
    assert frames[-1] == 2 * 17 + 3  # of ten frames of tokens
    size = {**CLIP, "num_frames": frames[-1]}
    assert found[-1] == estimate(TINY, Radial(), **size, **options)
    short = over_lengths(TINY, estimate(TINY, Neighborhood((3, 4, 4)), **CLIP, **options))
    assert short[0].num_frames > 5  # a window of 3 frames of tokens fits no shorter clip


def test_an_efficiency_is_measured_again_when_asked(monkeypatch):
    values = iter((0.25, 0.5))
    monkeypatch.setattr(f"{module}.measure_efficiency", lambda *args: next(values))
    assert estimate(TINY, Radial(), **CLIP).efficiency == 0.25
    assert estimate(TINY, Radial(), **CLIP).efficiency == 0.25
    assert estimate(TINY, Radial(), **CLIP, remeasure=True).efficiency == 0.5
    assert estimate(TINY, Radial(), **CLIP, remeasure=True, efficiency=0.7).efficiency == 0.7


def test_a_broken_cache_is_written_anew(monkeypatch):
    monkeypatch.setattr(f"{module}.measure_efficiency", lambda *args: 0.25)
    efficiency_file().parent.mkdir(parents=True)
    efficiency_file().write_text('{"half')
    assert estimate(TINY, Radial(), **CLIP).efficiency == 0.25
    assert list(json.loads(efficiency_file().read_text()).values()) == [0.25]


def test_a_cache_that_cannot_be_written_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(f"{module}.measure_efficiency", lambda *args: 0.25)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot keep the kernel efficiency"):
        assert estimate(TINY, Radial(), **CLIP).efficiency == 0.25


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.slow
def test_a_measurement_is_a_share(windows, monkeypatch):
    monkeypatch.setattr(f"{module}.interleaved", one_round)
    measured = measure_efficiency(torch.device("cpu"), torch.float32, 16, windows)
    assert math.isfinite(measured)
    assert measured > 0


def one_round(calls, *, rounds, device):
    return interleaved(calls, rounds=1, device=device)


def test_turns_are_taken():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = interleaved(calls, rounds=3, device=torch.device("cpu"))
    assert order == list("ab" * 4)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


@pytest.mark.slow
def test_to_dict_is_json_and_complete():
    found = estimate("Wan2.1-T2V-1.3B", Radial(), **P480, efficiency=0.7)
    assert isinstance(found, Estimate)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["tokens"] == 32760
    assert data["density"] + data["sparsity"] == 1
    assert data["calls_per_step"] == 2
    for words in ("32760 tokens", "both guidance calls", "density 0.4", "(given)"):
        assert words in str(found)


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize("preset", [*presets()] if NIGHTLY else [*presets()][::4])
def test_presets_are_whole(preset):
    """The config makes a model of the published size, and every preset can be estimated."""
    subject, (_, published) = subject_of(preset), presets()[preset]
    parameters = sum(p.numel() for p in subject.model.parameters())
    assert parameters / 1e9 == pytest.approx(published.billions, rel=0.01)
    size = {"height": 704, "width": 1280, "num_frames": subject.frames(12)}
    found = estimate(preset, Radial(), **size, efficiency=0.7)
    assert found.model == preset
    assert found.video.grid[0] == 12
    assert 0 < found.attention_share < 1
    assert found.to_dict()["uncounted"] == list(subject.uncounted)
    assert estimate(repository_of(preset), Dense(), **size).step_flops == found.step_flops
    frames, height, width, _ = RUNS[preset]
    assert subject.grid(height, width, frames).tokens > 1000, "its own run can be made"


OWN = (
    *("Wan2.2-TI2V-5B", "SkyReels-V2-T2V-14B", "Helios-Base", "mochi-1-preview"),
    "MiniMax-H3",  # whose pipeline is made of blocks
)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in OWN])
def test_a_published_model_is_run_as_by_its_pipeline(name):
    """As the call of its family's first pipeline has it; of `OWN`, that is another model's."""
    family, _ = presets()[name]
    said = {
        kind: getattr(row, "model", "").partition("/")[2] for kind, row in family.pipelines.items()
    }
    repository = repository_of(name).partition("/")[2]
    kind = next((kind for kind in said if said[kind] == repository), next(iter(said)))
    call = inspect.signature(getattr(diffusers, kind).__call__).parameters
    names = {"frames": "num_frames", "steps": "num_inference_steps"}
    for field in RunSize._fields:
        default = getattr(call.get(names.get(field, field)), "default", None)
        assert default in (None, getattr(RUNS[name], field)), (kind, field)


@pytest.mark.slow
def test_a_family_or_class_is_its_first_published_model():
    size = {"height": 720, "width": 1280, "num_frames": 129}
    found = estimate("hunyuan_video", Dense(), **size)
    assert found.model == "HunyuanVideo"
    assert (found.video.grid, found.video.text) == ((33, 45, 80), 256)
    assert estimate("HunyuanVideoTransformer3DModel", Dense(), **size) == found
    assert (
        estimate("mochi", Dense(), **size | {"num_frames": 127, "height": 704}).video.text == 256
    )


def test_flops_of_hunyuan_video_by_hand():
    """20 blocks of two streams and 40 of one, 24 heads of 128."""
    found = estimate("HunyuanVideo", Dense(), height=720, width=1280, num_frames=129)
    N, T, C = 33 * 45 * 80, 256, 24 * 128
    attention = 60 * 4 * (N + T) ** 2 * C
    rest = 2 * (20 * (N + T) * 12 * C * C + 40 * (N + T) * 12 * C * C)
    assert found.attention_flops == 2 * attention
    assert found.step_flops == pytest.approx(2 * (attention + rest), rel=0.01)


def test_the_text_may_be_another():
    size = {"height": 480, "width": 832, "num_frames": 81}
    usual, short = (estimate("hunyuan_video", Dense(), **size, text=n) for n in (None, 32))
    assert (usual.video.text, short.video.text) == (256, 32)
    assert short.attention_flops < usual.attention_flops


@pytest.mark.slow
def test_first_frames_and_patches_of_several_latents():
    size = {"height": 480, "width": 832}
    assert estimate("allegro", Dense(), **size, num_frames=88).video.frames == 22
    assert estimate("CogVideoX1.5-5b", Dense(), **size, num_frames=81).video.frames == 11
    with pytest.raises(ValueError, match="multiple of 4, got 89; nearest: 88 or 92"):
        estimate("allegro", Dense(), **size, num_frames=89)


def test_frames_apart_attend_by_themselves():
    transformer = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=8,
        patch_size=2,
        sample_size=16,
    )
    found = estimate(transformer, Dense(), height=128, width=96, num_frames=16)
    assert found.video.grid == (16, 8, 6)
    assert found.attention_flops == 2 * 2 * 4 * 16 * 48**2 * 16


@pytest.mark.slow
def test_what_is_left_out_is_said():
    size = {"height": 704, "width": 1280, "num_frames": 81}
    assert estimate("Wan2.1-T2V-14B", Dense(), **size).uncounted == ()
    assert "not counted: the timestep of each token" in str(
        estimate("Wan2.2-TI2V-5B", Dense(), **size)
    )


def test_a_family_without_published_sizes_asks_for_a_folder():
    with pytest.raises(ValueError, match=r"no published model of Kandinsky6Trans.* is known by"):
        estimate("kandinsky6", Dense(), **P480)


@pytest.mark.parametrize(
    ("name", "size", "tokens", "share"),
    [
        ("minimax h3", (480, 832, 124), 14_430, 0.35),
        ("MiniMax-H3", (768, 1344, 362), 107_856, 0.80),
        ("MiniMaxAI/MiniMax-H3", (1088, 1920, 362), 218_280, 0.89),
    ],
)
def test_minimax_h3_by_hand(name, size, tokens, share):
    """Of 50 layers of 56 heads of 128: 17 n + 5 frames are 5 n + 2 of 32 x 32 pixels, and
    guidance is in the weights. The modulation of a block is a product once a step."""
    height, width, frames = size
    found = estimate(name, Dense(), height=height, width=width, num_frames=frames)
    assert (found.model, found.video.tokens, found.calls) == ("MiniMax-H3", tokens, 1)
    attention = 50 * 4 * tokens**2 * 56 * 128
    weights = 5376 * 3 * 7168 + 7168 * 5376 + 5376 * 2 * 14336 + 14336 * 5376
    assert found.attention_flops == attention
    assert found.step_flops == pytest.approx(attention + 50 * 2 * tokens * weights, rel=0.01)
    assert found.attention_share == pytest.approx(share, abs=0.01)
    assert "FLOPs a step, one call" in str(found)
    with pytest.raises(ValueError, match="5 more than a multiple of 17, got 361; nearest: 345 or"):
        estimate(name, Dense(), height=height, width=width, num_frames=361)


def test_a_repository_out_of_reach_says_what_is_known(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    with pytest.raises(ValueError, match=r"me/mine is not in .* \(no network\).*; known without"):
        estimate("me/mine", Dense(), **P480)


def test_a_repository_in_the_cache_is_read(monkeypatch, tmp_path):
    transformer = WanTransformer3DModel(**TINY)
    pipeline(transformer).save_pretrained(tmp_path)

    def cached(repository, file, **kwargs):
        assert repository == "me/mine"
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", cached)
    found = estimate("me/mine", Dense(), **CLIP)
    assert found.step_flops == estimate(transformer, Dense(), **CLIP).step_flops


def test_images_are_refused():
    with pytest.raises(ValueError, match=r"models that make videos .* got FluxTransformer2DModel"):
        estimate({"_class_name": "FluxTransformer2DModel"}, Dense(), **P480)
