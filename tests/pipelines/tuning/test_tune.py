"""Tuning of a tiny pipeline, from the profile to a preset that runs again."""

import json
import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.wan import (
    FRAMES,
    GRID,
    HEADS,
    HEIGHT,
    LAYERS,
    WIDTH,
    pipeline,
    transformer,
    two_stage,
)

import gen_accel
from gen_accel import (
    Dense,
    Mixed,
    Piecewise,
    Profiled,
    Radial,
    Reuse,
    Rule,
    Schedule,
    attach,
    load_tuned,
    tune,
)
from gen_accel.attention_processors.attached.profiling import collect
from gen_accel.measure.quality import psnr
from gen_accel.pipelines import OtherThanTuned
from gen_accel.pipelines.tuning import measuring, stages
from gen_accel.pipelines.tuning.measuring import (
    Perturbation,
    PipelineCall,
    answer,
    decoded,
    generate,
    keeping,
    observe,
    relative_error,
    repeating,
    weight_of_step,
)
from gen_accel.pipelines.tuning.preset import read_preset
from gen_accel.pipelines.tuning.solving import SolveOptions, at_error, curve
from gen_accel.pipelines.tuning.stages import default_candidates
from gen_accel.pipelines.tuning.tuned import cells, hand_settings

pytestmark = [pytest.mark.usefixtures("one_thread")]
SIZES: dict[str, Any] = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": FRAMES,
    "max_sequence_length": 8,
}
CALL = PipelineCall(4, 0, SIZES)
FEW = (
    Piecewise(0.2, block_q=16, block_k=16),
    Piecewise(0.6, block_q=16, block_k=16),
    Radial(decay_factor=0.2),
)
PROMPTS = ["a cat", "a dog", "a cow"]


def tuned(pipe: Any = None, out: Any = None, **options: Any) -> Any:
    given: dict[str, Any] = {
        "held_out": PROMPTS[2:],
        "quality": 60.0,
        "candidates": FEW,
        "weighed_steps": 3,
    }
    given |= {"num_inference_steps": 4, "out": out, "kernel": "gather"}
    given["cost"] = "density"  # so few tokens are fastest densely
    return tune(pipe or pipeline(), PROMPTS[:2], **(given | SIZES | options))


TICKS = []  # of `found`


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Tuned once; the file of the preset, and the result."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("tuned") / "preset.json"
    return path, tuned(out=path, tick=lambda *tick: TICKS.append(tick))


@pytest.mark.slow
def test_each_stage_ticks_up_to_its_one_total(found):
    stages = [*dict.fromkeys(stage for stage, _, _ in TICKS)]
    assert stages == ["scout", "profile", "seconds", "weights", "solve", "verify", "hold out"]
    for stage in stages:
        done, totals = zip(*(tick[1:] for tick in TICKS if tick[0] == stage), strict=True)
        assert len({*totals}) == 1
        assert [*done] == sorted(done)
        assert done[-1] == totals[-1]


def test_the_bound_is_kept_on_the_tuning_prompts(found):
    _, result = found
    scores = [run["score"] for run in result.measured["tuning"]]
    assert result.verified
    assert sum(scores) / len(scores) >= 60
    assert len(result.measured["held_out"]) == 1
    assert 0 < result.preset.density < 1
    assert "held-out prompts: mean" in str(result)


@pytest.mark.slow
def test_a_measured_score_is_that_of_the_video(found):
    _, result = found
    pipe = pipeline()
    dense = generate(pipe, PROMPTS[1], 1, CALL)
    with result.attach(pipe, kernel="gather"):
        sparse = generate(pipe, PROMPTS[1], 1, CALL)
    score = psnr(decoded(pipe, sparse), decoded(pipe, dense))
    run = result.measured["tuning"][1]
    assert run["score"] == pytest.approx(min(score, 200.0))
    assert run["latent_error"] == pytest.approx(relative_error(sparse, dense))


def test_a_preset_through_its_file_gives_the_same_video_bit_for_bit(found):
    path, result = found
    pipe = pipeline()
    videos = []
    for attached in (
        lambda: result.attach(pipe, kernel="gather"),
        lambda: attach(pipe, preset=path, kernel="gather"),
        lambda: attach(pipe, preset=read_preset(path), kernel="gather"),
    ):
        with attached(), warnings.catch_warnings():
            warnings.simplefilter("error")
            videos.append(generate(pipe, "a hen", 7, CALL))
    assert torch.equal(videos[0], videos[1])
    assert torch.equal(videos[0], videos[2])
    assert not list(path.parent.glob("*tuning*"))


def test_it_is_solved_anew_from_the_file_without_a_model(found):
    path, result = found
    again = load_tuned(path)
    assert again.method == result.method
    looser = again.at(quality=result.measured["runs"][0]["mean"] - 10)
    assert looser.preset.density <= again.preset.density
    assert not looser.verified
    assert {*looser.measured} == {"runs"}
    longer = again.solve(7)
    assert longer.method.steps == 7
    assert len(longer.preset.made_for.sigmas) == 8
    saved = longer.save(path.with_name("longer.json"))
    pipe = pipeline()
    with attach(pipe, preset=path.with_name("longer.json"), kernel="gather"):
        assert generate(pipe, "a hen", 7, PipelineCall(7, 0, SIZES)).isfinite().all()
    assert saved.preset.profile is not None


def test_the_frontier_falls_with_the_cost(found):
    _, result = found
    costs = [point.density for point in result.points]
    errors = [point.predicted for point in result.points]
    assert costs == sorted(costs)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5
    assert result.points[-1].density == pytest.approx(1)


def test_observing_leaves_the_dense_video_as_it_is():
    pipe = pipeline()
    plain = generate(pipe, "a cat", 0, CALL)
    seen, heard = observe(pipe, "a cat", 0, CALL, (*FEW, Dense()), kernel="gather")
    assert torch.equal(seen.latents, plain)
    assert torch.equal(generate(pipe, "a cat", 0, CALL), plain)
    assert seen.errors.shape == (4, LAYERS, HEADS, 4)
    assert (seen.errors[..., :3] > 0).all()
    assert seen.errors[..., 3].max() < 1e-12
    assert seen.sigmas.shape == (5,)
    assert len(heard) == LAYERS


def test_the_errors_are_those_of_the_attention():
    """Checked on one layer and step against attention computed beside."""
    pipe, kept = pipeline(), {}

    def look(call):
        layer, q, k, v, dense, video, run = call
        if (handle.clock.step, layer.number) == (2, 1) and not kept:
            out = FEW[0](q[-1:], k[-1:], v[-1:], video=video, kernel=run)
            kept["error"] = (out - dense[-1:]).square().mean((0, 2, 3))

    with attach(pipe, Radial(), kernel="gather") as handle:
        handle.observe = look
        generate(pipe, "a cat", 0, CALL)
    seen, _ = observe(pipe, "a cat", 0, CALL, FEW, kernel="gather")
    torch.testing.assert_close(seen.errors[2, 1, :, 0], kept["error"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", [*FEW, Piecewise(0.3, block_q=16, block_k=16, rest=None)])
def test_some_rows_are_the_rows_of_the_whole(method):
    g = torch.Generator().manual_seed(0)
    video = gen_accel.VideoShape(*GRID)
    q, k, v = (torch.randn(1, 2, video.tokens, 16, generator=g) for _ in range(3))
    rows = torch.tensor([0, 3, 50, 104])
    whole, kept = answer(method, q, k, v, video, None, 0.25, "gather")
    some, kept_too = answer(method, q, k, v, video, rows, 0.25, "gather")
    torch.testing.assert_close(some, whole[:, rows], rtol=1e-4, atol=1e-5)
    assert kept == kept_too


def test_a_repeated_generation_is_the_same_and_skips_its_beginning():
    pipe, ran = pipeline(), []
    with attach(pipe, Mixed((Rule(FEW[0], steps=(3, 4)),), 4), kernel="gather") as handle:
        with keeping(pipe, lambda: handle.clock.step) as passes:
            whole = generate(pipe, "a cat", 0, CALL)
        own = pipe.transformer.blocks[0].register_forward_hook(lambda *a: ran.append(1))
        with repeating(pipe, passes, 3):
            again = generate(pipe, "a cat", 0, CALL)
        own.remove()
    assert torch.equal(whole, again)
    assert len(ran) == len(passes) // 4
    assert "forward" not in pipe.transformer.__dict__


def test_a_disturbance_grows_with_its_size():
    pipe = pipeline()
    seen, _ = observe(pipe, "a cat", 0, CALL, FEW, kernel="gather")
    relative = seen.errors[1, ..., 0].sum(-1) / seen.squares[1].sum(-1)
    weight = weight_of_step(
        pipe, "a cat", 0, CALL, seen, step=1, method=FEW[0], relative=relative, kernel="gather"
    )
    errors = []
    for share in (0.05, 0.25):
        rule = Rule(Perturbation(FEW[0], share), steps=(1, 2))
        with attach(pipe, Mixed((rule,), 4), kernel="gather", padding_once=False):
            errors.append(relative_error(generate(pipe, "a cat", 0, CALL), seen.latents))
    assert errors[1] / errors[0] == pytest.approx(5, rel=0.1)
    assert weight == pytest.approx(errors[1] / (0.25 * math.sqrt(relative.sum())), rel=1e-4)


@pytest.mark.slow
def test_a_killed_tuning_goes_on_without_repeating_a_finished_stage(tmp_path, monkeypatch):
    path = tmp_path / "preset.json"
    dense_runs = []
    plain = measuring.generate

    def dying(pipe, prompt, number, call):
        dense_runs.append(number)
        if len(dense_runs) == 8:
            raise KeyboardInterrupt
        return plain(pipe, prompt, number, call)

    monkeypatch.setattr(measuring, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        tuned(out=path)
    assert not path.exists()
    assert path.with_name("preset.tuning.safetensors").exists()
    monkeypatch.setattr(
        stages, "seconds_of", lambda *a: pytest.fail("seconds were taken a second time")
    )
    before = len(dense_runs)
    resumed = tuned(out=path)
    # The second prompt again, for what its transformer returned, and the weights that were left.
    assert dense_runs[before:] == [1, 1, 1, 1]
    monkeypatch.undo()
    whole = tuned()
    assert torch.equal(resumed.profile.errors, whole.profile.errors)
    assert torch.equal(resumed.profile.weights, whole.profile.weights)
    assert not path.with_name("preset.tuning.safetensors").exists()


@pytest.mark.slow
def test_a_tuning_of_other_prompts_is_not_mixed_in(tmp_path, monkeypatch):
    path = tmp_path / "preset.json"
    monkeypatch.setattr(stages, "weight_of_step", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tuned(out=path)
    with pytest.raises(
        ValueError, match=r"another tuning, which differs in kernel, prompts, seed"
    ):
        tune(
            pipeline(),
            ["a fish"],
            held_out=PROMPTS[2:],
            candidates=FEW,
            weighed_steps=3,
            num_inference_steps=4,
            seed=5,
            out=path,
            **SIZES,
        )


@pytest.mark.slow
def test_a_bound_that_only_dense_keeps_says_what_was_reached():
    with pytest.raises(ValueError, match=r"only dense attention keeps.*reached is a mean of"):
        tuned(quality=1000.0)


@pytest.mark.nightly
def test_a_function_of_ones_own_is_an_objective():
    def likeness(dense, sparse):
        assert dense.shape == sparse.shape == (FRAMES, HEIGHT, WIDTH, 3)
        return -float(np.abs(dense.astype(int) - sparse.astype(int)).mean())

    result = tuned(objective=likeness, quality=-2.0, held_out=[])
    assert result.preset.bound == {"mean": -2.0, "objective": "likeness"}
    assert result.verified


@pytest.mark.slow
def test_errors_of_latents_are_bounded_from_above():
    result = tuned(objective="latent_error", quality=0.05, held_out=[])
    runs = result.measured["tuning"]
    assert sum(run["latent_error"] for run in runs) / 2 <= 0.05
    assert result.at(quality=0.02).preset.density >= result.preset.density


@pytest.mark.turns(3)
@pytest.mark.parametrize("by", [("steps",), ("layers",), ("steps", "layers"), ("heads",)])
def test_settings_differ_along_the_axes_that_were_asked_for(found, by):
    for point in curve(found[1].profile, SolveOptions(by=by)):
        for axis, name in enumerate(("steps", "layers", "heads")):
            if name not in by:
                assert (point.settings == point.settings.select(axis, 0).unsqueeze(axis)).all()


@pytest.mark.slow
def test_the_default_candidates_are_all_families_that_fit():
    kinds = [type(one).__name__ for one in default_candidates(gen_accel.VideoShape(9, 12, 12))]
    families = {"Piecewise", "Radial", "Neighborhood", "BlockMixture", "SparseLinear"}
    assert {*kinds[:-1]} == families
    assert kinds[-1] == "Dense"
    small = default_candidates(gen_accel.VideoShape(9, 2, 2))
    assert len({*small}) == len(small)
    result = tuned(candidates=None, held_out=[], quality=30.0)
    assert len({type(one) for one in result.candidates}) > 2
    assert any(isinstance(one, Profiled) for one in result.candidates)
    with pytest.raises(ValueError, match="families must be of"):
        default_candidates(gen_accel.VideoShape(9, 12, 12), families=("radials",))


@pytest.mark.slow
def test_profiles_lie_beside_a_preset_and_move_with_it(tmp_path):
    masses = collect(pipeline(), PROMPTS[:1], block=8, steps=4, call=SIZES)
    given = tuple(Profiled(share, sha256=masses.digest) for share in (0.3, 0.6))
    result = tuned(candidates=given, out=tmp_path / "a" / "preset.json")
    assert any(isinstance(rule.method, Profiled) for rule in result.method.rules)
    beside = tmp_path / "a" / f"preset.{masses.digest[:8]}.safetensors"
    assert beside.is_file()
    assert str(tmp_path) not in (tmp_path / "a" / "preset.json").read_text()
    moved = (tmp_path / "a").rename(tmp_path / "b") / "preset.json"
    assert load_tuned(moved).candidates == (*given, Dense())
    assert load_tuned(moved).method == result.method
    pipe, videos = pipeline(), []
    for attached in (
        lambda: result.attach(pipe, kernel="gather"),
        lambda: attach(pipe, preset=moved, kernel="gather"),
    ):
        with attached():
            videos.append(generate(pipe, "a hen", 7, CALL))
    assert torch.equal(*videos)
    text = moved.read_text().replace(beside.name, f"../{beside.name}")
    moved.write_text(text)
    with pytest.raises(ValueError, match="must lie beside it, got"):
        read_preset(moved)


@pytest.mark.nightly
def test_what_was_measured_for_profiles_is_kept_until_the_end(tmp_path, monkeypatch):
    """A run that is killed and goes on measures it once, and leaves no file of its own."""
    made = []

    def counted(*args, **kwargs):
        made.append(collect(*args, **kwargs))
        return made[-1]

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "collect", counted)
    options: dict[str, Any] = {"candidates": None, "out": tmp_path / "preset.json"}
    options |= {"held_out": [], "quality": 30.0}
    with monkeypatch.context() as patch:
        patch.setattr(stages, "weight_of_step", killed)
        with pytest.raises(KeyboardInterrupt):
            tuned(**options)
    result = tuned(**options)
    assert len(made) == 1
    assert made[0].digest in {getattr(one, "sha256", "") for one in result.candidates}
    assert not list(tmp_path.glob("*tuning*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"held_out": "a cat"}, "prompts must be a list"),
        ({"quality": math.nan}, "quality must be finite"),
        ({"objective": "ssim"}, "objective must be one of psnr, latent_error"),
        ({"cost": "watts"}, "cost must be one of"),
        ({"scale": "median"}, "scale must be one of"),
        ({"by": ("frames",)}, "by must be"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"out": "preset.yaml"}, r"must end in \.json"),
        ({"candidates": (Dense(),)}, "must hold a sparse method"),
        ({"candidates": (FEW[0], FEW[0])}, "must differ"),
        ({"candidates": (Reuse(FEW[0]),)}, "cannot be a candidate"),
        ({"candidates": (Radial(decay_factor=1e6),)}, "leaves nothing out"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_any_work(options, words):
    pipe = pipeline()
    with pytest.raises(ValueError, match=words):
        tuned(pipe, **options)
    assert not hasattr(pipe.transformer.blocks[0].attn1.processor, "owner")


def test_a_pipeline_that_is_in_use_is_refused():
    pipe = pipeline()
    with (
        attach(pipe, Radial()),
        pytest.raises(ValueError, match="attached to transformer"),
    ):
        tuned(pipe)


def test_a_preset_of_another_model_is_refused(found):
    path, _ = found
    pipe = pipeline()
    pipe.transformer = transformer(num_layers=LAYERS + 1)
    with pytest.raises(ValueError, match=r"tuned on another model: num_layers.*gen-accel tune"):
        attach(pipe, preset=path)


def test_another_number_of_steps_is_refused_with_what_solves_it_anew(found):
    pipe = pipeline()
    with (
        attach(pipe, preset=found[0], kernel="gather"),
        pytest.raises(ValueError, match=r"gen-accel tune --preset FILE --steps 5"),
    ):
        generate(pipe, "a cat", 0, PipelineCall(5, 0, SIZES))


def test_another_grid_warns_once(found):
    pipe = pipeline()
    other = PipelineCall(4, 0, SIZES | {"num_frames": FRAMES + 4})
    with attach(pipe, preset=found[0], kernel="gather"):
        with pytest.warns(OtherThanTuned, match=r"grid \(3, 5, 7\), and runs with \(4, 5, 7\)"):
            generate(pipe, "a cat", 0, other)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(pipe, "a cat", 0, other)


@pytest.mark.turns(3)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gen_accel": "lora"}, "is no preset"),
        ({"version": 2}, "version 2, not 1"),
        ({"steps": "four"}, "steps"),
        ({"steps": 10**12}, "a noise level for each of its 1000000000000 steps"),
        ({"rules": []}, "one Rule or more"),
        ({"rules": [{"method": "piecewize", "options": {}}]}, "piecewize"),
        ({"rules": [{"method": "radial", "options": {"depth": 1}}]}, "depth"),
        ({"rules": [{"method": "radial", "options": {}, "layers": [0, 0]}]}, "layers"),
        ({"made_for": {}}, "transformer"),
        ({"profile": {"file": "../other.safetensors", "sha256": ""}}, "must lie beside"),
        ({"cost": "cheap"}, "cost"),
        ({"cost": 10**400}, "cost of .* must be float"),
        ({"curve": [{"cost": "x"}]}, "curve of .* must be any number of names with values"),
        ({"bound": None}, "bound of .* must be names with values"),
        ({"rules": []}, "the rules of .* cannot be read"),
    ],
)
def test_a_file_that_is_no_preset_is_refused(found, tmp_path, change, words):
    path = tmp_path / "changed.json"
    data = json.loads(found[0].read_text()) | change
    for rule in data["rules"]:
        rule |= {name: rule.get(name) for name in ("layers", "heads", "steps")}
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=words):
        read_preset(path)


@pytest.mark.parametrize(
    ("method", "option"), [("sparse_linear", "order"), ("profiled", "least"), ("profiled", "most")]
)
def test_a_method_with_options_that_went_is_tuned_again(found, tmp_path, method, option):
    path = tmp_path / "older.json"
    data = json.loads(found[0].read_text())
    data["rules"][0] |= {"method": method, "options": {option: 1}}
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"no field '{option}'.*tune again"):
        read_preset(path)


def test_a_changed_profile_is_refused(found, tmp_path):
    path, _ = found
    other = tmp_path / path.name
    other.write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match="profile is missing"):
        load_tuned(other)
    beside = other.with_suffix(".safetensors")
    beside.write_bytes(path.with_suffix(".safetensors").read_bytes() + b" ")
    with pytest.raises(ValueError, match="not the profile"):
        load_tuned(other)


def test_a_method_and_a_preset_are_one_too_many(found):
    with pytest.raises(ValueError, match="a method or preset"):
        attach(pipeline(), Radial(), preset=found[0])


def test_a_schedule_wins_over_a_preset(found):
    pipe = pipeline()
    dense = generate(pipe, "a cat", 0, CALL)
    with attach(pipe, preset=found[0], schedule=Schedule(dense_steps=4), kernel="gather"):
        assert torch.equal(generate(pipe, "a cat", 0, CALL), dense)


def test_the_watch_reports_the_errors_of_a_preset(found):
    pipe = pipeline()
    with attach(pipe, preset=found[0], kernel="gather", watch=True) as handle:
        generate(pipe, PROMPTS[0], 0, CALL)
        watching = handle.summary().watching
    assert watching.calls
    assert 0 < watching.mean < 1


@pytest.mark.slow
def test_its_picture(found, tmp_path):
    _, result = found
    image, names = cells(result)
    assert image.shape == (LAYERS * HEADS, 4, 3)
    assert names
    assert result.plot(tmp_path / "tuned.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"must end in \.png"):
        result.plot(tmp_path / "tuned.jpg")


def test_hand_settings_are_never_better_than_the_frontier(found):
    _, result = found
    for hand in hand_settings(result):
        as_cheap = [p.predicted for p in result.points if p.density <= hand.density + 1e-9]
        nearest = min(as_cheap, default=float("inf"))
        # The error is summed up in another order, which rounds otherwise.
        exact = at_error(result.profile, hand.predicted * (1 + 1e-6), result.options)
        assert exact.density <= hand.density + 1e-9
        assert nearest > 0


@pytest.mark.slow
def test_two_transformers_are_tuned_as_one():
    """Tune as for Wan 2.2: each step belongs to one of them, so that rules by step serve both."""
    pipe = two_stage()
    result = tuned(pipe, held_out=[])
    assert result.verified
    with result.attach(pipe, kernel="gather") as handle:
        generate(pipe, "a hen", 7, CALL)
        parts = {name.partition(".")[0] for name, _ in handle.records}
    assert parts == {"transformer", "transformer_2"}


@pytest.mark.slow
def test_what_was_chosen_again_is_verified(found):
    _, result = found
    pipe = pipeline()
    again = result.at(quality=55)
    assert not again.verified
    ticks = []
    checked = again.verify(pipe, held_out=PROMPTS[2:], tick=lambda *tick: ticks.append(tick))
    scores = [run["score"] for run in checked.measured["tuning"]]
    assert checked.verified == (sum(scores) / len(scores) >= 55)
    assert [run["seed"] for run in checked.measured["tuning"]] == [0, 1]
    assert [run["prompt"] for run in checked.measured["held_out"]] == PROMPTS[2:]
    assert ticks == [(i, 3) for i in range(4)]
    assert "held-out prompts: mean" in str(checked)
    # What was measured in tuning is measured again.
    same = [run["score"] for run in result.verify(pipe).measured["tuning"]]
    assert same == pytest.approx([run["score"] for run in result.measured["tuning"]], abs=0.1)


def test_on_another_machine_the_same_errors_are_chosen_from_by_its_seconds(found, monkeypatch):
    _, result = found
    pipe = pipeline()
    there = result.priced(pipe)
    assert not there.verified
    assert there.profile.errors is result.profile.errors
    assert there.profile.seconds.shape == result.profile.seconds.shape
    assert there.profile.seconds.min() > 0
    assert there.profile.seconds[-1] == 1
    assert there.point.predicted <= result.point.predicted * (1 + 1e-9)
    assert there.preset.made_by["threads"] == torch.get_num_threads()
    generate(pipe, PROMPTS[0], 0, CALL)  # nothing stays attached

    heard = []

    def one_is_free(calls, candidates, kernel):
        heard.append(calls)
        shares = torch.full((len(candidates),), 2.0)
        shares[1], shares[-1] = 1e-3, 1.0
        return shares, 0.5

    monkeypatch.setattr("gen_accel.pipelines.tuning.measuring.seconds_of", one_is_free)
    there = replace(result, options=SolveOptions(cost="seconds")).priced(pipe)
    assert {*there.point.settings.flatten().tolist()} <= {1, len(result.candidates) - 1}
    assert there.profile.dense_seconds == 0.5
    [calls] = heard
    assert {call.video.grid for call in calls.values()} == {result.preset.made_for.grid}
    assert sorted(calls) == result.profile.layers.tolist()


def test_what_cannot_be_timed_anew_is_refused(found):
    _, result = found
    pipe = pipeline()
    with (
        gen_accel.attach(pipe, Radial()),
        pytest.raises(ValueError, match="attached to transformer already"),
    ):
        result.priced(pipe)
    bare = replace(result, preset=replace(result.preset, made_by={}))
    with pytest.raises(ValueError, match="does not name its tuning prompts"):
        bare.priced(pipe)
    made_for = replace(result.preset.made_for, grid=(1, 2, 3))
    other = replace(result, preset=replace(result.preset, made_for=made_for))
    with pytest.raises(ValueError, match=r"tuned on \(1, 2, 3\) tokens, and the model makes"):
        other.priced(pipe)


@pytest.mark.slow
def test_what_cannot_be_verified_is_refused(found):
    _, result = found
    own = replace(result, preset=replace(result.preset, bound={"mean": 1.0, "objective": "mine"}))
    with pytest.raises(ValueError, match="the bound is on 'mine': give objective="):
        own.verify(pipeline())
    scored = own.verify(pipeline(), objective=lambda dense, sparse: 1.0)
    assert scored.verified
    bare = replace(result, preset=replace(result.preset, made_by={}))
    with pytest.raises(ValueError, match="does not name its tuning prompts"):
        bare.verify(pipeline())
