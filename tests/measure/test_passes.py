"""The forward passes that an estimate counts are those that pipelines make, chunk after chunk."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import HeliosPyramidPipeline, HeliosScheduler
from support import wan
from support.tiny import anyflow_far, framepack, helios, skyreels
from torch.nn.attention.flex_attention import create_mask

from gen_accel import Dense, Neighborhood, Radial, estimate
from gen_accel.attention_processors.families import family_of
from gen_accel.measure.cost.estimate import densities_of
from gen_accel.measure.cost.forecast import forecast
from gen_accel.measure.cost.model import subject_of
from gen_accel.video import VideoShape

STEPS = 3
SIZE = {"height": 64, "width": 80}
# (grid, frames of it without queries, whether it is dense, other tokens that the blocks run on)
Seen = tuple[tuple[int, int, int], int, bool, int]


def call(pipe: Any, clip: dict[str, int], **more: Any) -> None:
    """Run a pipeline with its default chunks, for latents alone."""
    plain = {"prompt": "a red square moves right", "output_type": "latent"}
    pipe(**{**plain, **clip, "generator": torch.Generator().manual_seed(5), **more})


def windows() -> Any:
    case = next(case for case in skyreels.CASES if "forcing" in case.name)
    assert case.pipeline is not None
    return case.pipeline()


def pyramid() -> Any:
    parts = {
        "transformer": helios.transformer(is_amplify_history=True),
        "scheduler": HeliosScheduler(stages=3, gamma=0.25),
    }
    return wan.pipeline(HeliosPyramidPipeline, **parts)


PLAIN = {"num_inference_steps": STEPS}
ONE = {"guidance_scale": 1.0, "max_sequence_length": 16}
# A pipeline, a clip of several chunks, and the other arguments that it is called with.
CASES: dict[str, tuple[Callable[[], Any], dict[str, int], dict[str, Any]]] = {
    "helios": (helios.pipeline, SIZE | {"num_frames": 77}, PLAIN | ONE),
    "helios_pyramid": (
        pyramid,
        {"height": 64, "width": 128, "num_frames": 37},
        {"pyramid_num_inference_steps_list": [STEPS // 3] * 3, **ONE},
    ),
    "framepack": (
        framepack.pipeline,
        SIZE | {"num_frames": 65},
        PLAIN | {"image": wan.picture(0)},
    ),
    "anyflow_far": (anyflow_far.pipeline, SIZE | {"num_frames": 29}, PLAIN | ONE),
    "skyreels_windows": (
        windows,
        SIZE | {"num_frames": 193},
        {"overlap_history": 17, **PLAIN, **ONE},
    ),
}


def made(pipe: Any, run: Callable[[], object]) -> Counter[Seen]:
    """Counts of the calls of a pipeline's transformer, by what they attend to."""
    model, seen, runs = pipe.transformer, Counter[Seen](), list[int]()
    family: Any = family_of(model)
    blocks = getattr(model, "blocks", None) or model.transformer_blocks

    def note(block, args, kwargs):
        runs.append((args or (kwargs["hidden_states"],))[0].shape[1])

    def end(model, args, given, out):
        tokens = runs.pop()
        if family.stays_dense(model, given) is None:
            held = family.tokens(model, given)
            seen[held.video.grid, held.past, False, tokens] += 1
            return
        mask = create_mask(given["attention_mask"].mask_mod, 1, 1, tokens, tokens, device="cpu")
        frames = sum(given["chunk_partition"])
        seen[(frames, int(mask.sum()), 0), 0, True, tokens] += 1

    hooks = [
        blocks[0].register_forward_pre_hook(note, with_kwargs=True),
        model.register_forward_hook(end, with_kwargs=True),
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_passes_are_those_of_the_pipeline(name):
    build, clip, more = CASES[name]
    pipe = build()
    subject = subject_of(pipe)
    passes = subject.passes(subject.grid(**clip), STEPS)
    told = Counter[Seen]()
    for one in passes:
        beside = one.lengths.get("history", 0)
        runs = round(one.lengths.get("noisy", one.video.tokens + beside))
        grid = one.video.grid
        if one.is_dense:  # by pairs of tokens, as each query sees others
            grid = one.video.frames, round(runs * (one.video.tokens + beside)), 0
        told[grid, one.past, one.is_dense, runs] += round(one.times)
    assert sum(told.values()) > STEPS
    assert told == made(pipe, lambda: call(pipe, clip, **more))


@pytest.mark.slow
def test_keys_of_coarse_chunks_and_of_padding_are_those_of_a_call():
    pipe = anyflow_far.pipeline()
    model, found = pipe.transformer, Counter[int]()
    family: Any = family_of(model)

    def begin(model, args, given):
        if family.stays_dense(model, given) is None:
            found[family.tokens(model, given).video.text] += 1

    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    call(pipe, SIZE | {"num_frames": 29}, **PLAIN, **ONE)
    hook.remove()
    subject = subject_of(pipe)
    told = Counter[int]()
    for one in subject.passes(subject.grid(**SIZE, num_frames=29), STEPS):
        if not one.is_dense:
            told[round(one.lengths["history"])] += round(one.times)
    assert told == found


def test_a_clip_of_chunks_costs_the_sum_of_its_passes():
    """Tokens of a call of Helios, the same in each of the 4 chunks of 9 latents of 129 frames."""
    size: dict[str, Any] = {"height": 384, "width": 640}
    found = estimate("Helios-Base", Dense(), **size, num_frames=129, steps=50)
    subject = subject_of("Helios-Base")
    frame = 24 * 40
    history = 2 * frame + 12 * 20 + 4 * 6 * 10
    once = subject.flops(VideoShape(9, 24, 40), {"history": history})
    assert found.step_flops == pytest.approx(2 * 4 * sum(once))
    assert (found.passes, found.pass_tokens) == (200, 9 * frame + history)
    assert "made chunk after chunk: 200 calls" in str(found)
    assert found.uncounted == ()
    longer = estimate("Helios-Base", Dense(), **size, num_frames=261, steps=50)
    assert longer.step_flops == pytest.approx(2 * found.step_flops)


def test_the_density_is_of_the_rows_of_the_chunk():
    """A window of its own frame leaves each query that frame, and what is beside the grid."""
    video = VideoShape(9, 8, 8, text=70)
    density, computed, _ = densities_of(Neighborhood((1, -1, -1)), video, past=6)
    assert density == pytest.approx((64 + 70) / video.tokens)
    assert density <= computed < 2 * density
    assert densities_of(Neighborhood((-1, -1, -1)), video, past=6)[0] == pytest.approx(1)


def test_a_pipeline_of_windows_is_told_from_one_of_the_whole():
    size: dict[str, Any] = {"height": 544, "width": 960, "num_frames": 177, "steps": 30}
    whole, forced = (
        estimate(f"SkyReels-V2-{name}", Dense(), **size) for name in ("T2V-14B", "DF-1.3B")
    )
    assert (whole.passes, forced.passes) == (30, 60)
    assert forced.pass_tokens == 25 * 34 * 60


def test_memory_is_of_the_longest_pass_and_of_the_cache():
    size: dict[str, Any] = {"gpu": "h100", "height": 480, "width": 832, "steps": 4}
    short, long = (
        forecast("AnyFlow-FAR-Wan2.1-1.3B", Dense(), num_frames=n, **size) for n in (81, 129)
    )
    more = (129 - 81) // 12 * 3 * 15 * 26 * 2 * 30 * 1536 * 2  # coarse chunks: keys and values
    grown = long.activations.low - short.activations.low
    queries = 12 * 15 * 26 * 11 * 1536 * 2  # of the pass that fills the cache
    assert grown == pytest.approx(more + queries)
    assert short.calls * short.batch == 1, "guidance is in the weights"


def test_work_that_a_method_cannot_thin_is_told():
    given: dict[str, Any] = {"height": 480, "width": 832, "num_frames": 81, "efficiency": 0.8}
    few, many = (estimate("AnyFlow-FAR-Wan2.1-1.3B", Radial(), **given, steps=n) for n in (4, 50))
    assert few.sparse_share < many.sparse_share < 1
