"""Each method beside what else people put on a diffusers model. `combinations.py` is the list."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    BitsAndBytesConfig,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    GGUFQuantizationConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
    TorchAoConfig,
)
from diffusers.hooks import apply_layer_skip
from diffusers.models import attention_dispatch
from peft import LoraConfig
from support import hunyuan, wan
from support.combinations import COMBINATIONS, PAGE, written
from support.methods import SPARSE
from support.products import NIGHTLY
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from gen_accel import Dense, Radial, Schedule, attach
from gen_accel.attention_processors.families import family_of
from gen_accel.pipelines import Attachment, SilentBranch

METHODS = SPARSE | {"radial": Radial(decay_factor=0.2, block=16), "dense": Dense()}
# Of the kinds with the most tests, methods whose plans the grid makes, and each call.
LARGE, QUICK = ("model", "cache"), ("radial", "block_mixture")
SMALL = (3, 10, 14)  # latents, 3 x 5 x 7 tokens
STEPS, DENSE_STEPS = 6, 2
SCHEDULE = Schedule(dense_steps=DENSE_STEPS)
CPU, GPU = torch.device("cpu"), torch.device("cuda")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def cells(kind: str) -> list[Any]:
    """Each thing with each method; by day on one family in turns if there are many."""
    some = kind in LARGE and not NIGHTLY
    return [
        pytest.param(
            combination.name,
            family,
            method,
            id=f"{combination.name}-{family}-{method}",
            marks=[pytest.mark.slow] if kind in LARGE and method not in QUICK else [],
        )
        for combination in COMBINATIONS
        if combination.kind == kind
        for i, family in enumerate(combination.families)
        for j, method in enumerate(METHODS)
        if not some or (i + j) % len(combination.families) == 0
    ]


both_families = pytest.mark.parametrize("family", ["Wan", "HunyuanVideo"])
each_method = pytest.mark.parametrize("method", METHODS)


def transformer(family: str, stack: int = 1) -> Any:
    """Of two blocks, HunyuanVideo's in two stacks, where there can be more in each."""
    if family == "Wan":
        return wan.transformer()
    return hunyuan.transformer(num_layers=stack, num_single_layers=stack)


def inputs(family: str, *sizes: int, **options: Any) -> dict[str, Tensor]:
    return (wan if family == "Wan" else hunyuan).inputs(*(sizes or SMALL), **options)


@torch.no_grad()
def forward(model: Any, given: dict[str, Tensor]) -> Tensor:
    return model(**given, return_dict=False)[0]


@contextmanager
def attached(target: Any, method: str, **options: Any) -> Iterator[Attachment]:
    """With a linear branch that is not silent, in numbers that fp8 holds exactly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SilentBranch)
        handle = attach(target, METHODS[method], **options)
    for branch in handle.branches.values():
        for parameter in branch.parameters():
            torch.nn.init.constant_(parameter, 0.25)
    with handle:
        yield handle


def assert_sparse(handle: Attachment, method: str, out: Tensor, stock: Tensor) -> None:
    """And that Dense is what the model does without us."""
    density = handle.summary().density
    if method == "dense":
        assert density is None
        assert torch.equal(out, stock)
    else:
        assert density is not None
        assert 0 < density < 1
        assert not torch.allclose(out, stock, atol=1e-3)


# What is put on a transformer


def add_lora(model: Any, folder: Path | None = None) -> None:
    torch.manual_seed(7)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def fuse_lora(model: Any, folder: Path) -> None:
    add_lora(model)
    model.fuse_lora()


def unfuse_lora(model: Any, folder: Path) -> None:
    fuse_lora(model, folder)
    model.unfuse_lora()


def store_in_fp8(model: Any, folder: Path) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def skip_first(model: Any, **options: bool) -> None:
    stack = "blocks" if hasattr(model, "blocks") else "transformer_blocks"
    apply_layer_skip(model, LayerSkipConfig([0], fqn=stack, **options))


def group_offload(model: Any, folder: Path, *, kind: str, to_disk: bool = False) -> None:
    model.enable_group_offload(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=f"{kind}_level",
        num_blocks_per_group=1 if kind == "block" else None,
        offload_to_disk_path=str(folder) if to_disk else None,
    )


class Thing(NamedTuple):
    """
    Args:
        put: on a transformer; the folder is its own.
        within: how far the answer may move; None where it has to.
    """

    put: Callable[[Any, Path], Any]
    within: float | None = None


THINGS = {
    "LoRA": Thing(add_lora),
    "LoRA, fused": Thing(fuse_lora),
    "LoRA, unfused again": Thing(unfuse_lora),
    "LayerSkip, whole blocks": Thing(lambda model, folder: skip_first(model)),
    "fp8 storage": Thing(store_in_fp8),
    "group offload, blocks": Thing(partial(group_offload, kind="block"), 0),
    "group offload, leaves": Thing(partial(group_offload, kind="leaf"), 0),
    "group offload, to disk": Thing(partial(group_offload, kind="leaf", to_disk=True), 0),
    "sequential offload, the CPU for the device": Thing(
        lambda model, folder: cpu_offload(model, execution_device=CPU), 0
    ),
    "model offload, the CPU for the device": Thing(
        lambda model, folder: cpu_offload_with_hook(model, execution_device=CPU), 0
    ),
    "attention backend": Thing(
        lambda model, folder: model.set_attention_backend("_native_math"), 1e-5
    ),
    "fused projections": Thing(lambda model, folder: model.fuse_qkv_projections(), 1e-5),
}


@cache
def without(family: str, method: str) -> Tensor:
    model = transformer(family)
    with attached(model, method):
        return forward(model, inputs(family))


@pytest.mark.turns(5)
@pytest.mark.parametrize(("name", "family", "method"), cells("model"))
def test_what_is_put_on_a_model(name, family, method, tmp_path):
    put, within = THINGS[name]
    given, alone = inputs(family), without(family, method)
    first, second = transformer(family), transformer(family)
    put(first, tmp_path / "first")
    stock = forward(first, given)
    with attached(first, method) as handle:
        out = forward(first, given)
    assert_sparse(handle, method, out, stock)
    assert torch.equal(forward(first, given), stock)
    with attached(second, method):
        put(second, tmp_path / "second")
        assert torch.equal(forward(second, given), out)
    assert torch.equal(forward(second, given), stock)
    with attached(first, method, kernel="reference"):
        assert (forward(first, given) - out).abs().max() < 1e-5
    moved = (out - alone).abs().max()
    assert moved > 1e-3 if within is None else moved <= within


@each_method
@both_families
def test_a_lora_is_the_same_fused_and_unfused_again(family, method):
    given, model = inputs(family), transformer(family)
    with attached(model, method):
        add_lora(model)
        out = forward(model, given)
        model.fuse_lora()
        assert (forward(model, given) - out).abs().max() < 1e-5
        model.unfuse_lora()
        assert (forward(model, given) - out).abs().max() < 1e-5


@both_families
def test_a_block_that_is_skipped_leaves_no_record(family):
    model = transformer(family)
    sites = [site.name for site in family_of(model).self_attentions(model)]
    skip_first(model)
    with attached(model, "radial") as handle:
        forward(model, inputs(family))
    assert set(handle.records) == {(f"transformer.{name}", 0) for name in sites[1:]}


def test_the_backend_runs_what_is_dense(monkeypatch):
    """Of HunyuanVideo, which has no cross-attention; test_attach.py has it for Wan."""
    model, given, seen = transformer("HunyuanVideo"), inputs("HunyuanVideo"), []
    registry = attention_dispatch._AttentionBackendRegistry._backends
    backend = attention_dispatch.AttentionBackendName._NATIVE_MATH
    stock = registry[backend]

    def spy(*args, **kwargs):
        seen.append(kwargs["query"].shape[1])
        return stock(*args, **kwargs)

    monkeypatch.setitem(registry, backend, spy)
    with attached(model, "radial", schedule=Schedule(dense_layers=1)):
        model.set_attention_backend("_native_math")
        forward(model, given)
    tokens = 3 * 5 * 7 + given["encoder_hidden_states"].shape[1]
    assert seen.count(tokens) == 1


# Weights of another kind, which are loaded before


def load_torchao(model: Any, folder: Path) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return type(model).from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def load_gguf(model: Any, folder: Path) -> Any:
    gguf = pytest.importorskip("gguf")
    kind, path = gguf.GGMLQuantizationType.Q8_0, folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "none")
    for name, x in model.state_dict().items():
        if x.ndim == 2 and x.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(x.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, x.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return type(model).from_single_file(
        str(path),
        config=str(folder),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )


def load_bitsandbytes(model: Any, folder: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_8bit=True)
    return type(model).from_pretrained(folder, quantization_config=config, dtype=torch.float16)


LOADERS = {"torchao int8, weights only": load_torchao, "GGUF": load_gguf}


@pytest.mark.turns(5)
@pytest.mark.parametrize(("name", "family", "method"), cells("loaded"))
def test_what_is_loaded_quantised(name, family, method, tmp_path):
    given, plain = inputs(family), transformer(family)
    plain.save_pretrained(tmp_path)
    model = LOADERS[name](plain, tmp_path).eval()
    stock = forward(model, given)
    assert not torch.equal(stock, forward(plain, given))
    with attached(model, method) as handle:
        out = forward(model, given)
    assert_sparse(handle, method, out, stock)
    with attached(model, method, kernel="reference"):
        assert (forward(model, given) - out).abs().max() < 1e-5
    assert torch.equal(forward(model, given), stock)


# What needs a GPU


def stream_groups(model: Any) -> None:
    model.enable_group_offload(
        onload_device=GPU,
        offload_device=CPU,
        offload_type="leaf_level",
        use_stream=True,
    )


# As the pipelines do it with each of their models.
ON_A_GPU = {
    "group offload to a GPU": stream_groups,
    "sequential offload": lambda model: cpu_offload(model, execution_device=GPU),
    "model offload": lambda model: cpu_offload_with_hook(model, execution_device=GPU),
}


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "family", "method"), cells("model on a GPU"))
def test_what_is_put_on_a_model_on_a_gpu(name, family, method):
    given = {name: x.to(GPU) for name, x in inputs(family).items()}
    first, second = transformer(family), transformer(family)
    ON_A_GPU[name](first)
    stock = forward(first, given)
    with attached(first, method) as handle:
        out = forward(first, given)
    assert_sparse(handle, method, out, stock)
    assert torch.equal(forward(first, given), stock)
    with attached(second, method):
        ON_A_GPU[name](second)
        assert torch.equal(forward(second, given), out)
    assert torch.equal(forward(second, given), stock)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "family", "method"), cells("loaded on a GPU"))
def test_what_is_loaded_quantised_on_a_gpu(name, family, method, tmp_path):
    transformer(family).save_pretrained(tmp_path)
    model = load_bitsandbytes(transformer(family), tmp_path).eval()
    given = {
        name: x.to(GPU, torch.float16 if x.is_floating_point() else x.dtype)
        for name, x in inputs(family).items()
    }
    stock = forward(model, given)
    with attached(model, method) as handle:
        out = forward(model, given)
    assert torch.isfinite(out).all()
    assert_sparse(handle, method, out, stock)
    assert torch.equal(forward(model, given), stock)


# Caches


def pipeline(family: str, stack: int = 1) -> Any:
    module = wan if family == "Wan" else hunyuan
    return module.pipeline(transformer=transformer(family, stack))


def stack_of(name: str) -> int:
    """cache-dit computes the first block of each stack at all steps."""
    return 2 if name == "cache-dit" else 1


def first_block(pipe: Any, skip: bool) -> Any:
    return FirstBlockCacheConfig(threshold=10.0 if skip else 0.0)


def broadcast(pipe: Any, skip: bool) -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3 if skip else 1,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def faster(pipe: Any, skip: bool) -> Any:
    return FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 990 if skip else -1),  # never at the first step
        attention_weight_callback=lambda module: 0.3,
        current_timestep_callback=lambda: pipe.current_timestep,
        is_guidance_distilled=True,
    )


def taylor(pipe: Any, skip: bool, **options: Any) -> Any:
    return TaylorSeerCacheConfig(
        cache_interval=2 if skip else 1,
        disable_cache_before_step=DENSE_STEPS,
        taylor_factors_dtype=torch.float32,
        **options,
    )


def taylor_attention(pipe: Any, skip: bool) -> Any:
    names = [r"blocks\.\d+\.attn1"] if hasattr(pipe.transformer, "blocks") else None
    return taylor(pipe, skip, cache_identifiers=names)


def magnitude(pipe: Any, skip: bool) -> Any:
    return MagCacheConfig(
        num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, max_skip_steps=1 if skip else 0
    )


def spectral(pipe: Any, skip: bool) -> Any:
    if not hasattr(diffusers, "SeaCacheConfig"):
        pytest.skip("this diffusers has no SeaCache")
    return diffusers.SeaCacheConfig(threshold=10.0 if skip else 0.0, max_consecutive_cached=1)


CACHES = {
    "FirstBlockCache": first_block,
    "Pyramid Attention Broadcast": broadcast,
    "FasterCache": faster,
    "TaylorSeer": taylor_attention,
    "TaylorSeer, lite": partial(taylor, use_lite_mode=True),
    "MagCache": magnitude,
    "SeaCache": spectral,
    "TextKVCache": lambda pipe, skip: TextKVCacheConfig(),
    "cache-dit": None,
}
SKIP_NOTHING = {
    ("SeaCache", "HunyuanVideo"),
    ("TextKVCache", "Wan"),
    ("TextKVCache", "HunyuanVideo"),
}


def enable(pipe: Any, name: str, *, skip: bool = True) -> None:
    if CACHES[name] is not None:
        pipe.transformer.enable_cache(CACHES[name](pipe, skip))
        return
    cache_dit = pytest.importorskip("cache_dit")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=DENSE_STEPS,
        residual_diff_threshold=10.0 if skip else 0.0,
    )
    cache_dit.enable_cache(pipe, cache_config=config)


def disable(pipe: Any, name: str) -> None:
    if CACHES[name] is not None:
        pipe.transformer.disable_cache()
    else:
        pytest.importorskip("cache_dit").disable_cache(pipe)


def run(pipe: Any, **options: Any) -> Tensor:
    """Latents of one call of the transformer a step, unless guidance is asked for."""
    if isinstance(pipe, wan.WanPipeline):
        return wan.generate(pipe, STEPS, **({"guidance_scale": 1.0} | options))
    return hunyuan.generate(pipe, STEPS, **options)


def counted(pipe: Any, **options: Any) -> tuple[Tensor, Counter]:
    """And how often each layer's attention ran at each step, as its projection saw it."""
    calls, step = Counter(), [0]

    def count(name: str, *_: Any) -> None:
        calls[f"transformer.{name}", step[0]] += 1

    def advance(pipe: Any, done: int, *_: Any) -> dict:
        step[0] = done + 1
        return {}

    model = pipe.transformer
    hooks = [
        site.module.to_q.register_forward_pre_hook(partial(count, site.name))
        for site in family_of(model).self_attentions(model)
    ]
    out = run(pipe, callback_on_step_end=advance, **options)
    for hook in hooks:
        hook.remove()
    return out, calls


def assert_scheduled(handle: Attachment, method: str, calls: Counter) -> None:
    """What was recorded is what ran, and dense at the steps that the schedule names."""
    records = handle.summary().records
    assert {key: record.calls for key, record in records.items()} == calls
    for (_, step), record in records.items():
        if method == "dense":
            assert record.why_dense == "method is dense"
        else:
            assert record.why_dense == ("first steps" if step < DENSE_STEPS else None)


@cache
def cached(family: str, name: str) -> Tensor:
    pipe = pipeline(family, stack_of(name))
    enable(pipe, name)
    out = run(pipe)
    disable(pipe, name)
    return out


@cache
def uncached(family: str, stack: int, method: str) -> Tensor:
    pipe = pipeline(family, stack)
    with attached(pipe, method, schedule=SCHEDULE):
        return run(pipe)


@pytest.mark.turns(5)
@pytest.mark.parametrize(("name", "family", "method"), cells("cache"))
def test_a_cache(name, family, method):
    pipe, stock = pipeline(family, stack_of(name)), cached(family, name)
    sparse = uncached(family, stack_of(name), method)
    with attached(pipe, method, schedule=SCHEDULE) as handle:
        enable(pipe, name)
        out, calls = counted(pipe)
    assert_scheduled(handle, method, calls)
    assert_sparse(handle, method, out, stock)
    every = STEPS * len(family_of(pipe.transformer).self_attentions(pipe.transformer))
    if (name, family) in SKIP_NOTHING:
        assert calls.total() == every
        assert torch.equal(out, sparse)
    else:
        assert calls.total() < every
        assert not torch.allclose(out, sparse, atol=1e-3)
    assert torch.equal(run(pipe), stock)
    with attached(pipe, method, schedule=SCHEDULE, kernel="reference"):
        assert (run(pipe) - out).abs().max() < 1e-5
    disable(pipe, name)


@pytest.mark.turns(5)
@pytest.mark.slow
@pytest.mark.parametrize("name", CACHES)
@both_families
def test_a_cache_that_skips_nothing_or_is_gone_leaves_no_trace(family, name):
    pipe, method = pipeline(family, stack_of(name)), "block_mixture"
    with attached(pipe, method, schedule=SCHEDULE):
        expected = run(pipe)
        enable(pipe, name, skip=False)
        assert torch.equal(run(pipe), expected)
        disable(pipe, name)
        enable(pipe, name)
        run(pipe)
        disable(pipe, name)
        assert torch.equal(run(pipe), expected)


@pytest.mark.parametrize("name", ["FirstBlockCache", "TaylorSeer", "MagCache", "SeaCache"])
def test_a_cache_under_guidance(name):
    """Two calls a step, each of which skips for itself."""
    pipe, method = pipeline("Wan"), "block_mixture"
    enable(pipe, name)
    with attached(pipe, method, schedule=SCHEDULE) as handle:
        out, calls = counted(pipe, guidance_scale=4.0)
    assert_scheduled(handle, method, calls)
    assert set(calls.values()) == {2}
    assert len(calls) < 2 * STEPS
    with attached(pipe, method, schedule=SCHEDULE, kernel="reference"):
        assert (run(pipe, guidance_scale=4.0) - out).abs().max() < 1e-5


def test_broadcast_attention_is_of_either_prompt():
    """Diffusers counts calls, not steps, where guidance makes two calls a step."""
    pipe = pipeline("Wan")
    enable(pipe, "Pyramid Attention Broadcast")
    with attached(pipe, "radial") as handle:
        _, calls = counted(pipe, guidance_scale=4.0)
    assert set(calls.values()) == {1}
    assert {key: record.calls for key, record in handle.records.items()} == calls


@pytest.mark.parametrize(("name", "family", "method"), cells("batched cache"))
def test_a_cache_that_halves_the_batch(name, family, method):
    """The negative prompt's half is left out at some steps, and attention at some of those."""
    model, given = transformer(family), inputs(family)
    text, noise = given["encoder_hidden_states"], given["hidden_states"][:1]
    times, now = [990, 900, 700, 500, 300, 100], [0]

    def denoise() -> Tensor:
        model._reset_stateful_cache()
        x = noise
        for now[0] in times:
            both = {"hidden_states": x.expand(2, -1, -1, -1, -1), "encoder_hidden_states": text}
            velocity = forward(model, both | {"timestep": torch.full((2,), float(now[0]))})
            without, with_prompt = velocity.chunk(2)
            x = x - 0.2 * (without + 4 * (with_prompt - without))
        return x

    config = FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 950),
        unconditional_batch_skip_range=4,
        unconditional_batch_timestep_skip_range=(-1, 950),
        attention_weight_callback=lambda module: 0.3,
        current_timestep_callback=lambda: now[0],
    )
    model.enable_cache(config)
    stock = denoise()
    with attached(model, method, schedule=SCHEDULE) as handle:
        out = denoise()
    assert_sparse(handle, method, out, stock)
    whole = 4.0 * 2 * wan.HEADS * (3 * 5 * 7) ** 2 * wan.HEAD_DIM
    share = {step: record.dense_flops / whole for (_, step), record in handle.records.items()}
    assert set(share.values()) == {0.5, 1.0}
    assert len(share) < len(times)
    with attached(model, method, schedule=SCHEDULE, kernel="reference"):
        assert (denoise() - out).abs().max() < 1e-5
    assert torch.equal(denoise(), stock)
    model.disable_cache()


# Guidance


def one_of(given: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: x[row : row + 1] for name, x in given.items()}


def as_one_batch(model: Any, family: str, method: str) -> None:
    given = inputs(family)
    with attached(model, method):
        both = forward(model, given)
        for row in range(2):
            alone = forward(model, one_of(given, row))
            assert (both[row : row + 1] - alone).abs().max() < 1e-5


def as_two_calls(model: Any, family: str, method: str) -> None:
    """Of other latents, text and even size at one step: nothing of one call is in the next."""
    branches = {
        "cond": one_of(inputs(family), 0),
        "uncond": one_of(inputs(family), 1),
        "another size": one_of(inputs(family, 5, 8, 12), 0),
    }
    alone = {}
    for name, given in branches.items():
        with attached(model, method), model.cache_context(name):
            alone[name] = forward(model, given)
    assert not torch.allclose(alone["cond"], alone["uncond"], atol=1e-3)
    with attached(model, method) as handle:
        for _ in range(2):
            for name, given in branches.items():
                with model.cache_context(name):
                    assert torch.equal(forward(model, given), alone[name])
            assert torch.equal(forward(model, branches["cond"]), alone["cond"])
    assert {record.calls for record in handle.records.values()} == {8}


GUIDANCE = {"guidance in one call": as_one_batch, "guidance in two calls": as_two_calls}


@pytest.mark.turns(5)
@pytest.mark.parametrize(("name", "family", "method"), cells("guidance"))
def test_guidance(name, family, method):
    GUIDANCE[name](transformer(family), family, method)


# torch.compile


COMPILE: dict[str, Callable[..., None]] = {
    "compiled blocks": lambda model, graphs: model.compile_repeated_blocks(
        backend=graphs, fullgraph=True
    ),
    "compiled model, one graph": lambda model, graphs: model.compile(
        backend=graphs, fullgraph=True
    ),
    "compiled model": lambda model, graphs: model.compile(backend=graphs),
}


# Of the same models in test_attach.py and test_hunyuan_video.py.
COMPILED_ELSEWHERE = {
    ("compiled blocks", "Wan", "radial"),
    ("compiled blocks", "Wan", "block_mixture"),
    ("compiled blocks", "Wan", "sparse_linear"),
    ("compiled blocks", "HunyuanVideo", "radial"),
    ("compiled model, one graph", "Wan", "radial"),
    ("compiled model", "HunyuanVideo", "radial"),
}


COMPILED_HERE = [cell for cell in cells("compiled") if cell.values not in COMPILED_ELSEWHERE]


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family", "method"),
    [
        cell
        for i, cell in enumerate(
            c for c in cells("compiled") if c.values not in COMPILED_ELSEWHERE
        )
        if NIGHTLY or i % 5 == 0
    ],
)
def test_compiled(dynamo, name, family, method):
    model, given, graphs = transformer(family), inputs(family), CompileCounter()
    stock = forward(model, given)
    with attached(model, method) as handle:
        out = forward(model, given)
        assert_sparse(handle, method, out, stock)
        COMPILE[name](model, graphs)
        assert (forward(model, given) - out).abs().max() < 1e-5
        assert graphs.frame_count > 0
    assert torch.equal(forward(model, given), stock)


# Refusals


def refuse_skipped_attention(model: Any, family: str, method: str) -> None:
    for options in ({}, {"skip_attention": False, "skip_attention_scores": True}):
        with pytest.raises(ValueError, match=r"AttnProcessor.* not registered"):
            skip_first(model, skip_ff=False, **options)
        with (
            attached(model, method),
            pytest.raises(ValueError, match=r"(Sparse|Trainable)Processor.* not registered"),
        ):
            skip_first(model, skip_ff=False, **options)


def refuse_one_graph(model: Any, family: str, method: str) -> None:
    with attached(model, method):
        model.compile(backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="need fullgraph=False or compile_repeated_blocks"):
            forward(model, inputs(family))


def refuse_compiled(model: Any, family: str, method: str) -> None:
    model.compile_repeated_blocks(backend="eager")
    with pytest.raises(ValueError, match="compiled already; load it again, attach, and compile"):
        attach(model, METHODS[method])


REFUSALS = {
    "LayerSkip, attention alone": refuse_skipped_attention,
    "compiled model, one graph": refuse_one_graph,
    "compiled before": refuse_compiled,
}


@pytest.mark.parametrize(("name", "family", "method"), cells("refused"))
def test_refused(dynamo, name, family, method):
    REFUSALS[name](transformer(family), family, method)


# The page


TESTED = {
    "model": THINGS,
    "model on a GPU": ON_A_GPU,
    "loaded": LOADERS,
    "loaded on a GPU": {"bitsandbytes int8": load_bitsandbytes},
    "cache": CACHES,
    "batched cache": {"FasterCache, both prompts in one call": faster},
    "guidance": GUIDANCE,
    "compiled": COMPILE,
    "refused": REFUSALS,
}


def test_every_combination_is_tested():
    for kind, tested in TESTED.items():
        assert {c.name for c in COMBINATIONS if c.kind == kind} == set(tested)
    assert {c.kind for c in COMBINATIONS} == set(TESTED)


def test_the_page_has_the_table_of_these_tests():
    assert written(PAGE.read_text()) == PAGE.read_text()
