"""The backend inside vLLM-Omni's own classes. test_vllm_omni.py runs this in a process of its own,
as vLLM-Omni changes torch and vLLM when it is imported.

The attention layer, its metadata, the registry, the plug-in loader and Wan's transformer are those
of the package. The one part of the tests is a platform for the CPU, as a platform plug-in of
vLLM-Omni would bring, since the package has none.
"""

import logging
from contextlib import contextmanager
from importlib.metadata import entry_points

import pytest
import torch
import torch.nn.functional as F
import vllm_omni.platforms
from support import wan
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm_omni.platforms.interface import OmniPlatformEnum, UnspecifiedOmniPlatform

import gen_accel
from gen_accel import BlockMixture, Dense, Piecewise, Radial, Schedule, VideoShape, attach

HEADS, DIM = 4, 16
GRID = VideoShape(5, 8, 8)
SCALE = 0.3


class CpuPlatform(UnspecifiedOmniPlatform):
    """Takes the named backend, or torch's attention by default."""

    _omni_enum = OmniPlatformEnum.CUDA  # the forward passes of that name are torch's

    @classmethod
    def get_diffusion_attn_backend_cls(cls, selected_backend, head_size, allow_trtllm_default=0):
        name = (selected_backend or "TORCH_SDPA").upper()
        cls.validate_diffusion_attn_backend(name)
        return DiffusionAttentionBackendEnum[name].get_path()

    @classmethod
    def get_device_count(cls):
        return 1

    @classmethod
    def get_torch_device(cls, local_rank=None):
        return torch.device("cpu")

    @classmethod
    def set_device(cls, device):
        pass


vllm_omni.platforms._current_omni_platform = CpuPlatform()

from vllm_omni.diffusion.attention.backends.abstract import (  # noqa: E402
    AttentionMetadata,
    VideoTokenLayout,
    VideoTokenSpan,
)
from vllm_omni.diffusion.attention.backends.registry import (  # noqa: E402
    DiffusionAttentionBackendEnum,
)
from vllm_omni.diffusion.attention.layer import Attention  # noqa: E402
from vllm_omni.diffusion.config import set_current_diffusion_config  # noqa: E402
from vllm_omni.diffusion.data import AttentionConfig, OmniDiffusionConfig  # noqa: E402
from vllm_omni.diffusion.distributed import parallel_state  # noqa: E402
from vllm_omni.diffusion.forward_context import (  # noqa: E402
    get_forward_context,
    set_forward_context,
)
from vllm_omni.diffusion.models.wan2_2.wan2_2_transformer import (  # noqa: E402
    WanTransformer3DModel,
)
from vllm_omni.plugins import load_omni_plugins_by_group  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def registered():
    """By the package's own loader, from the entry point of our metadata."""
    plugins = load_omni_plugins_by_group("vllm_omni.general_plugins")
    plugins["gen_accel"]()
    plugins["gen_accel"]()  # the loader warns that it may be called again
    import gen_accel_vllm_omni.backend as backend

    return backend


@pytest.fixture(autouse=True)
def said_anew(registered, caplog):
    registered._say.cache_clear()
    caplog.set_level(logging.WARNING, "gen_accel_vllm_omni.backend")


def config(*, block_sparse=None, parallel=None, **options):
    spec = {"backend": "RAINFUSION_ATTN"}
    if block_sparse is not None:
        spec["block_sparse"] = block_sparse
    made = OmniDiffusionConfig(
        model="none",
        diffusion_attention_config=AttentionConfig(per_role={"self": spec}),
        additional_config={"gen_accel": options} if options else {},
    )
    for name, value in (parallel or {}).items():
        setattr(made.parallel_config, name, value)
    return made


@contextmanager
def running(made, step=None, steps=None, noise=None):
    with set_forward_context(omni_diffusion_config=made):
        now = get_forward_context()
        now.denoise_step_idx, now.total_denoise_steps, now.denoise_timestep = step, steps, noise
        yield


def layer(made, *, prefix="blocks.3.attn1", **options):
    given = {"num_heads": HEADS, "head_size": DIM, "causal": False, "softmax_scale": SCALE}
    with set_current_diffusion_config(made):
        return Attention(**(given | {"prefix": prefix, "qkv_layout": "BSND"} | options))


def tensors(tokens=GRID.tokens, heads=HEADS, batch=2):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, tokens, heads, DIM, generator=g) for _ in range(3)]


def about(prefix=0, grid=(5, 8, 8), used=None, **given):
    layout = VideoTokenLayout(prefix_len=prefix, latent_grid=grid, used_len=used)
    return AttentionMetadata(video_layout=layout, **given)


def by_hand(q, k, v, method, video=GRID):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return gen_accel.attention(q, k, v, video=video, method=method, scale=SCALE).transpose(1, 2)


def dense(q, k, v, mask=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=SCALE, enable_gqa=gqa)
    return out.transpose(1, 2)


def test_the_entry_point_is_ours_and_the_registry_has_the_backend(registered):
    [found] = [one for one in entry_points(group="vllm_omni.general_plugins") if "gen" in one.name]
    assert found.value == "gen_accel_vllm_omni:register"
    member = DiffusionAttentionBackendEnum["RAINFUSION_ATTN"]
    assert member.get_class() is registered.GenAccelBackend
    made = layer(config())
    assert type(made.attention) is registered.GenAccelImpl
    assert made.backend_explicit


METHODS = {
    "radial": ((), Radial()),
    "piecewise": (("critical=0.3",), Piecewise(0.3)),
    "block_mixture": ((), BlockMixture()),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_runs_the_method_over_the_published_grid(name, caplog):
    settings, method = METHODS[name]
    made = config(method=name, settings=list(settings))
    given = tensors()
    third = method.for_layer(3) if name == "block_mixture" else method
    with running(made):
        out = layer(made)(*given, about(used=320))
    assert torch.allclose(out, by_hand(*given, third), atol=1e-5)
    assert not torch.allclose(out, dense(*given), atol=1e-3)
    assert caplog.text.count("sparse: ") == 1


def test_without_options_it_is_piecewise_at_a_fifth():
    made, given = config(), tensors()
    with running(made):
        out = layer(made)(*given, about(used=320))
    assert torch.allclose(out, by_hand(*given, Piecewise(critical=0.2)), atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_a_prefix_is_text_and_padding_is_left_out(masked):
    """Changes of the padding change nothing, and what stands before the grid is as text."""
    made, given = config(method="radial"), tensors(7 + 320 + 9)
    mask = torch.arange(336)[None].expand(2, -1) < 327 if masked else None
    where = about(prefix=7, attn_mask=mask)
    with running(made):
        ours = layer(made)
        out = ours(*given, where)
        for x in given:
            x[:, 327:] = torch.nan
        assert torch.equal(ours(*given, where)[:, :327], out[:, :327])
    video = [torch.cat([x[:, 7:327], x[:, :7]], 1) for x in given]
    exact = by_hand(*video, Radial(), VideoShape(5, 8, 8, 7))
    assert torch.allclose(out[:, 7:327], exact[:, :320], atol=1e-5)
    assert torch.allclose(out[:, :7], exact[:, 320:], atol=1e-5)
    assert not out[:, 327:].any()


def test_of_several_videos_the_target_is_the_grid():
    made, given = config(method="radial"), tensors(5 + 128 + 3 + 320 + 4)
    spans = (
        VideoTokenSpan(start=5, latent_grid=(2, 8, 8), role="reference"),
        VideoTokenSpan(start=136, latent_grid=(5, 8, 8), role="target"),
    )
    where = AttentionMetadata(video_layout=VideoTokenLayout(used_len=456, video_spans=spans))
    with running(made):
        out = layer(made)(*given, where)
    video = [torch.cat([x[:, 136:456], x[:, :136]], 1) for x in given]
    exact = by_hand(*video, Radial(), VideoShape(5, 8, 8, 136))
    assert torch.allclose(out[:, 136:456], exact[:, :320], atol=1e-5)
    assert torch.allclose(out[:, :136], exact[:, 320:], atol=1e-5)


def test_fewer_heads_of_keys():
    made = config(method="radial")
    (q, _, _), (_, k, v) = tensors(), tensors(heads=2)
    with running(made):
        out = layer(made, num_kv_heads=2)(q, k, v, about())
    whole = [x.repeat_interleave(2, 2) for x in (k, v)]
    assert torch.allclose(out, by_hand(q, *whole, Radial()), atol=1e-5)


UNKNOWN = {
    "no metadata": (None, "this attention has no video_layout"),
    "no layout": (AttentionMetadata(), "this attention has no video_layout"),
    "another grid": (about(grid=(6, 8, 8)), "320 tokens, the layout has 384 with 0 + (6, 8, 8)"),
    "no grid": (AttentionMetadata(video_layout=VideoTokenLayout()), "without a grid"),
    "packed": (
        about(extra={"cu_seqlens_q": torch.tensor([0, 100, 200, 320]), "max_seqlen_q": 120}),
        "3 packed sequences, the longest of 120 tokens",
    ),
    "pairs": (about(attn_mask=torch.ones(2, 1, 320, 320, dtype=torch.bool)), "a mask of pairs"),
}


@pytest.mark.parametrize(("where", "reason"), UNKNOWN.values(), ids=UNKNOWN)
def test_without_a_grid_it_is_dense_and_says_so_once(where, reason, caplog):
    made, given = config(method="radial"), tensors()
    with running(made):
        ours = layer(made)
        for _ in range(2):
            assert torch.allclose(ours(*given, where), dense(*given), atol=1e-5)
    [told] = [one.getMessage() for one in caplog.records]
    assert told.startswith("gen_accel: dense: ")
    assert reason in told


def test_dense_calls_keep_their_mask():
    made, given = config(method="dense"), tensors()
    mask = torch.arange(320)[None].expand(2, -1) < 300
    with running(made):
        out = layer(made)(*given, about(used=320, attn_mask=mask))
    assert torch.allclose(out, dense(*given, mask[:, None, None]), atol=1e-5)


def test_cross_attention_is_dense(caplog):
    made, (q, k, v) = config(method="radial"), tensors()
    with running(made):
        out = layer(made, prefix="blocks.3.attn2")(q, k[:, :7], v[:, :7])
    assert torch.allclose(out, dense(q, k[:, :7], v[:, :7]), atol=1e-5)
    assert "dense: cross-attention" in caplog.text


LAYERS = {
    "layers": (2, {"blocks.1.attn1": True, "blocks.2.attn1": False}),
    "named layers": ([2], {"blocks.1.attn1": False, "blocks.2.attn1": True}),
}
STEPS = {
    "steps": ({"dense_steps": 2}, {0, 1}),
    "named steps": ({"dense": [1, 4]}, {1, 4}),
    "start": ({"dense_start": 0.25}, {1, 2, 3}),
    "both ends": ({"dense_start": 0.1, "dense_end": 0.1}, {1, 9}),
    "noise": ({"dense_noise": [0.9, 0.6]}, {1, 2, 3}),
}


@pytest.mark.parametrize(("layers", "expected"), LAYERS.values(), ids=LAYERS)
def test_layers_that_stay_dense(layers, expected):
    made, given = config(method="radial", dense_layers=layers), tensors()
    for prefix, is_dense in expected.items():
        with running(made):
            out = layer(made, prefix=prefix)(*given, about())
        assert torch.allclose(out, dense(*given), atol=1e-5) is is_dense


@pytest.mark.parametrize(("options", "expected"), STEPS.values(), ids=STEPS)
def test_steps_that_stay_dense(options, expected):
    made, given = config(method="radial", **options), tensors()
    ours = layer(made)
    for step in range(10):
        with running(made, step, 10, 1 - step / 10):
            out = ours(*given, about())
        assert torch.allclose(out, dense(*given), atol=1e-5) is (step in expected)


UNTOLD = {
    "no step": ({"dense_steps": 2}, (None, None, None), "does not tell its steps"),
    "no total": ({"dense_start": 0.2}, (0, None, 1.0), "how many steps.*dense_steps is kept"),
    "no noise": ({"dense_noise": [1, 0.9]}, (0, None, None), "the noise of its steps"),
}


@pytest.mark.parametrize(("options", "now", "reason"), UNTOLD.values(), ids=UNTOLD)
def test_a_schedule_that_the_pipeline_does_not_tell_is_refused(options, now, reason):
    made = config(method="radial", **options)
    with running(made, *now), pytest.raises(ValueError, match=reason):
        layer(made)(*tensors(), about())


def test_the_memory_profile_needs_no_step():
    made, given = config(method="radial", dense_steps=2), tensors()
    with running(made):
        get_forward_context().in_diffusion_kv_memory_profile = True
        assert torch.allclose(layer(made)(*given, about()), dense(*given), atol=1e-5)


REFUSED = {
    "causal": ({}, {"causal": True}, "another backend for causal roles"),
    "layout": ({}, {"qkv_layout": "BNSD"}, "as BSND, got BNSD"),
    "ring": ({"parallel": {"ring_degree": 2}}, {}, "ulysses_degree in the place of ring_degree=2"),
    "all-gather": ({"parallel": {"allgather_degree": 2}}, {}, "allgather_degree=2"),
    "some of the heads": (
        {
            "parallel": {"tensor_parallel_size": 2},
            "method": "block_mixture",
            "settings": ["select=topk", "scope=overall"],
        },
        {},
        "hold some of the heads",
    ),
    "no number": ({"method": "block_mixture"}, {"prefix": "attn"}, "does not number its layers"),
    "their sparsity": ({"block_sparse": {"sparsity": 0.5}}, {}, r"sparsity=0.5.*in settings"),
    "their steps": ({"block_sparse": {"start_step": 3}}, {}, r"start_step=3.*dense_steps"),
    "their layers": ({"block_sparse": {"skip_layers": "0-3"}}, {}, r"skip_layers.*dense_layers"),
    "an option": ({"metod": "radial"}, {}, "did you mean 'method'"),
    "a method": ({"method": "reuse"}, {}, "remembers a dense step"),
}


@pytest.mark.parametrize(("made", "given", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_do_is_refused_when_the_model_is_built(made, given, reason):
    with pytest.raises(ValueError, match=reason):
        layer(config(**made), **given)


def test_dense_layers_need_numbers():
    made = config(method="radial", dense_layers=1)
    with running(made), pytest.raises(ValueError, match="does not number its layers"):
        layer(made, prefix="attn")(*tensors(), about())


def test_ulysses_gives_each_process_all_tokens_of_its_heads():
    """As after its all-to-all, with the padding that makes shards equal at the end."""
    made, given, where = config(method="piecewise"), tensors(320 + 4), about(used=320)
    with running(made):
        ours = layer(made)
        whole = ours(*given, where)
        halves = [
            ours.attention.forward(*(x[:, :, heads] for x in given), where)
            for heads in (slice(0, 2), slice(2, 4))
        ]
    assert torch.allclose(torch.cat(halves, 2), whole, atol=1e-5)
    assert not whole[:, 320:].any()


def test_in_a_compiled_block():
    made, given = config(method="radial"), tensors()
    ours = layer(made)

    def block(q, k, v):
        return ours(q * 2, k, v, about(used=320)) + 1

    with running(made):
        expected = block(*given)
        compiled = torch.compile(block, backend="eager", dynamic=True)
        assert torch.allclose(compiled(*given), expected, atol=1e-6)


# A whole model


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The groups of a server of one process."""
    made = VllmConfig(device_config=DeviceConfig(device="cpu"))
    place = tmp_path_factory.mktemp("groups") / "store"
    with set_forward_context(vllm_config=made, omni_diffusion_config=config()):
        parallel_state.init_distributed_environment(
            world_size=1, rank=0, backend="gloo", distributed_init_method=f"file://{place}"
        )
        parallel_state.initialize_model_parallel(backend="gloo")
    yield made
    parallel_state.destroy_model_parallel()
    with set_current_vllm_config(made):
        parallel_state.destroy_distributed_environment()


RADIAL = {"method": "radial", "settings": ["decay_factor=0.2", "block=16"]}
MODELS = {
    "dense": ({"method": "dense"}, Dense(), ()),
    "sparse": (RADIAL | {"dense_steps": 1}, Radial(decay_factor=0.2, block=16), ()),
    "one layer": (RADIAL | {"dense_layers": [1]}, Radial(decay_factor=0.2, block=16), (1,)),
}


@torch.no_grad()
@pytest.mark.parametrize(("options", "method", "layers"), MODELS.values(), ids=MODELS)
def test_wan_computes_what_it_computes_in_diffusers(one_process, options, method, layers):
    """The package's own Wan with diffusers' weights, beside `attach` on diffusers' Wan. Their
    rotary tables differ in the last digits, which moves a dense answer by 3e-4."""
    theirs, given, made = wan.transformer(), wan.inputs(5, 16, 16), config(**options)
    with set_current_diffusion_config(made), set_current_vllm_config(one_process):
        model = WanTransformer3DModel(**{name: theirs.config[name] for name in SIZES}).eval()
    model.load_weights(theirs.state_dict().items())

    def ours(step):
        with set_forward_context(vllm_config=one_process, omni_diffusion_config=made):
            get_forward_context().denoise_step_idx = step
            return model(**given, return_dict=False)[0]

    stock = theirs(**given, return_dict=False)[0]
    with attach(theirs, method, schedule=Schedule(dense_layers=layers)):
        exact = theirs(**given, return_dict=False)[0]
    assert away(ours(1), exact) < 1e-3
    assert away(exact, stock) > 5e-3 or options["method"] == "dense"
    if "dense_steps" in options:
        assert away(ours(0), stock) < 1e-3


SIZES = (
    *("patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels"),
    *("text_dim", "freq_dim", "ffn_dim", "num_layers", "rope_max_seq_len"),
)


def away(x, from_):
    return ((x - from_).norm() / from_.norm()).item()
