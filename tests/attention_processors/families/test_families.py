"""Every family: where it finds the tokens, and what runs there."""

import copy
import json
import re
import runpy
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoraConfig, inject_adapter_in_model
from support.methods import FEW_METHODS as METHODS
from support.methods import RADIAL, WINDOW
from support.paths import ROOT
from support.products import NIGHTLY
from support.tiny import Case, cases, cases_of, is_here
from torch import Tensor, nn

from gen_accel import Dense, Neighborhood, Schedule, VideoShape, attach, attention
from gen_accel.attention_processors.families import (
    FAMILIES,
    REFUSED,
    SelfAttention,
    argument_names,
    by_name,
    family_named,
    family_of,
    served_classes,
)
from gen_accel.attention_processors.seam import Call, add_tap
from gen_accel.attention_processors.tokens import Tokens, seen_text
from gen_accel.pipelines import NothingSaved

CASES = {case.name: case for case in cases()}
# One of each family is run all the time.
FIRST = {case.name for family in FAMILIES for case in cases_of(family)[:1]}

pytestmark = [
    pytest.mark.turns(5),
    pytest.mark.filterwarnings("ignore::gen_accel.pipelines.SilentBranch"),
    pytest.mark.filterwarnings("ignore::gen_accel.pipelines.NothingSaved"),
    pytest.mark.usefixtures("one_thread"),
]
every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in FIRST else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
first_cases = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in FIRST else pytest.mark.nightly)
        for name, case in CASES.items()
    ],
)
# There, the methods take turns from case to case; by night all of them run in each.
some_methods = pytest.mark.parametrize(
    ("case", "method"),
    [
        pytest.param(
            case,
            method,
            id=f"{name}-{type(method).__name__}",
            marks=()
            if (number + place) % len(METHODS) == 0 and name in FIRST
            else pytest.mark.slow,
        )
        for number, (name, case) in enumerate(CASES.items())
        for place, method in enumerate(METHODS)
        if NIGHTLY or (number + place) % len(METHODS) == 0 or name in ("wan", "hunyuan_video")
    ],
)


@cache
def model_of(case: Case) -> nn.Module:
    """Shared: a test leaves it as it found it."""
    return case.build()


@cache
def pipe_of(case: Case) -> Any:
    assert case.pipeline is not None
    return case.pipeline()


def sites_of(model: nn.Module) -> list[SelfAttention]:
    return family_of(model).self_attentions(model)


def run(case: Case, model: nn.Module, grid: Sequence[int], **options: Any) -> Tensor:
    with torch.no_grad():
        return case.call(model, case.inputs(*grid, **options))


def observed(case: Case, model: nn.Module, given: dict[str, Any]) -> dict[str, list]:
    """The calls of each attention that are over the grid, with their tokens and outputs."""
    return watched(case, model, given)[1]


def watched(case: Case, model: nn.Module, given: dict[str, Any]) -> tuple[Tokens, dict[str, list]]:
    """The tokens as the family reads them from the call, and what `observed` returns."""
    family: Any = family_of(model)
    names = argument_names(type(model))
    whole: list[Tokens] = []
    found, off = {}, []

    def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
        whole.append(family.tokens(module, by_name(names, args, kwargs)))

    off.append(model.register_forward_pre_hook(read, with_kwargs=True).remove)
    for site in sites_of(model):
        calls = found[site.name] = []

        def tap(site: SelfAttention, calls: list, call: Call, out: Tensor) -> Tensor:
            if site.call in (None, call.number):  # others beside it are not over the grid
                tokens = whole[0] if site.tokens is None else site.tokens(whole[0], call)
                calls.append((call, tokens, out))
            return out

        off.append(
            add_tap(site.module, family.attention.call, partial(tap, site, calls), model=model)
        )
    try:
        with torch.no_grad():
            case.call(model, given)
    finally:
        for remove in off:
            remove()
    return whole[0], found


# Where the tokens are


@pytest.mark.slow
@every_case
def test_all_attention_over_the_grid_is_found(case):
    model = model_of(case)
    given = case.inputs(*case.grids[0])
    names = [site.name for site in sites_of(model)]
    assert len(set(names)) == len(names) > 0
    found = observed(case, model, given)
    for name, calls in found.items():
        assert calls, name
        for call, tokens, _ in calls:
            assert call.k.shape[1] == tokens.video.tokens
            whole = tokens.video.tokens
            grid = tokens.before + tokens.video.video_tokens
            assert call.q.shape[1] in (whole, whole - tokens.first, grid - tokens.first)
            assert 0 <= tokens.before <= tokens.video.text
    for site in sites_of(model):
        call, _, _ = found[site.name][0]
        assert call.q.shape[2:] == (site.heads, site.dim)


@every_case
def test_the_grid_is_that_of_the_latents(case):
    """A patch of the latents is changed, and the token that the family says it makes changes."""
    model = model_of(case)
    for grid in case.grids:
        frames, height, width = grid
        corners = [(0, 0, 0), (frames - 1, height - 1, width - 1), (frames // 2, 1, width - 2)]
        first = sites_of(model)[0].name
        whole, found = watched(case, model, case.inputs(*grid))
        assert whole.video.grid == grid
        call, tokens, _ = found[first][0]
        for frame, row, column in corners:
            given = case.inputs(*grid)
            case.poke(given, frame, row, column)
            poked, _, _ = observed(case, model, given)[first][0]
            moved = (poked.k - call.k).abs().flatten(2).amax(2)
            place = first_place(tokens, grid, frame, row, column)
            sample, token = divmod(int(moved.argmax()), moved.shape[1])
            assert (sample, token) == place
            if case.local:
                others = moved.clone()
                others[place] = 0
                assert others.max() < 1e-3 * moved.max()


def first_place(
    tokens: Tokens, grid: Sequence[int], frame: int, row: int, column: int
) -> tuple[int, int]:
    """The sample and token of the first attention, where frames may be samples."""
    _, height, width = grid
    place = row * width + column
    if tokens.video.frames == 1 and grid[0] > 1:
        return frame, tokens.before + place
    return 0, tokens.before + frame * height * width + place


# What runs there


@every_case
def test_dense_is_stock_and_detach_leaves_no_trace(case):
    model = model_of(case)
    before = [site.module.processor for site in sites_of(model)]
    for grid in case.grids:
        stock = run(case, model, grid)
        with attach(model, Dense()) as handle:
            assert torch.equal(run(case, model, grid), stock)
            assert {name for name, _ in handle.records} == {
                f"transformer.{site.name}" for site in sites_of(model)
            }
        with attach(model, WINDOW):
            run(case, model, grid)
        assert torch.equal(run(case, model, grid), stock)
    after = [site.module.processor for site in sites_of(model)]
    assert all(now is then for now, then in zip(after, before, strict=True))


@every_case
def test_a_method_that_keeps_all_pairs_is_the_stock_model(case):
    """Among other things, each query head sees the key head that the model gives it."""
    model = model_of(case)
    for grid in case.grids:
        stock = run(case, model, grid)
        with attach(model, Neighborhood((-1, -1, -1)), kernel="reference"):
            torch.testing.assert_close(run(case, model, grid), stock, rtol=1e-4, atol=1e-4)


@some_methods
def test_a_method_is_attention_over_the_grid_and_its_text(case, method):
    """At two sizes one after the other; by hand, each sample with its own text."""
    model = model_of(case)
    with attach(model, method) as handle:
        for grid in case.grids:
            found = observed(case, model, case.inputs(*grid, lengths=case.lengths))
            for site in sites_of(model):
                branch = handle.branches.get(f"transformer.{site.name}")
                for call, tokens, out in found[site.name]:
                    expected = by_hand(method.for_layer(site.layer), call, tokens, branch)
                    assert (out - expected)[~expected.isnan()].abs().max() < 1e-5
        assert handle.summary().density is not None


def by_hand(method: Any, call: Call, tokens: Tokens, branch: Any) -> Tensor:
    """(B, N, H, D), NaN where nothing is expected: in the padding of a text."""
    video, before, past, _ = tokens
    size = call.k.shape[1]
    grid = range(before, before + video.video_tokens)
    others = [place for place in range(size) if place not in grid]
    result = torch.full((len(call.q), size, *call.q.shape[2:]), torch.nan)
    for sample in range(len(call.q)):
        seen = [place for place in others if is_seen(call.mask, sample, place)]
        order = torch.tensor([*grid, *seen])
        q = torch.zeros_like(call.k[sample])
        asking = slice(size - call.q.shape[1], None)
        if call.q.shape[1] == len(grid):
            asking = slice(before, before + len(grid))
        q[asking] = call.q[sample]
        for frame in range(past):  # which have the queries of the first frame that asks
            each = video.height * video.width
            q[before + frame * each :][:each] = call.q[sample, :each]
        q, k, v = (x[order].transpose(0, 1)[None] for x in (q, call.k[sample], call.v[sample]))
        shape = VideoShape(*video.grid, len(seen))
        options = {"video": shape, "method": method, "kernel": "reference", "scale": call.scale}
        gated = method.defines("gate")  # which is zero at the start
        out = attention(q, k, v, **options, branch=None if gated else branch)
        result[sample, order] = out[0].transpose(0, 1)
    if past:  # what is beside the grid is padding
        result[:, before + len(grid) :] = torch.nan
    return result[:, asking]


def is_seen(mask: Tensor | None, sample: int, place: int) -> bool:
    if mask is None:
        return True
    of_sample = mask[sample if len(mask) > 1 else 0].reshape(-1, mask.shape[-1])[:, place]
    allowed = of_sample if mask.dtype == torch.bool else of_sample == 0
    return bool(allowed.any())


def test_a_window_larger_than_a_level_of_a_unet_is_all_of_it():
    case = CASES["stable_diffusion"]
    model, grid = model_of(case), case.grids[0]
    stock = run(case, model, grid)
    with attach(model, Neighborhood((-1, 5, 7))) as handle:
        assert not torch.allclose(run(case, model, grid), stock, atol=1e-4)
        densities = {record.density for record in handle.records.values()}
    assert min(densities) < 0.6
    assert max(densities) == 1
    larger = attach(model, Neighborhood((-1, 50, 7)))
    with larger, pytest.raises(ValueError, match="window 50 is larger than the"):
        run(case, model, grid)


def test_radial_attention_in_single_frames_warns():
    for name in ("flux", "latte", "stable_diffusion"):
        with pytest.warns(NothingSaved, match="keeps all of a single frame"):
            attach(model_of(CASES[name]), RADIAL).detach()


def test_a_grid_that_is_not_known_concerns_sparse_layers_alone():
    case = CASES["flux"]
    model, given = model_of(case), case.inputs(*case.grids[0])
    given["img_ids"][:, 0] = 1  # as of a pipeline that begins with examples
    with torch.no_grad():
        stock = case.call(model, given)
        with attach(model, Dense()):
            assert torch.equal(case.call(model, given), stock)
        with attach(model, WINDOW, schedule=Schedule(dense_layers=3)):
            assert torch.equal(case.call(model, given), stock)
        with attach(model, WINDOW), pytest.raises(ValueError, match=r"begin with image 0, .* 1"):
            case.call(model, given)
        assert torch.equal(case.call(model, given), stock)


def test_processors_that_diffusers_makes_for_image_prompts_are_refused():
    model = model_of(CASES["flux"])
    attn = model.transformer_blocks[0].attn
    own = attn.processor
    with attach(model, WINDOW), pytest.raises(ValueError, match="detach first"):
        type(attn.processor)()  # as `load_ip_adapter` does
    attn.set_processor(FluxIPAdapterAttnProcessor(32, 24))
    try:
        with pytest.raises(ValueError, match="unload_ip_adapter"):
            attach(model, WINDOW)
    finally:
        del attn.processor
        attn.set_processor(own)


@pytest.mark.skipif("cosmos3" not in CASES, reason="not in this diffusers")
def test_controls_of_cosmos3_come_before_the_video():
    family: Any = family_of(model_of(CASES["cosmos3"]))
    sizes = [(2, 3, 4), (5, 6, 7)]
    given = {"und_len": 9, "sequence_length": 9 + 24 + 210 + 3, "vision_token_shapes": sizes}
    assert family.tokens(None, given) == Tokens(VideoShape(5, 6, 7, 9 + 24 + 3), 9 + 24)


@pytest.mark.slow
@first_cases
def test_kernels_agree(case):
    model, grid = model_of(case), case.grids[0]
    with attach(model, WINDOW, kernel="reference"):
        exact = run(case, model, grid)
    with attach(model, WINDOW, kernel="gather"):
        found = run(case, model, grid)
    assert (found - exact).abs().max() < 1e-4 * exact.abs().max().clamp_min(1)
    assert not torch.allclose(found, run(case, model, grid), atol=1e-5)


@every_case
def test_neither_the_batch_nor_the_padding_matters(case):
    model, grid = model_of(case), case.grids[1]
    given = case.inputs(*grid, lengths=case.lengths)
    with attach(model, WINDOW), torch.no_grad():
        both = case.call(model, given)
        for row in range(2):
            alone = case.call(model, case.row(given, row))
            assert (alone[0] - both[row]).abs().max() < 1e-4 * both.abs().max().clamp_min(1)
        if case.lengths is not None:
            assert case.padding is not None
            other = case.inputs(*grid, lengths=case.lengths)
            case.padding(other, case.lengths)
            again = case.call(model, other)
            assert (again - both).abs().max() < 1e-4 * both.abs().max().clamp_min(1)


MASKED = [
    pytest.param(case, id=name)
    for name, case in CASES.items()
    if case.lengths is not None and family_of(model_of(case)).serves("lengths of texts")
]
masked = pytest.mark.parametrize("case", MASKED)


@masked
def test_lengths_of_texts_are_those_that_the_masks_leave(case):
    model = model_of(case)
    given = case.inputs(*case.grids[1], lengths=case.lengths)
    lengths = family_of(model).text_lengths(model, given)
    for calls in observed(case, model, given).values():
        for call, tokens, _ in calls:
            if call.mask is None:
                continue
            found = seen_text(call.mask, call.q, tokens)
            assert found is not None
            if lengths is None:  # what comes behind the padding is seen
                assert all(places[-1] == tokens.video.text - 1 for places in found)
            else:
                assert found == tuple(tuple(range(n)) for n in lengths)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in MASKED if NIGHTLY or c.id in ("hunyuan_video", "motif")]
)
def test_compiled_blocks_leave_padding_out(case):
    model = copy.deepcopy(model_of(case))
    given = case.inputs(*case.grids[1], lengths=case.lengths)
    torch._dynamo.reset()
    with torch.no_grad(), attach(model, WINDOW):
        eager = case.call(model, given)
        for site in sites_of(model):
            model.get_submodule(site.name).compile(fullgraph=True, backend="eager")
        assert (case.call(model, given) - eager).abs().max() < 1e-5
    torch._dynamo.reset()


@pytest.mark.slow
@some_methods
def test_a_step_of_training(case, method):
    if case.name == "anyflow_far":
        pytest.skip("its own attention, FlexAttention, has no backward pass on a CPU")
    model = copy.deepcopy(model_of(case)).requires_grad_(False)
    family: Any = family_of(model)
    targets = family.lora_targets["attention"]
    blocks = tuple(f"{site.name}." for site in sites_of(model))
    names = {
        target: [
            name
            for name, module in model.named_modules()
            if name.startswith(blocks) and name.endswith(f".{target}")
        ]
        for target in targets
    }
    assert all(names.values()), names
    chosen = [name for found in names.values() for name in found]
    lora = LoraConfig(r=2, target_modules=chosen, init_lora_weights=False)
    inject_adapter_in_model(lora, model)  # not all classes have `add_adapter`
    # The last block's text reaches no output in some models: not with stock attention either.
    reached = gradients(case, model)
    with attach(model, method):
        found = gradients(case, model)
    own = {name for name in found if ".processor.branch." in name}
    assert found.keys() - own == reached.keys()
    assert bool(own) == method.has_parameters
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
    assert sum(bool(gradient.any()) for gradient in found.values()) > len(found) // 2


def gradients(case: Case, model: nn.Module) -> dict[str, Tensor]:
    """Of what is trained and reaches the output."""
    model.zero_grad()
    case.call(model, case.inputs(*case.grids[1])).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_case
@pytest.mark.slow
def test_steps_without_a_pipeline_are_changes_of_the_timestep(case):
    model, grid = model_of(case), case.grids[1]
    with attach(model, WINDOW, schedule=Schedule(dense_steps=1)) as handle:
        for _ in range(2):  # runs
            for time in (900.0, 500.0, 100.0):
                run(case, model, grid, time=time)
        steps = {step: record.why_dense for (_, step), record in handle.records.items()}
    assert steps == {0: "first steps", 1: None, 2: None}


# The first of each family that has a pipeline.
PIPED = {
    found[0].name
    for family in FAMILIES
    if (found := [case for case in cases_of(family) if case.pipeline is not None])
}
piped = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in PIPED else pytest.mark.nightly)
        for name, case in CASES.items()
        if case.pipeline is not None
    ],
)


@pytest.mark.slow
@piped
def test_a_pipeline_with_dense_is_stock(case):
    pipe = pipe_of(case)
    stock = case.generate(pipe)
    with attach(pipe, Dense()):
        assert torch.equal(case.generate(pipe), stock)
    assert torch.equal(case.generate(pipe), stock)


@pytest.mark.slow
@piped
def test_a_pipeline_keeps_a_step_dense(case):
    pipe = pipe_of(case)
    stock = case.generate(pipe)
    with attach(pipe, WINDOW, schedule=Schedule(dense_start=0.5)) as handle:
        out = case.generate(pipe)
        layers = handle.summary().to_dict()["layers"]
    assert torch.isfinite(out).all()
    assert not torch.equal(out, stock)
    assert layers
    for row in layers.values():
        assert row["steps"] == {0: "sparse", 1: "dense (first steps)"}


# The list


@pytest.mark.slow
def test_every_class_has_a_case():
    tested = {type(model_of(case)).__name__ for case in CASES.values()}
    assert tested == {*filter(is_here, served_classes())}


def test_no_class_is_in_two_families_nor_refused_and_served():
    found = [name for family in FAMILIES for name in family_named(family).classes]
    assert len(set(found)) == len(found)
    assert not set(found) & set(REFUSED)


def test_every_transformer_of_diffusers_has_a_row_or_a_reason():
    found = {
        name
        for module, names in diffusers.models._import_structure.items()
        if module.startswith("transformers.")
        for name in names
    }
    assert len(found) > 40
    assert not found - {*served_classes(), *REFUSED}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_says_what_the_table_shows(name):
    family = family_named(name)
    assert family.models
    assert family.order
    assert family.kind in ("video", "frames", "image")
    assert family.lora_targets["attention"]


def test_the_page_of_models_is_up_to_date(run):
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    made = runpy.run_path(str(ROOT / "tools" / "models_page.py"))["models_page"]()
    if f"diffusers {diffusers.__version__}" not in page:
        # The last column, single files, is of the version that the page names.
        last = re.compile(r"diffusers \d\S*|\|[^|]*\|$", re.MULTILINE)
        page, made = last.sub("", page), last.sub("", made)
    assert page == made
    shown = run("models").stdout
    assert all(name in shown for name in (*FAMILIES, *REFUSED))
    told = json.loads(run("models", "--json", "-").stdout)
    assert {model["name"] for model in told} == {*served_classes(), *REFUSED}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_served_is_refused_by_name(name):
    kind = type(name, (nn.Module,), {})
    with pytest.raises(ValueError, match=f"{name} cannot be served: "):
        attach(kind(), Dense())
