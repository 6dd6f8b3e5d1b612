"""Piecewise attention: exact where it matters most, and the rest pooled in the same softmax.

References:
    Li et al., "PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion Transformers",
    2026, https://arxiv.org/abs/2602.01077; public code xie-lab-ml/piecewise-sparse-attention at
    8604494 (MIT).
    "Sol-Attn", 2026, https://arxiv.org/abs/2607.24027; public kernels of NVlabs/Sana, branch
    sol-engine at 44b9354 (Apache-2.0).
    The golden cases hold the answers of both. The rest around mean queries and the score by pooled
    attention are our own. Scores by all keys have relatives in Zhou et al., "SVG-EAR", 2026,
    https://arxiv.org/abs/2603.08982, and in SGLang's SubBlock: docs/methods/piecewise.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from gen_accel.attention_processors.methods.blocks import (
    Always,
    Around,
    Order,
    Pool,
    Tiles,
    centre_of_call,
    check_always,
    orders_around,
    rest_of,
    smooth_qk,
)
from gen_accel.attention_processors.methods.scores import (
    BlockSelection,
    By,
    Deviation,
    Score,
    Scores,
    chosen,
)
from gen_accel.kernels.base import BlockFacts, Runner, name_of, scale_of, scale_or_default
from gen_accel.kernels.dispatch import native_serves
from gen_accel.kernels.native import rest as native_rest
from gen_accel.kernels.rest import block_facts
from gen_accel.method import RunPlan, Step, plan_once
from gen_accel.parsing import Finite, Share, check_options
from gen_accel.plan import ORDERS, Centre, Plan, Rest, numbers_on, plan_of_call
from gen_accel.registry import PRESET, RULES
from gen_accel.video import VideoShape

Select = Literal["topk", "threshold"]
Asked = Literal["auto", Score]

# Added to the variance of scores, as in Sol-Attn's code: 1e-6 of their base-2 logarithms.
FLOOR = 1e-6 * math.log(2) ** 2
LONG = 1 << 14  # tokens above which `plan` takes seconds by the method's own score


@dataclass(frozen=True)
class Piecewise(BlockSelection):
    """Exact attention to the blocks that score best, and to all others by pooled keys and values.

    Query and key blocks are compact boxes of the video. A query block keeps the key blocks that
    score best. Each of the others takes part in the same softmax as one key with one value: see
    `gen_accel.plan.Rest`. Text blocks are kept by all, and text queries keep all.

    Score of key block j for the mean query m_i of a query block, at the scale s of the model:
        "spread": ln sum_t exp(s m_i . k_t) over the tokens t of the block.
        "loss": "spread" plus half the logarithm of the values' variance in the block, the error of
            replacing them by one value.
        "pooled": ln of the share of the block in the softmax of each query of block i over all
            blocks as the rest pools them, the mean over the queries, plus the same as in "loss".
        "mean": s m_i . k_j with the mean key k_j.
        "norm": "mean" plus ln ||sum_t (k_t - k_j)^T v_t||, PISA's `use_bias`.

    Selection:
        "topk": the best, as many as `budget` says.
        "threshold": the scores above mean + tau sigma of the query block's scores over the video's
            key blocks, Sol-Attn's rule. sigma is their own ("exact"), or computed for s m_i . k_j
            with the channels of the mean keys taken as uncorrelated ("diag").

    PISA is `Piecewise(density, centre="key", order="first", score="mean", tile="raster")`, and
    Sol-Attn `Piecewise(select="threshold", centre="key", score="mean", band=1, tile="raster")`.

    Unlike PISA: text, batches with texts of several lengths, any head dim and dtype, gradients;
    means are fp32. Unlike Sol-Attn: means and variances are fp32 and over the video's blocks
    alone, as text keys are outliers that would move every threshold; text queries see all.

    Args:
        critical: share of the key blocks that are exact under "topk", in (0, 1]; at least one is.
            Or a share for each step, (0.5, 0.3, 0.2), from the first of the run on, dense ones
            included; the last holds for all further steps, and where no step is known.
        budget: what shares the exact blocks. "row": each query block has as many. "mass": each has
            the fewest that hold `mass` of its attention by the scores. "head": a head has the best
            of all its pairs of blocks, and each query block at least one.
        mass: share of a mean query's attention that budget="mass" keeps, in (0, 1].
        alike: blocks whose tokens have a mean cosine of at most this are exact for all, as no mean
            represents them. The mean key is subtracted first. None: no blocks are.
        select: how the exact blocks are found, by their number ("topk") or by a bound of the
            score ("threshold"); see above.
        score: how much a block is taken to matter to a query block; see above. "auto" is "pooled"
            on the CPU, where it comes with the rest, if each query block keeps as many and the
            rest is around queries. Elsewhere it is "loss".
        tau: standard deviations above the mean; finite. About 0.2 of the blocks lie above 1.
        tau_end: tau of the last sparse step; tau changes towards it in equal steps. None: no
            change.
        threshold: how sigma is found, from the scores themselves ("exact") or from the channels
            of the keys ("diag"); see above.
        band: key blocks within this distance of the query block, in the order of slots, are exact:
            0 for its own alone, 1 for the neighbours too. None: scores decide.
        sink: the first frames, or (first token, tokens), whose keys are exact for all queries.
        sink_queries: the queries of the sink keep all, too.
        rest: what stands for the other blocks; None drops them.
        centre: what the rest is pooled around: the mean "query" of each query block, or the mean
            "key". "auto" is "query". On GPUs, if the budget fixes how much is kept ("row" or
            "head", without `alike`), `gen_accel.kernels.rest_cost.centre_of` chooses by the size
            of the call and the density. For training name one: a file of a LoRA that was trained
            on a GPU keeps "auto".
        order: order of the expansion of the rest around its mean. "first" adds a slope of the
            values; "second", around queries alone, adds the variance of a block's keys too. "auto"
            around queries: "second", and "first" in runs of tokens, whose queries lie far from
            their mean. Around keys: "zeroth".
        tile: the box of the smaller block as (frames, rows, columns); blocks then hold as many
            tokens as it. "auto": of all boxes with as many tokens as the smaller block, the one
            that pads the grid least, and then the most even. "raster": blocks are runs of tokens.
            Or a box for each layer: layers past the last box take the last, and estimates take the
            first.
        block_q, block_k: tokens in a query and in a key block.
    """

    critical: Share | tuple[Share, ...] = field(
        default=RULES[PRESET].critical, metadata={"told": lambda one: one.select == "topk"}
    )
    select: Select = "topk"
    tau: Finite = 1.0
    tau_end: Finite | None = None
    threshold: Deviation = "diag"
    band: int | None = None
    sink: int | tuple[int, int] = 0
    sink_queries: bool = False
    score: Asked = "auto"
    rest: Pool | None = "means"
    centre: Around = "query"
    order: Order = "auto"
    tile: Tiles = "auto"
    block_q: int = 64
    block_k: int = 64
    budget: By = "row"
    mass: Share | None = None
    alike: float | None = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.critical == ():
            raise ValueError("critical must be a share, or one or more, a share for each step")
        if self.centre == "auto" and self.order in ORDERS:
            raise ValueError(
                f"order={self.order!r} is for centre={ORDERS[self.order]!r}, got centre='auto'"
            )
        rest_of(self.rest, "query" if self.centre == "auto" else self.centre, self.order)
        check_always(self.always)
        self.check_selection()
        ignored = {
            "threshold": ("critical", "budget", "alike"),
            "topk": ("tau", "tau_end", "threshold"),
        }
        for name in ignored[self.select]:
            if getattr(self, name) != getattr(Piecewise, name):
                other = "topk" if self.select == "threshold" else "threshold"
                raise ValueError(
                    f"{name} is for select={other!r}, got {name}={getattr(self, name)!r} and "
                    f"select={self.select!r}"
                )

    @classmethod
    def candidates(
        cls, video: VideoShape, *, tile: Tiles | None = None, profile: str = ""
    ) -> Sequence["Piecewise"]:
        tile = "auto" if tile is None else tile
        return [cls(share, tile=tile) for share in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)]

    @classmethod
    def keeping(cls, share: float, video: VideoShape) -> "Piecewise":
        return cls(share)

    def together(self, methods: Sequence["Piecewise"]) -> "Piecewise | None":
        """One method that gives each head its own of `methods`, if they differ by `critical`
        under budget="row" alone; None if they differ by more."""
        if any(one.select != "topk" or one.budget != "row" for one in methods):
            return None
        if {replace(one, critical=self.critical) for one in methods} != {self}:
            return None
        options = {one.name: getattr(self, one.name) for one in fields(Piecewise)}
        shares = tuple(one.criticals[0] for one in methods)
        return PiecewiseHeads(**options, shares=shares)

    def for_device(self, device: torch.device) -> "Piecewise":
        """Return the method with the score and the centre that every call on a device uses, if
        they agree."""
        on_gpu = device.type == "cuda"
        centre = "query" if self.centre == "auto" and not on_gpu else self.centre
        return replace(self, score=self.score_on(device), centre=centre)

    @property
    def changes_by(self) -> Literal["", "progress", "number"]:
        if isinstance(self.critical, tuple):
            return "number"
        return "" if self.tau_end is None else "progress"

    def at(self, step: Step) -> "Piecewise":
        if isinstance(self.critical, tuple):
            return _with(self, critical=self.critical[min(step.number, len(self.critical) - 1)])
        if self.tau_end is None:
            return self
        tau = self.tau + (self.tau_end - self.tau) * step.progress
        return _with(self, tau=tau, tau_end=None)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: RunPlan
    ) -> Tensor:
        scale, name = scale_of(kernel, q), name_of(kernel)
        if (
            isinstance(kernel, Runner)
            and kernel.takes_answers
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled(q.device.type)
            and self.score_on(q.device) in native_rest.SCORES
            and self._chosen_by_native(q, k, v, name)
        ):
            base = self._base(video, q.device)
            if native_rest.in_one_pass(q, k, v, base, scale=scale, kernel=name):
                out, plan = self._choose(q, k, v, base, video, scale, name, attends=True)
                return kernel.answered(out, plan, "int8" if name == "int8" else "native")
        rest = self._rest(video) if self.centre == "query" else None
        slots = self.layout(video, q.device).slots
        facts = block_facts(q, k, v, slots, rest, scale=scale, kernel=name)
        plan = self.plan_for(q, k, v, video=video, scale=scale, kernel=name, facts=facts)
        if facts is not None:
            plan.hand_on(q, k, v, scale, facts)
        return kernel(q, k, v, plan)

    @property
    def _is_plain(self) -> bool:
        """Whether each query block keeps as many blocks, and pools the others around its mean."""
        selection = self.select, self.budget, self.alike, self.rest
        return selection == ("topk", "row", None, "means") and self.centre != "key"

    def score_on(self, device: torch.device) -> Score:
        """Resolve the score "auto" for calls on a device."""
        if self.score != "auto":
            return self.score
        return "pooled" if self._is_plain and device.type == "cpu" else "loss"

    def _chosen_by_native(self, q: Tensor, k: Tensor, v: Tensor, kernel: str) -> bool:
        return self._is_plain and native_serves(kernel, q, k, v)

    def _base(self, video: VideoShape, device: torch.device) -> Plan:
        """Plan of the pairs that are kept whatever the scores, with the rest around queries."""
        layout = self.layout(video, device)
        return plan_of_call(layout.slots, layout.always[None, None], rest=self._rest(video))

    def _choose(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        base: Plan,
        video: VideoShape,
        scale: float,
        kernel: str,
        *,
        attends: bool,
    ) -> tuple[Tensor, Plan]:
        """Choose blocks in C++, and compute the answer in the same pass if `attends`."""
        layout = self.layout(video, q.device)
        counts = tuple(layout.count(share) for share in self.criticals)
        out, keep = native_rest.choosing(
            *(q, k, v, base, layout.is_ranked),
            numbers_on(counts, q.device).expand(q.shape[1]),
            score=self.score_on(q.device),
            scale=scale,
            kernel=kernel,
            attends=attends,
        )
        entries = layout.entries + max(counts) * layout.video_rows
        return out, plan_of_call(layout.slots, keep, entries=entries, rest=base.rest)

    def _rest(self, video: VideoShape, centre: Centre = "query") -> Rest | None:
        flat = self.tile == "raster"
        return rest_of(self.rest, centre, self.order, flat=flat, tokens=video.video_tokens)

    @property
    def always(self) -> Always:
        return Always(self.band, self.sink, self.sink_queries)

    @plan_once
    def plan(self, video: VideoShape, device: torch.device) -> Plan:
        """Plan of the blocks that smooth random q and k keep, for pictures and estimates. Of
        a long clip mean keys are scored: as many blocks are kept, and a look at each key takes
        seconds."""
        q, k = smooth_qk(video)
        is_long = video.tokens > LONG and (self.select, self.budget) == ("topk", "row")
        by = replace(self, score="mean") if is_long else self
        return by.plan_for(q, k, k, video=video).to(device)

    @torch.no_grad()
    def thresholds(
        self,
        q: Tensor,
        k: Tensor,
        *,
        video: VideoShape,
        kernel: str = "auto",
        scale: float | None = None,
    ) -> Tensor:
        """Thresholds that scores of kept blocks exceed under "threshold", (B, H, Kq) fp32."""
        scale = scale_or_default(scale, q)
        layout = self.layout(video, q.device)
        with torch.autocast(q.device.type, enabled=False):
            kind = self.score_on(q.device)
            by = Scores(q, k, layout, kind=kind, scale=scale, kernel=kernel)
            cuts = [self._cut(by, by.of(some), some) for some in by.groups()]
            return torch.cat(cuts, 1)[..., 0] + by.left_off()

    @torch.no_grad()
    def plan_for(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        video: VideoShape,
        scale: float | None = None,
        kernel: str = "auto",
        facts: BlockFacts | None = None,
    ) -> Plan:
        """Plan of the blocks that q and k, (B, H, N, D), keep exactly.

        Args:
            v: for the scores "loss", "pooled" and "norm", which look at values too. Without, the
                first two take values to vary equally, and "norm" is an error.
            scale: of their products; 1 / sqrt(D) without.
            facts: of these tensors, if they are known.
        """
        layout, entries, rest, listed = self.layout(video, q.device), None, None, None
        scale = scale_or_default(scale, q)
        kind = self.score_on(q.device)
        if kind == "pooled" and v is not None and self._chosen_by_native(q, k, v, kernel):
            base = self._base(video, q.device)
            if native_rest.chooses(base, scale):
                return self._choose(q, k, v, base, video, scale, kernel, attends=False)[1]
        around = self._rest(video) if self.rest is not None and self.centre != "key" else None
        with torch.autocast(q.device.type, enabled=False):  # scores are fp32, whatever q and k are
            by = Scores(
                q,
                k,
                layout,
                v=v,
                kind=kind,
                scale=scale,
                rest=around,
                kernel=kernel,
                facts=facts,
            )
            if self.select == "topk":
                keep, _, entries, listed = chosen(by, q, self)
            else:
                keep = layout.always.expand(*by.shape[:2], -1, -1).clone()
                for some in by.groups():
                    scores = by.of(some)
                    layout.add(keep[:, some], scores > self._cut(by, scores, some))
                    del scores  # free before the next heads' scores
        if self.rest is not None:
            orders = orders_around(self.order, flat=self.tile == "raster")
            centre = centre_of_call(self.centre, orders, q, layout.slots, entries)
            rest = self._rest(video, centre)
        return plan_of_call(layout.slots, keep, entries=entries, rest=rest, listed=listed)

    def _cut(self, by: Scores, scores: Tensor, some: slice) -> Tensor:
        """Thresholds (B, h, Kq, 1) of scores as `by` gives them."""
        variance = by.variance(scores, some, self.threshold)
        return scores.mean(-1, keepdim=True) + self.tau * (variance + FLOOR).sqrt()


@dataclass(frozen=True)
class PiecewiseHeads(Piecewise):
    """`Piecewise` with a density for each head, whose blocks are chosen at once.

    Args:
        shares: `critical` of each head.
    """

    shares: tuple[float, ...] = ()

    @property
    def criticals(self) -> tuple[float, ...]:
        return self.shares


@lru_cache(maxsize=512)
def _with(method: Piecewise, **options: float | None) -> Piecewise:
    return replace(method, **options)
