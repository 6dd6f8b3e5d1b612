"""The vLLM-Omni plug-in, called as its dispatcher calls one."""

import importlib.util
import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from support.paths import ROOT

import gen_accel
from gen_accel import Radial, VideoShape

FOLDER = ROOT / "integrations" / "vllm_omni"
GRID = VideoShape(5, 8, 8)
SCALE = 0.3


@pytest.fixture
def plugin():
    """Imported anew, as what it has logged it does not log again."""
    spec = importlib.util.spec_from_file_location(
        "gen_accel_vllm_omni", FOLDER / "gen_accel_vllm_omni.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dispatch(plugin):
    """The last line of the dispatcher: parameters of the server, then of this forward pass."""

    def call(q, k, v, *, causal=False, **params):
        per_forward = {
            "latent_shape": torch.tensor([[5, 16, 17]] * len(q)),
            "patch_size": torch.tensor([[1, 2, 2]] * len(q)),
        }
        merged = {k: v for k, v in (per_forward | params).items() if v is not None}
        return plugin.attention(q, k, v, merged, is_causal=causal, softmax_scale=SCALE)

    return call


@pytest.fixture
def tensors():
    """(B, N, H, D), as the contract has it."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, GRID.tokens, 4, 16, generator=g) for _ in range(3)]


def by_hand(tensors, method, **options):
    q, k, v = (x.transpose(1, 2) for x in tensors)
    out = gen_accel.attention(q, k, v, video=GRID, method=method, scale=SCALE, **options)
    return out.transpose(1, 2)


def dense(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, scale=SCALE, enable_gqa=grouped)
    return out.transpose(1, 2)


def test_the_entry_point_names_the_function(plugin):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm_omni.sparse_attn"]["gen_accel"].partition(":")
    assert (FOLDER / f"{module}.py").is_file()
    assert callable(getattr(plugin, name))
    assert not hasattr(plugin.attention, "capabilities")  # it takes no mask
    assert "vllm_omni" not in sys.modules


def test_the_method_of_the_server_runs_over_the_grid_of_the_call(dispatch, tensors):
    assert torch.allclose(dispatch(*tensors), by_hand(tensors, Radial()), atol=1e-6)
    params = {"method": "radial", "settings": ["decay_factor=0.2", "sink=false"]}
    exact = by_hand(tensors, Radial(decay_factor=0.2, sink=False))
    assert torch.allclose(dispatch(*tensors, **params), exact, atol=1e-6)
    out = dispatch(*tensors, settings="decay_factor=0.2", kernel="reference")
    assert torch.allclose(out, by_hand(tensors, Radial(decay_factor=0.2)), atol=1e-5)
    assert not torch.allclose(out, dense(*tensors), atol=1e-3)


def test_the_grid_may_come_as_plain_numbers(dispatch, tensors):
    out = dispatch(*tensors, latent_shape=[5, 16, 16], patch_size=(1, 2, 2))
    assert torch.equal(out, dispatch(*tensors))


UNKNOWN = {
    "no grid": ({"latent_shape": None}, "no latent_shape and patch_size"),
    "no patch": ({"patch_size": None}, "no latent_shape and patch_size"),
    "two grids": (
        {"latent_shape": torch.tensor([[5, 16, 16], [5, 8, 32]])},
        "no latent_shape and patch_size that all samples share",
    ),
    "padding": ({"latent_shape": [[4, 16, 16]] * 2}, "320 tokens, the grid has 4 x 8 x 8"),
}


@pytest.mark.parametrize(("params", "reason"), UNKNOWN.values(), ids=UNKNOWN)
def test_without_the_grid_it_is_dense_and_says_so_once(dispatch, tensors, caplog, params, reason):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.allclose(dispatch(*tensors, **params), dense(*tensors), atol=1e-6)
    [told] = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"gen_accel: dense: {reason}")


def test_cross_attention_and_shared_keys_are_dense(dispatch, tensors):
    q, k, v = tensors
    for short in ([q, k[:, :7], v[:, :7]], [q, k[:, :, :2], v[:, :, :2]]):
        assert torch.allclose(dispatch(*short), dense(*short), atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "dense_at"),
    [
        ({"dense_steps": 2}, {0, 1}),
        ({"dense_start": 0.25}, {0, 1, 2}),
        ({"dense_start": 0.1, "dense_end": 0.1}, {0, 9}),
    ],
)
def test_steps_that_stay_dense(dispatch, tensors, schedule, dense_at):
    sparse = dispatch(*tensors)
    for step in range(10):
        state = {"denoise_step_idx": torch.tensor([step, step])}
        state["total_denoise_steps"] = torch.tensor([10, 10])
        out = dispatch(*tensors, **schedule, **state)
        assert torch.equal(out, sparse) is (step not in dense_at)


@pytest.mark.parametrize("state", [{}, {"denoise_step_idx": torch.tensor([3, 4])}])
def test_a_schedule_without_one_step_is_refused(dispatch, tensors, state):
    with pytest.raises(ValueError, match=r"leave dense_steps.* dense_steps=2"):
        dispatch(*tensors, dense_steps=2, **state)


def test_what_it_cannot_do_is_refused(dispatch, tensors):
    with pytest.raises(ValueError, match="is_causal=True"):
        dispatch(*tensors, causal=True)
    with pytest.raises(ValueError, match="attn_mask"):
        dispatch(*tensors, attn_mask=torch.ones(2, GRID.tokens))
    with pytest.raises(ValueError, match="did you mean 'radial'"):
        dispatch(*tensors, method="radail")
    with pytest.raises(ValueError, match=r"no parameter 'setings'; did you mean 'settings'"):
        dispatch(*tensors, setings=["decay_factor=0.5"])
    with pytest.raises(ValueError, match=r"reuse learns from dense steps.* that it wraps"):
        dispatch(*tensors, method="reuse")
    with pytest.raises(ValueError, match="dense_layers cannot be kept"):
        dispatch(*tensors, dense_layers=2)
    for unknown in ("topk", "layer"):
        with pytest.raises(ValueError, match=f"no parameter '{unknown}'; there are method, set"):
            dispatch(*tensors, **{unknown: 0.3})
    for settings in ([], ["partition=cycle"]):
        with pytest.raises(ValueError, match=r"'cycle' changes.*=1d.*=2d.*=3d\" in settings"):
            dispatch(*tensors, method="block_mixture", settings=settings)


PACKED = {
    "spans": {"full_attn_spans": [[(0, 8)]]},
    "padding": {"valid_kv_length": 300},
    "samples": {"cu_seqlens_q": torch.tensor([0, 100, 320]), "max_seqlen_q": 220},
}


@pytest.mark.parametrize("params", PACKED.values(), ids=PACKED)
def test_what_shuts_tokens_out_is_refused_as_a_mask(dispatch, tensors, params):
    with pytest.raises(ValueError, match=f"without a mask.*{next(iter(params))}"):
        dispatch(*tensors, **params)


def test_a_mask_of_none_is_none(plugin, dispatch, tensors):
    params = {"latent_shape": [5, 16, 16], "patch_size": [1, 2, 2]}
    params |= dict.fromkeys(plugin.MASKS)
    out = plugin.attention(*tensors, params, is_causal=False, softmax_scale=SCALE)
    assert torch.equal(out, dispatch(*tensors))


def test_what_vllm_omni_adds_is_let_through(dispatch, tensors, caplog):
    state = {name: torch.tensor([3, 3]) for name in ("denoise_step_idx", "total_denoise_steps")}
    derived = {"total_latent_frames": 5, "patches_per_frame": 64, "kv_cache_dtype": "fp8"}
    assert torch.equal(dispatch(*tensors, **state, **derived), dispatch(*tensors))
    assert "not used" not in caplog.text
    assert torch.equal(dispatch(*tensors, gate_compress=tensors[0]), dispatch(*tensors))
    assert caplog.text.count("what the model gives as 'gate_compress' is not used") == 1


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"method": "dense"}, "dense: method is dense"),
        ({"method": "sparse_linear"}, "without its linear branch"),
        (
            {"method": "block_mixture", "settings": ["partition=2d"]},
            "sparse: BlockMixture(partition='2d'",
        ),
    ],
)
def test_it_says_what_it_does(dispatch, tensors, caplog, params, told):
    with caplog.at_level(logging.WARNING):
        out = dispatch(*tensors, **params)
    assert told in caplog.text
    is_dense = params["method"] == "dense"
    assert torch.allclose(out, dense(*tensors), atol=1e-6) is is_dense
    assert ("sparse: " in caplog.text) is not is_dense
