"""The FLOPs that each family tells of its models are those that torch counts in a run."""

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from support.tiny import Case, cases, is_here
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gen_accel import attach_own
from gen_accel.attention_processors.families import family_of, served_classes, video_classes
from gen_accel.attention_processors.families.layers import Cost, Flops, Layers
from gen_accel.video import VideoShape

VIDEO = {
    case.name: case for case in cases() if family_of(case.build()).kind in ("video", "frames")
}
# What models are given besides size and text. The kind of None is all else that attends.
GIVEN: dict[str, dict[str, int | None]] = {
    "wan_image": {"image": 5},
    "wan_animate": {"image": 5},
    "chronoedit": {"image": 5},
    "anyflow_far": {"noisy": 35, "history": None},
    "helios": {"history": None},
    "helios_pyramid": {"history": None},
    "helios_telling": {"history": None},
    "hunyuan_video15": {"glyphs": 5, "image": 4},
    "hunyuan_video15_image": {"glyphs": 5, "image": 4},
    "framepack": {"image": 4, "history": None},
    "kandinsky6_image": {"image": None},
    "motif_image": {"image": 4},
    "minimax_h3": {"sound": None},
    "ltx2": {"sound": 6},
    "ltx2_perturbed": {"sound": 6},
    "easyanimate_inpaint": {"text": None},
    "cosmos_transfer": {"image": 3},
    "cosmos3": {"noisy": 70},
    "cosmos3_nemotron": {"noisy": 70},
}
# What `layers` of these leaves out, as `uncounted` says.
NOT_MODELLED = {
    "wan_token_timesteps": "a timestep of each token",
    "wan_animate": "pose and face",
    "anyflow_far": "queries of zeros",
    "consisid": "the face",
    "kandinsky6": "sound",
    "minimax_h3_key_frames": "key frames",
    "minimax_h3_references": "references",
    "ltx_image": "a timestep of each token",
    "ltx_conditions": "frames that condition it",
    "ltx_window": "frames that condition it",
    "ltx2_followed": "videos that it follows",
    "cosmos_predict": "timesteps of single frames",
}
NOT_MODELLED = {name: what for name, what in NOT_MODELLED.items() if name in VIDEO}
MODELLED = [name for name in VIDEO if name not in (*NOT_MODELLED, "animatediff")]


@cache
def model_of(name: str) -> nn.Module:
    return VIDEO[name].build()


def counted(name: str) -> Flops:
    """Of a run, by torch: both products of all attention, and the rest."""
    case = VIDEO[name]
    # FlexAttention is not counted.
    own = attach_own(model_of(name)) if name == "anyflow_far" else nullcontext()
    with (
        own,
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        case.call(model_of(name), case.inputs(*case.grids[1], batch=1))
    by_operator = counter.get_flop_counts()["Global"]
    attention = sum(n for operator, n in by_operator.items() if "bmm" in str(operator))
    return Flops(attention, sum(by_operator.values()) - attention)


def told(name: str) -> Flops:
    """The same by the family."""
    case, model = VIDEO[name], model_of(name)
    family: Any = family_of(model)
    video, lengths = VideoShape(*case.grids[1]), lengths_of(case, model)
    both, layers = family.cost(model)(video, lengths), family.layers(model)
    if not isinstance(family.cost(model), Cost):
        return both  # of the attention, that over the grid alone
    only = Cost(nn.Identity(), Layers({}, {}), [], False)
    only.other = Cost(model, layers, [], False).other
    others = only(video, lengths).rest
    return Flops(both.attention + others, both.rest - others)


def lengths_of(case: Case, model: nn.Module) -> dict[str, int]:
    given = case.inputs(*case.grids[1], batch=1)
    text = given.get("encoder_hidden_states", given.get("input_ids"))
    text = text[0] if isinstance(text, tuple) else text
    assert text is not None
    known = {"text": text.shape[-2] if text.ndim > 1 else len(text)} | GIVEN.get(case.name, {})
    rest = [kind for kind, number in known.items() if number is None]
    found = {kind: number for kind, number in known.items() if number is not None}
    if rest:
        family: Any = family_of(model)
        beside = family.layers(model).beside
        others = sum(number for kind, number in found.items() if kind in beside)
        found[rest[0]] = family.tokens(model, given).video.text - others
    return found


@pytest.mark.turns(5)
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELLED)
def test_flops_are_those_of_a_run(name):
    run, by_family = counted(name), told(name)
    # These make their rotary angles by a product of matrices.
    close = 4e-3 if name in ("cosmos3", "cosmos3_nemotron", "mochi") else 0
    assert by_family.attention == pytest.approx(run.attention, rel=close)
    if name == "framepack" or name.startswith("helios"):  # patches of the history are left out
        assert by_family.rest < run.rest
    else:
        assert by_family.rest == pytest.approx(run.rest, rel=0.05)


@pytest.mark.slow
def test_flops_of_animatediff_are_those_of_a_run():
    assert sum(told("animatediff")) == sum(counted("animatediff"))


@pytest.mark.parametrize("name", NOT_MODELLED)
def test_what_is_not_modelled_is_said(name):
    family: Any = family_of(model_of(name))
    if name != "wan_token_timesteps":  # a model is known for it by its channels
        assert family.layers(model_of(name)).uncounted
    run, by_family = counted(name), told(name)
    assert sum(run) > sum(by_family)


@pytest.mark.slow
def test_every_family_of_videos_tells_its_flops():
    models = map(model_of, VIDEO)
    families = {family_of(model).name: (family_of(model), model) for model in models}
    assert {*families} == {served_classes()[kind] for kind in filter(is_here, video_classes())}
    assert all(one.cost(model) for one, model in families.values())


def test_kinds_are_added_and_multiplied():
    model = nn.Sequential(nn.Linear(2, 3), nn.Conv2d(1, 1, 2), nn.Linear(5, 7))
    layers = Layers({"0": "frames * text + one", "1": "nothing known"}, {"2": ("one", "text")})
    cost = Cost(model, layers, [], False)
    found = cost(VideoShape(2, 3, 4), {"text": 10})
    assert found == Flops(0, 2 * (21 * 6 + 24 * 35) + 4 * 10 * 7)
