"""What a model answers in one process, and in each of two that share a forward pass."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ContextParallelInput
from support import hunyuan, wan
from support.methods import FEW_METHODS as METHODS
from support.methods import LINEAR, MIXTURE, RADIAL
from support.tiny import Case, cases
from torch import Tensor

from gen_accel import (
    BlockMixture,
    Dense,
    Reuse,
    Schedule,
    SparseLinear,
    VideoShape,
    attach,
    calibrate,
)
from gen_accel.attention_processors.context_parallel import context_parallel_plan, exchanged
from gen_accel.attention_processors.families import family_named, family_of
from gen_accel.attention_processors.seam import Call, Parallel, add_tap
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.kernels.native import build

hunyuan_family = family_named("hunyuan_video")

PROCESSES = 2


ODD = (5, 9, 11)  # in tokens, of which two processes do not hold equally many


TINY = {case.name: case for case in cases()}


@dataclass(frozen=True)
class Run:
    """One model, called once, or at two steps.

    Args:
        model: a case of `tiny`.
        grid: without one, the first of the case, with a row more where it would be odd.
        change: of the model before anything else.
        attach_last: after `enable_parallelism`.
        plan: ours or diffusers' without.
        text: tokens that the text is cut to.
        again: another call follows, at a later step, and is what counts.
    """

    model: str
    method: Any
    grid: tuple[int, int, int] | None = None
    config: dict[str, Any] = field(default_factory=lambda: {"ulysses_degree": PROCESSES})
    schedule: Schedule | None = None
    change: Callable[[Any], Any] = lambda model: model
    attach_last: bool = False
    gradients: bool = False
    plan: dict[str, Any] | None = None
    text: int | None = None
    again: bool = False


def even(case: Case) -> tuple[int, int, int]:
    frames, rows, columns = case.grids[0]
    return frames, rows + frames * rows * columns % 2, columns


def plan_of(name: str) -> dict[str, Any] | None:
    try:
        return context_parallel_plan(TINY[name].build())
    except ValueError:
        return None


def three_heads(model: Any) -> Any:
    return wan.transformer(num_attention_heads=3, num_layers=1)


def longer(model: Any) -> Any:
    """With temporal frequencies of its own, as techniques for longer video give it."""
    family: Any = family_of(model)
    family.set_temporal_frequencies(model, family.temporal_frequencies(model) / 2)
    return model


def text_too() -> dict[str, Any]:
    """Of HunyuanVideo, with each process holding a half of the text too."""
    plan = hunyuan_family.context_parallel(hunyuan.transformer())
    tokens = ContextParallelInput(split_dim=1, expected_dims=3)
    return plan | {
        "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens}
    }


ANYTHING = {"ulysses_degree": PROCESSES, "ulysses_anything": True}


PER_HEAD = SparseLinear(critical=0.2, block_q=16, block_k=16, combine="alpha")


SHARES = BlockMixture(chunks=(3, 4, 6), scope="head_global", block=16)


HUNYUAN = "hunyuan_video"


FOUND = {name: plan_of(name) for name in TINY}


SERVED = [name for name, plan in FOUND.items() if plan]


# Elsewhere diffusers splits what it does not give the right gradient.
TRAINED = [name for name in SERVED if name.startswith(("wan", "chronoedit", HUNYUAN))]


def run_of(name: str, method: Any, **options: Any) -> Run:
    """With unequal parts where more than the grid is split, as the rest of it is odd here."""
    plan = FOUND[name]
    assert plan is not None
    parts = [part for part in plan.values() if isinstance(part, dict)]
    if name.startswith("minimax") or any("encoder_hidden_states" in part for part in parts):
        return Run(name, method, config=ANYTHING, **options)
    return Run(name, method, gradients=name in TRAINED, **options)


RUNS = {
    # The methods take turns from model to model.
    f"{name} {type(method).__name__}": run_of(name, method, attach_last=bool(place % 2))
    for number, name in enumerate(SERVED)
    for place, method in enumerate(METHODS)
    if name in ("wan", HUNYUAN) or place == number % len(METHODS)
}


RUNS |= {f"{name} Dense": run_of(name, Dense()) for name in SERVED}


RUNS |= {
    "parameters of each head": Run("wan", PER_HEAD, gradients=True),
    "a scope of one head": Run("wan", SHARES),
    "dense layers": Run(HUNYUAN, RADIAL, schedule=Schedule(dense_layers=(1, 2))),
    "other frequencies": Run(HUNYUAN, RADIAL, change=longer),
    "halves of the text": Run(HUNYUAN, RADIAL, gradients=True, plan=text_too(), text=8),
    "halves of the text, dense": Run(HUNYUAN, Dense(), plan=text_too(), text=8),
    "text first": Run("flux", RADIAL, gradients=True, text=4),
    "text first, dense": Run("flux", Dense(), gradients=True, text=4),
    "a memory": Run(HUNYUAN, Reuse(LINEAR, residual=False), again=True),
    "a memory of a dense step": Run(
        "wan", Reuse(LINEAR), schedule=Schedule(dense_steps=1), again=True
    ),
    "odd": Run("wan", LINEAR, ODD, ANYTHING, change=three_heads),
    "odd, parameters of each head": Run("wan", PER_HEAD, ODD, ANYTHING, change=three_heads),
    "odd, all of the text": Run(HUNYUAN, MIXTURE, ODD, ANYTHING),
    "odd, halves of the text": Run(HUNYUAN, RADIAL, ODD, ANYTHING, plan=text_too()),
}


REFUSED = {
    "ring_degree=2, .*: use ulysses_degree": Run("wan", RADIAL, config={"ring_degree": 2}),
    "does not divide 3 heads": Run("wan", RADIAL, change=three_heads),
    "its exchange has no gradient": Run("wan", RADIAL, config=ANYTHING, gradients=True),
    "scope='overall', .*: use 'head_global'": Run("wan", replace(SHARES, scope="overall")),
    "scope='block'": Run("wan", replace(SHARES, scope="block")),
    "keys of the 550 tokens of .*use the cp_plan": Run("wan", RADIAL, plan={}),
}


def outcome(run: Run, dtype: torch.dtype, *, parallel: bool) -> dict[str, Any]:
    """The output, with gradients the sum of those of all processes, and the shape of the queries
    that the first attention was called with."""
    case = TINY[run.model]
    model: Any = run.change(case.build()).to(dtype)
    lengths = {} if case.lengths is None else {"lengths": case.lengths}
    given = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in case.inputs(*(run.grid or even(case)), **lengths).items()
    }
    if run.text is not None:
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            if name in given:
                given[name] = given[name][:, : run.text]
        if "txt_ids" in given:
            given["txt_ids"] = given["txt_ids"][: run.text]
    plan = context_parallel_plan(model) if run.plan is None else run.plan
    enable = partial(
        model.enable_parallelism, config=ContextParallelConfig(**run.config), cp_plan=plan
    )
    if parallel and run.attach_last:
        enable()
    handle = attach(model, run.method, schedule=run.schedule)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for branch in handle.branches.values():
            for parameter in branch.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) / 2)
    if parallel and not run.attach_last:
        enable()
    shapes: list[tuple] = []
    family: Any = family_of(model)
    site = family.self_attentions(model)[0].module
    add_tap(site, family.attention.call, partial(noted, shapes))
    with torch.set_grad_enabled(run.gradients):
        out = case.call(model, given)
        if run.again:
            given["timestep"] = given["timestep"] * 0.9
            out = case.call(model, given)
    found: dict[str, Any] = {"out": out.detach(), "shape": shapes[0]}
    found["flops"] = sum(record.dense_flops for record in handle.records.values())
    if run.gradients:
        out.square().mean().backward()
        parts = (torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
        found["gradient"] = torch.cat([part.flatten() for part in parts])
        if parallel:
            dist.all_reduce(found["gradient"])
    return found


def noted(shapes: list[tuple], call: Call, out: Tensor) -> Tensor:
    shapes.append(tuple(call.q.shape))
    return out


def joint(rank: int) -> dict[str, Tensor]:
    """One call, with text before the video and a mask of the keys of this process: its output and
    gradient, and what of those of all is of this process."""
    video = VideoShape(2, 2, 4, text=6)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn((3, 2, video.tokens, 2, 8), generator=generator, dtype=torch.float64)
    seen = torch.ones(2, video.tokens, dtype=torch.bool)
    seen[1, 4:6] = False
    half = torch.cat([torch.arange(6).chunk(2)[rank], 6 + torch.arange(16).chunk(2)[rank]])

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask[:, None, None]).transpose(1, 2)

    def attend(call: Call) -> Tensor:
        assert call.parallel is None
        assert call.heads == slice(rank, rank + 1)
        assert call.tokens == video.tokens
        return attention(call.q, call.k, call.v, call.mask)

    config = ContextParallelConfig(ulysses_degree=PROCESSES)
    names = ("ring", "ulysses")
    mesh = dist.init_device_mesh("cpu", (1, PROCESSES), mesh_dim_names=names)
    config.setup(rank, PROCESSES, torch.device("cpu"), mesh)
    q, k, v = own = whole[:, :, half].clone().requires_grad_()
    parallel = Parallel(config, attention)
    call = Call(q, k, v, 1.0, lambda: q, [], seen[:, half], len(half), parallel=parallel)
    tokens = Tokens(video, before=6)
    out = exchanged(call, tokens, attend, method=RADIAL, text_split=True)
    out.square().sum().backward()

    whole.requires_grad_()
    wanted = attention(whole[0], whole[1], whole[2], seen)
    wanted.square().sum().backward()
    assert own.grad is not None
    assert whole.grad is not None
    return {
        "out": out.detach(),
        "wanted": wanted.detach()[:, half],
        "gradient": own.grad,
        "wanted gradient": whole.grad[:, :, half],
    }


def fitted() -> None:
    pipe = wan.pipeline()
    attach(pipe, LINEAR)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=PROCESSES))
    sizes = {"num_frames": 13, "height": 64, "width": 64, "max_sequence_length": 16}
    calibrate(pipe, ["a red square moves right"], num_inference_steps=1, **sizes)


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "none"


def gather_any(parts: list[Tensor], own: Tensor, group: Any = None) -> None:
    """As NCCL gathers: gloo takes parts of one size only."""
    parts[dist.get_rank(group)].copy_(own)
    for source, part in enumerate(parts):
        dist.broadcast(part, source, group)


def process(rank: int, folder: Path, names: list[str]) -> None:
    """Save what this process finds in the runs of those names, and in all that is refused."""
    torch.set_num_threads(1)
    # enable_parallelism divides by the number of accelerators, which is 0 without any.
    torch.accelerator.device_count = lambda: 1
    dist.all_gather = gather_any
    build.is_built = lambda: False  # as in the process that they are held to
    where = f"file://{folder / 'rendezvous'}"
    # Of "gloo" alone diffusers takes the GPU of a torch for CUDA, also where there is none.
    dist.init_process_group("cpu:gloo", init_method=where, rank=rank, world_size=PROCESSES)
    results: dict[str, Any] = {
        name: outcome(RUNS[name], torch.float32, parallel=True) for name in names
    }
    results |= {
        rule: refusal(partial(outcome, run, torch.float32, parallel=True))
        for rule, run in REFUSED.items()
    }
    results["joint"] = joint(rank)
    results["fitted"] = refusal(fitted)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
