"""The ComfyUI node among other nodes and in other models than Wan's, against the stand-in."""

import subprocess
import sys
import types
from contextlib import nullcontext

import pytest
import torch
from support.comfyui_host import (
    BLOCKS,
    HEADS,
    OVERRIDE,
    WIDTH,
    Patcher,
    Sampling,
    WanModel,
    latents,
    optimized_attention,
)
from support.paths import ROOT

import gen_accel
from gen_accel import Radial, SparseLinear, VideoShape

GRID = VideoShape(5, 8, 8)
METHOD = SparseLinear(critical=0.3)


@pytest.fixture
def put_on(pack):
    def put(patcher, **inputs):
        given = {"start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0}
        given |= {"dense_blocks": frozenset(), "choose": lambda video: (METHOD, 0.3)}
        return pack.override.put_on(patcher, **(given | inputs))

    return put


def named(name, **members):
    """A model class of that name, whose tokens and attention are those of the stand-in."""
    return type(name, (WanModel,), members) if name != "WanModel" else WanModel


def reordered(model, video, order, *, sparse_blocks=range(BLOCKS)):
    """`model` with our attention called by hand in its self-attention.

    Args:
        order: the model's tokens as gen_accel has them, video first; the others are not seen.
    """
    numbers = []

    def by_hand(q, k, v, *, transformer_options, mask=None):
        if q.shape != k.shape:
            return optimized_attention(q, k, v, HEADS)
        numbers.append(len(numbers))
        if numbers[-1] not in sparse_blocks:
            return optimized_attention(q, k, v, HEADS, mask=mask)
        tokens = q.shape[1]
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2)[:, :, order] for t in (q, k, v))
        out = gen_accel.attention(q, k, v, video=video, method=METHOD).transpose(1, 2).flatten(2)
        whole = torch.zeros(len(q), tokens, WIDTH)
        whole[:, order] = out
        return whole

    model.attention = by_hand
    return model


def told(patched, caplog):
    return [line.partition(": ")[2] for line in patched.clean_up(caplog)]


@pytest.mark.slow
def test_a_compiled_model_is_the_eager_one_at_each_step_and_block(put_on):
    """ComfyUI's TorchCompileModel drops every guard on transformer_options."""
    torch.compiler.reset()
    model, x = Patcher(WanModel()), latents()
    patched = put_on(model, start_percent=0.5, dense_blocks=frozenset({1}))
    steps = (0.9, 0.4, 0.7)
    eager = [patched.forward(x, sigma) for sigma in steps]
    assert not torch.allclose(eager[0], eager[1], atol=1e-4)

    def unguarded(entries):
        return ["transformer_options" not in entry.name for entry in entries]

    options = {"guard_filter_fn": unguarded}
    kept = model.model.diffusion_model
    model.model.diffusion_model = torch.compile(kept, backend="eager", options=options)
    for sigma, exact in zip(steps, eager, strict=True):
        assert torch.allclose(patched.forward(x, sigma), exact, atol=1e-6)


def test_a_compiled_model_has_the_layout_of_its_class(pack):
    compiled = torch.compile(WanModel(), backend="eager")
    assert pack.layouts.layout_of(compiled).patch == (1, 2, 2)
    assert pack.layouts.class_name(compiled) == "WanModel"


@pytest.mark.parametrize("later", [True, False], ids=["after ours", "before ours"])
def test_another_override_gets_what_stays_dense_in_either_order(put_on, later):
    x, plain, seen = latents(), Patcher(WanModel()), []

    def other(func, *args, **kwargs):
        seen.append(kwargs["transformer_options"]["block_index"])
        return func(*args, **kwargs)

    patched = put_on(plain, dense_blocks=frozenset({1})) if later else plain.clone()
    patched.model_options["transformer_options"][OVERRIDE] = other
    if not later:
        patched = put_on(patched, dense_blocks=frozenset({1}))
    exact = put_on(plain, dense_blocks=frozenset({1})).forward(x)
    assert torch.equal(patched.forward(x), exact)
    assert seen == [0, 1, 1, 2]  # cross-attention everywhere, and one block whole
    assert patched.model_options["transformer_options"] == {OVERRIDE: other}


def test_of_two_nodes_the_later_one_is_asked_first(put_on, caplog):
    x, plain = latents(), Patcher(WanModel())
    sparser = SparseLinear(critical=0.1)
    early = put_on(plain, end_percent=0.5, choose=lambda video: (sparser, 0.1))
    both = put_on(early, start_percent=0.3)
    for sigma, one in ((0.8, early), (0.6, put_on(plain)), (0.4, put_on(plain))):
        assert torch.equal(both.forward(x, sigma), one.forward(x, sigma))
    assert "6 attention calls sparse: 5 x 8 x 8 tokens, density 0.300" in told(both, caplog)


def test_a_shift_put_on_afterwards_moves_the_window(put_on):
    x, model = latents(), Patcher(WanModel())
    shifted = model.clone()
    shifted.add_object_patch("model_sampling", Sampling(shift=8.0))
    before = put_on(model, start_percent=0.5)
    before.add_object_patch("model_sampling", Sampling(shift=8.0))
    after = put_on(shifted, start_percent=0.5)
    for sigma in (0.95, 0.85, 0.6):  # half of the sampling is at 0.889
        is_dense = torch.equal(before.forward(x, sigma), model.forward(x, sigma))
        assert is_dense is (sigma == 0.95)
        assert torch.equal(before.forward(x, sigma), after.forward(x, sigma))


def test_reference_frames_are_frames_of_the_grid_that_wan_says(put_on):
    x, grid = latents(frames=3), VideoShape(5, 8, 8)
    model = WanModel(behind=128, grid_sizes=torch.Size([5, 8, 8]))
    exact = Patcher(reordered(WanModel(behind=128), grid, range(320))).forward(x)
    assert torch.allclose(put_on(Patcher(model)).forward(x), exact, atol=1e-5)


def test_the_frame_that_ref_conv_puts_in_front_is_one_of_the_grid(put_on, caplog):
    x = latents(frames=4)
    kind = type("AnimateWanModel", (WanModel,), {"ref_conv": torch.nn.Conv2d(4, WIDTH, 2, 2)})
    exact = Patcher(reordered(kind(front=64), GRID, range(320))).forward(x)
    patched = put_on(Patcher(kind(front=64)))
    assert torch.allclose(patched.forward(x), exact, atol=1e-5)
    other = put_on(Patcher(kind(front=63)))
    other.forward(x)
    assert any("319 tokens, the grid has 4 x 8 x 8" in line for line in told(other, caplog))


@pytest.mark.parametrize(
    ("name", "front", "behind", "said"),
    [
        ("HunyuanVideo", 7, 0, {}),
        ("Flux", 7, 5, {"reference_image_num_tokens": [2, 3]}),
        ("QwenImageTransformer2DModel", 7, 0, {}),
        ("AsymmDiTJoint", 0, 7, {}),
        ("WanModel_S2V", 0, 7, {}),
    ],
)
def test_tokens_beside_the_video_are_seen_as_text(put_on, name, front, behind, said):
    kind, x = named(name), latents(batch=2)
    video = VideoShape(5, 8, 8, text=front + behind)
    order = [*range(front, front + 320 + behind), *range(front)]
    exact = Patcher(reordered(kind(front, behind), video, order)).forward(x)
    patched = put_on(Patcher(kind(front, behind, **said)))
    assert torch.allclose(patched.forward(x), exact, atol=1e-5)


def test_attention_of_text_alone_before_the_blocks_stays_dense(put_on, caplog):
    kind = named("HunyuanVideo", numbers_blocks=False)
    patched = put_on(Patcher(kind(front=7)))
    patched.forward(latents())
    assert not any("sparse" in line for line in told(patched, caplog))


def mask_of(rows, dtype):
    """(B, 1, N) over 7 tokens of text and the video: True where it is seen."""
    shown = torch.ones(len(rows), 1, 327, dtype=torch.bool)
    for row, hidden in zip(shown, rows, strict=True):
        row[0, hidden] = False
    if dtype == torch.bool:
        return shown
    return torch.zeros(shown.shape, dtype=dtype).masked_fill(~shown, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=["added", "boolean"])
@pytest.mark.parametrize("rows", [([4, 5, 6],), ([5, 6], [2, 3, 4, 5, 6])], ids=["one", "two"])
def test_text_that_a_mask_hides_is_left_out(put_on, rows, dtype):
    kind, x = named("HunyuanVideo"), latents(batch=2)
    patched = put_on(Patcher(kind(front=7)))
    found = patched.forward(x, mask=mask_of(rows, dtype))
    for i, hidden in enumerate(rows if len(rows) > 1 else rows * 2):
        order = [*range(7, 327), *(n for n in range(7) if n not in hidden)]
        video = VideoShape(5, 8, 8, text=7 - len(hidden))
        exact = Patcher(reordered(kind(front=7), video, order)).forward(x[i : i + 1])
        assert torch.allclose(found[i, 7:], exact[0, 7:], atol=1e-5)


@pytest.mark.parametrize("place", [3, 20], ids=["a weight", "a token of the video"])
def test_a_mask_that_does_more_stays_dense(put_on, caplog, place):
    kind, x = named("HunyuanVideo"), latents()
    mask = torch.zeros(1, 1, 327)
    mask[..., place] = -2.0 if place == 3 else -torch.inf
    model = Patcher(kind(front=7))
    patched = put_on(model)
    assert torch.equal(patched.forward(x, mask=mask), model.forward(x, mask=mask))
    assert "3 attention calls dense: a mask" in told(patched, caplog)


class LTXBaseModel(WanModel):
    """One token for each place of the latents, and no number of the block."""

    numbers_blocks = False
    inner_dim = WIDTH

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv3d(4, WIDTH, 1)


class LTXAVModel(LTXBaseModel):
    """Video beside sound, whose attention is narrower."""

    def forward(self, x, timestep, context, control=None, transformer_options=None):
        sound = torch.ones(1, x[0, 0].numel(), WIDTH // 2)
        optimized_attention(sound, sound, sound, HEADS, transformer_options=transformer_options)
        return super().forward(x, timestep, context, control, transformer_options)


class MiniMaxH3Model(WanModel):
    """Text, key frames, references and sound before the video, and no number of the block. Text is
    refined by attention of its own before."""

    numbers_blocks = False

    def forward(self, x, timestep, context, control=None, transformer_options=None):
        options = {"transformer_options": transformer_options}
        optimized_attention(context, context, context, HEADS, **options)
        return super().forward(x, timestep, context[:, :1], control, transformer_options)


@pytest.mark.parametrize("text", [6, 400], ids=["a short text", "a text longer than the video"])
def test_all_before_a_packed_video_is_kept(put_on, caplog, text):
    x, front = latents(), text + 30
    patched = put_on(Patcher(MiniMaxH3Model(front=front)), dense_blocks=frozenset({1}))
    packed = torch.cat([x.flatten(), torch.ones(9)]).view(1, 1, -1)
    context = torch.ones(1, text, WIDTH)
    given = {"context": context, "latent_shapes": [list(x.shape), [1, 1, 9]]}
    found = patched.forward(packed, **given)
    order = [*range(front, front + 320), *range(front)]
    video = VideoShape(5, 8, 8, text=front)
    exact = reordered(MiniMaxH3Model(front=front), video, order, sparse_blocks={0, 2})
    right = Patcher(exact).forward(packed, **given)
    assert torch.allclose(found, right, atol=1e-5)
    lines = told(patched, caplog)
    assert "2 attention calls sparse" in " ".join(lines)
    assert "1 attention calls dense: dense_blocks" in lines


def test_what_outlives_a_block_is_not_in_comfyui_s_record_of_it(pack, put_on, monkeypatch):
    paused, theirs = [], types.ModuleType("comfy")
    theirs.model_prefetch = types.ModuleType("comfy.model_prefetch")
    theirs.model_prefetch.pause_malloc_graph = lambda: paused.append(1) or nullcontext()
    monkeypatch.setitem(sys.modules, "comfy", theirs)
    monkeypatch.setattr(pack.host, "_pause", pack.host._pause.__wrapped__)
    put_on(Patcher(WanModel()), dense_blocks=frozenset({1})).forward(latents())
    assert len(paused) == 2


@pytest.mark.parametrize("kind", [LTXBaseModel, LTXAVModel])
def test_blocks_without_a_number_are_counted(put_on, caplog, kind):
    x = latents()[..., :8, :8]
    patched = put_on(Patcher(kind()), dense_blocks=frozenset({1}))
    for _ in range(2):
        exact = Patcher(reordered(LTXBaseModel(), GRID, range(320), sparse_blocks={0, 2}))
        packed = torch.cat([x.flatten(), torch.ones(9)]).view(1, 1, -1)
        found = patched.forward(packed, latent_shapes=[list(x.shape), [1, 1, 9]])
        assert torch.allclose(found, exact.forward(x), atol=1e-5)
    lines = told(patched, caplog)
    assert "2 attention calls dense: dense_blocks" in lines
    assert any("something else than the video" in line for line in lines) is (kind is LTXAVModel)


def test_blocks_are_not_counted_where_a_node_replaces_some(put_on, caplog):
    model, x = Patcher(LTXBaseModel()), latents()[..., :8, :8]
    model.model_options["transformer_options"]["patches_replace"] = {
        "dit": {("double_block", 0): 1}
    }
    patched = put_on(model, dense_blocks=frozenset({1}))
    assert torch.equal(patched.forward(x), model.forward(x))
    assert any("number of the block is not known" in line for line in told(patched, caplog))


def test_the_patch_of_cosmos_is_of_two_numbers(pack):
    kind = type("MiniTrainDIT", (), {"patch_temporal": 1, "patch_spatial": 2})
    assert pack.layouts.layout_of(kind()).grid((1, 16, 5, 9, 16)) == (5, 5, 8)


def test_an_image_is_one_frame(pack):
    for size in (2, [2, 2]):
        model = type("Flux", (), {"patch_size": size})()
        assert pack.layouts.layout_of(model).grid((1, 16, 9, 16)) == (1, 5, 8)


def test_a_single_frame_that_is_kept_whole_stays_dense(put_on, caplog):
    x, model = latents(frames=1), Patcher(WanModel())
    patched = put_on(model, choose=lambda video: (Radial(), Radial().density(video)))
    assert torch.equal(patched.forward(x), model.forward(x))
    assert "3 attention calls dense: the method keeps all of a single frame" in told(
        patched, caplog
    )


def test_a_model_that_is_not_known_is_named_and_stays_dense(put_on, caplog, monkeypatch):
    kind = type(
        "HiDreamImageTransformer2DModel", (torch.nn.Module,), {"forward": WanModel.forward}
    )
    model, x = Patcher(WanModel()), latents()
    exact = model.forward(x)
    model.model.diffusion_model.__class__ = type(kind.__name__, (kind,), dict(vars(WanModel)))
    patched = put_on(model)
    [line] = [record.getMessage() for record in caplog.records]
    assert line == (
        "Sparse Attention (gen_accel): the order of tokens in HiDreamImageTransformer2DModel "
        "is not known; it stays dense"
    )
    assert torch.equal(patched.forward(x), exact)


BARE = """
import importlib.abc, sys

class Without(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
import torch
from support.comfyui_host import Patcher, WanModel, import_pack

pack = import_pack()
x = torch.randn(1, 4, 5, 16, 16)
for name, keep in (("sparse_linear", 0.3), ("radial", 0.5)):
    choose = pack.methods.Asked(name, keep)
    options = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": frozenset()}
    patched = pack.override.put_on(Patcher(WanModel()), choose=choose, min_tokens=0, **options)
    print(patched.forward(x).shape)
"""


@pytest.mark.slow
def test_the_node_needs_torch_numpy_and_safetensors_alone():
    needed = "imageio,imageio_ffmpeg,av,diffusers,matplotlib,accelerate,peft,transformers,rich"
    needed += ",huggingface_hub,typer,PIL,scipy,torchmetrics,einops"
    command = [sys.executable, "-c", BARE, needed]
    where = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": ""}
    done = subprocess.run(command, env=where, capture_output=True, text=True, timeout=600)
    assert done.stdout.split("\n")[:2] == ["torch.Size([1, 320, 32])"] * 2, done.stderr
