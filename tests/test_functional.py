"""What the public attention function and the handles around it refuse, in words."""

import pickle
import threading
import warnings

import numpy as np
import pytest
from support import wan
from support.qkv import random_qkv

from gen_accel import Radial, Schedule, SparseLinear, VideoShape, attach, attention, extend
from gen_accel.attention_processors.attached.schedule import as_schedule
from gen_accel.pipelines.long_video import NeverCalled

VIDEO = VideoShape(2, 3, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: {"video": (2, 3, 4)}, r"^video must be a VideoShape, .* got \(2, 3, 4\)"),
        (lambda q: {"q": q.tolist()}, "^q must be a tensor, got list"),
        (lambda q: {"k": np.zeros(3)}, "^k must be a tensor, got ndarray"),
        (lambda q: {"v": q.int()}, r"^v must be of a floating dtype, got torch\.int32"),
    ],
    ids=["video", "list", "numpy", "int32"],
)
def test_attention_refuses_what_is_of_another_type(change, words):
    q, k, v = random_qkv(VIDEO)
    given = {"q": q, "k": k, "v": v, "video": VIDEO, "method": Radial()} | change(q)
    with pytest.raises(ValueError, match=words):
        attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_attention_refuses_a_branch_of_other_heads():
    q, k, v = random_qkv(VIDEO, heads=2, dim=8)
    method = SparseLinear()
    attention(q, k, v, video=VIDEO, method=method, branch=method.branch(2, 8))
    with pytest.raises(ValueError, match=r"^branch must be as SparseLinear\.branch\(2, 8\)"):
        attention(q, k, v, video=VIDEO, method=method, branch=method.branch(2, 16))


def test_a_schedule_is_a_schedule():
    assert as_schedule(None) == Schedule()
    with pytest.raises(ValueError, match=r"^schedule must be a Schedule, such as .* got 'x'"):
        attach(wan.transformer(), Radial(), schedule="x")  # pyright: ignore[reportArgumentType]


def test_more_dense_layers_than_there_are_is_refused():
    model = wan.transformer()
    layers = len(model.blocks)
    attach(model, Radial(), schedule=Schedule(dense_layers=layers)).detach()
    with pytest.raises(
        ValueError, match=rf"must be at most {layers}, the layers of this model, g"
    ):
        attach(model, Radial(), schedule=Schedule(dense_layers=99))


def test_what_is_attached_says_that_it_cannot_be_pickled():
    model = wan.transformer()
    with attach(model, Radial()), pytest.raises(pickle.PicklingError, match=r"detach\(\) first"):
        pickle.dumps(model)
    pickle.dumps(model)


def test_one_model_in_two_threads_is_said():
    """The other thread's call comes between a processor's call and its attention."""
    model = wan.transformer()
    with attach(model, Radial()):
        attention_of = model.blocks[0].attn1
        cells = type(attention_of.processor).__call__.__closure__ or ()
        [run] = [
            c.cell_contents for c in cells if type(c.cell_contents).__name__ == "_ProcessorRun"
        ]

        def meanwhile(*args):
            run.thread = threading.get_ident() + 1

        attention_of.to_q.register_forward_hook(meanwhile)
        with pytest.raises(RuntimeError, match="runs in two threads at once"):
            wan.forward(model)


def test_a_technique_that_is_never_called_warns():
    model = wan.transformer()
    never = pytest.warns(NeverCalled, match="^riflex was put on and never called")
    with never, extend(model, "riflex", num_frames=121):
        pass
    assert not model._forward_pre_hooks
    with warnings.catch_warnings(), extend(model, "riflex", num_frames=121):
        warnings.simplefilter("error")
        wan.forward(model)
