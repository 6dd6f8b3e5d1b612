"""Attention of a video that is made chunk by chunk, each of which sees earlier ones from a cache.

A batch of the transformer is chunks: each row holds the latents of one, with its own timestep and
its own text, and positions that begin at 0. Only the self-attention looks beyond the row:

    softmax over [sink | middle | window | the chunk itself]

A text that attends with the video stays with its chunk: of earlier chunks, the tokens of the video
are seen and no text.

Keys are kept as the model's own rotary leaves them, at positions inside their chunk, and turned
back in time by the age of the chunk when they are seen. All that is older than the window lies
right behind it, whatever its true age, so that a video of any length stays among the distances
that training showed.

Causal models such as CausVid (Yin et al., 2024, https://arxiv.org/abs/2412.07772) and Self-Forcing
(Huang et al., 2025, https://arxiv.org/abs/2506.08009) have such caches of keys and values. Ages
that end at the window are ours, and so is the middle. It is chosen once, when a chunk leaves the
window: as in `Piecewise`, what is unlike its surroundings stays exact, and the rest comes back as
a mean.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_accel.attention_processors.attached.attachment import attachments_of, extend_attention
from gen_accel.attention_processors.attached.layer import AttentionExtension, MethodRun
from gen_accel.attention_processors.families import Family, family_for
from gen_accel.attention_processors.tokens import Tokens, by_text, together
from gen_accel.pipelines.long_video.technique import Remembered, query_blocks
from gen_accel.pipelines.zones import CELL, Middle, Zones, salient_tokens
from gen_accel.plan import Plan
from gen_accel.video import VideoShape

Turn = Callable[[Tensor, int], Tensor]  # keys (B, H, N, D), so many frames back in time
Texts = Sequence[Sequence[int]] | None  # see `MethodRun.texts`


class Seen(NamedTuple):
    """Keys and values (B, H, N, D), each counted `exp(logs)` times, (N,); None: all once."""

    keys: Tensor
    values: Tensor
    logs: Tensor | None = None


class History:
    """Earlier chunks of one attention, as the next chunk sees them. Gradients flow through.

    Args:
        turn: see `Family.turned`, of the model.
    """

    def __init__(self, zones: Zones, turn: Turn) -> None:
        self.zones, self._turn = zones, turn
        self.chunks = 0  # that it has seen
        self._window: list[Seen] = []  # as they came; all else is turned
        self._sink: list[Seen] = []
        self._middle: list[Seen] = []

    def push(self, k: Tensor, v: Tensor, video: VideoShape) -> None:
        """Take the next chunk, (B, H, N, D), whose tokens are a grid."""
        zones = self.zones
        self._window.append(Seen(k, v))
        self.chunks += 1
        if len(self._window) <= zones.window:
            return
        old = self._window.pop(0)
        number = self.chunks - 1 - zones.window
        if number >= zones.sink and zones.middle == "none":
            return
        kept = old if number < zones.sink else _pooled(old, video, zones.middle)
        kept = kept._replace(keys=self._turn(kept.keys, zones.frames * (zones.window + 1)))
        if number < zones.sink:
            self._sink.append(kept)
            return
        self._middle.append(kept)
        del self._middle[: -zones.remembered]

    @property
    def exact(self) -> int:
        """Number of earlier chunks that are seen whole, in the window and the sink."""
        return len(self._sink) + len(self._window)

    @property
    def pooled(self) -> bool:
        """Whether a middle is seen."""
        return bool(self._middle)

    def seen(self) -> Seen | None:
        """Return all that the next chunk sees: the middle, and then chunks in the order of their
        ages; None before the first chunk. It is put together at each call, as it costs little
        beside an attention, and as much memory as the cache itself."""
        if not self._window:
            return None
        count, frames = len(self._window), self.zones.frames
        window = [
            Seen(self._turn(one.keys, frames * (count - place)), one.values)
            for place, one in enumerate(self._window)
        ]
        parts = [*self._middle, *self._sink, *window]
        logs = None
        if any(part.logs is not None for part in parts):
            once = [torch.zeros(part.keys.shape[2], device=part.keys.device) for part in parts]
            pairs = zip(parts, once, strict=True)
            logs = torch.cat([zeros if one.logs is None else one.logs for one, zeros in pairs])
        keys = torch.cat([part.keys for part in parts], 2)
        return Seen(keys, torch.cat([part.values for part in parts], 2), logs)

    @property
    def numbers(self) -> int:
        """Count of the numbers that it keeps."""
        parts = [*self._window, *self._sink, *self._middle]
        return sum(part.keys.numel() + part.values.numel() for part in parts)


def _pooled(chunk: Seen, video: VideoShape, middle: Middle) -> Seen:
    if middle == "salient":
        return salient(chunk)
    return grid_means(chunk, video) if middle == "grid" else chunk


def salient(chunk: Seen) -> Seen:
    """Keep the tokens whose values are farthest from their mean, summed over heads, and one mean
    of all others, which counts as many times as it stands for."""
    k, v, _ = chunk
    N, kept = k.shape[2], salient_tokens(k.shape[2])
    if kept + 1 >= N:
        return chunk
    apart = (v - v.mean(2, keepdim=True)).detach().float().norm(dim=-1).sum(1)
    index = apart.topk(kept).indices.sort().values[:, None, :, None]
    index = index.expand(-1, k.shape[1], -1, k.shape[3])

    def kept_and_mean(x: Tensor) -> Tensor:
        chosen = x.gather(2, index)
        mean = (x.sum(2, keepdim=True) - chosen.sum(2, keepdim=True)) / (N - kept)
        return torch.cat([chosen, mean], 2)

    logs = k.new_zeros(kept + 1, dtype=torch.float32)
    logs[-1] = math.log(N - kept)
    return Seen(kept_and_mean(k), kept_and_mean(v), logs)


def grid_means(chunk: Seen, video: VideoShape) -> Seen:
    """Pool each frame to the means of cells of `CELL` x `CELL` tokens; those at the edge may be
    smaller."""
    grid = video.frames, video.height, video.width

    def pooled(x: Tensor) -> Tensor:
        B, H, _, D = x.shape
        frames = x.transpose(2, 3).reshape(B * H * D, grid[0], *grid[1:])
        cells = F.avg_pool2d(frames, CELL, ceil_mode=True, count_include_pad=False)
        return cells.reshape(B, H, D, -1).transpose(2, 3)

    rows, columns = ((torch.arange(-(-n // CELL)) * -CELL + n).clamp(max=CELL) for n in grid[1:])
    counts = torch.outer(rows, columns).flatten().repeat(grid[0])
    return Seen(
        pooled(chunk.keys), pooled(chunk.values), counts.float().log().to(chunk.keys.device)
    )


class Clip(NamedTuple):
    """A forward pass of all chunks of some clips at once, for training. Its rows are the clean
    chunks of each clip but the last one, and then its noisy chunks, clip after clip.

    Args:
        clips: number of clips.
        chunks: of each.
        zones: of this pass.
    """

    clips: int
    chunks: int
    zones: Zones

    def rows(self, clean: Tensor, noisy: Tensor) -> Tensor:
        """Lay out what belongs to chunks, (B, chunks, ...) each, as rows of the batch."""
        return torch.cat([clean[:, :-1].flatten(0, 1), noisy.flatten(0, 1)])

    def noisy(self, rows: Tensor) -> Tensor:
        """Return the noisy chunks among the rows, (B, chunks, ...)."""
        return rows[self.clips * (self.chunks - 1) :].unflatten(0, (self.clips, self.chunks))

    def clean_rows(self, chunk: int) -> slice:
        """Rows of a clean chunk, one of each clip."""
        before = self.chunks - 1
        return slice(chunk, self.clips * before, before)

    def noisy_rows(self, chunk: int) -> slice:
        """Rows of a noisy chunk, one of each clip."""
        return slice(self.clips * (self.chunks - 1) + chunk, None, self.chunks)


class Chunk(NamedTuple):
    """A forward pass of the next chunk of some videos.

    Args:
        branch: name of the cache, as guidance has two.
        keeps: whether the chunk goes into the cache, as it is clean.
    """

    branch: str
    keeps: bool = False


def streaming_family(transformer: nn.Module) -> Family:
    """Return the family of a model that can make a video chunk by chunk; ValueError for keys that
    cannot be turned in time, and for a model without flow matching."""
    family = family_for(transformer, "streams")
    if family.training.predicts != "flow":
        raise ValueError(f"a stream needs flow matching, and {family.models} has another")
    return family


class ChunkedAttention:
    """Self-attention of a transformer over chunks, until `remove` is called.

    A forward pass is what `now` says: a `Clip`, a `Chunk`, or with None an attention inside each
    row, as without this.

    Args:
        transformer: with a method attached, which then runs inside the exact zones, or without.
        zones: of `Chunk`.

    Attributes:
        fps: of each clip (B,), on the CPU, as `predict` is told; None: it is not.

    Raises:
        ValueError: a model whose keys cannot be turned in time, or another technique on it.
    """

    name = "stream"

    def __init__(self, transformer: nn.Module, zones: Zones) -> None:
        self.transformer, self.zones = transformer, zones
        self.family = streaming_family(transformer)
        for one in (one for owner in attachments_of(transformer) for one in owner.extensions):
            raise ValueError(
                f"{one.name} is on this model, and a stream goes alone: remove it first"
            )
        self.now: Clip | Chunk | None = None
        self.fps: Tensor | None = None
        self._caches: dict[tuple[str, str], History] = {}
        self._adjusted = Remembered(self._last_rows, by_step=False)
        extension = AttentionExtension(
            self.name, 0, adjust=self._adjust, around=self._around, whole=True
        )
        self.remove = extend_attention(transformer, extension)

    @contextmanager
    def chunk(self, branch: str, *, keeps: bool = False) -> Iterator[None]:
        """Let forward passes inside the context be of the next chunk."""
        before, self.now = self.now, Chunk(branch, keeps)
        try:
            yield
        finally:
            self.now = before

    def forget(self) -> None:
        """Begin a new video."""
        self._caches.clear()

    @property
    def numbers(self) -> int:
        """Count of the numbers in all caches."""
        return sum(cache.numbers for cache in self._caches.values())

    def _turn(self, keys: Tensor, frames: int) -> Tensor:
        return self.family.turned(self.transformer, keys, -frames, self.fps)

    def _around(
        self, attend: MethodRun, q: Tensor, k: Tensor, v: Tensor, video: VideoShape
    ) -> Tensor:
        """Attend in a batch of chunks, (B, H, N, D) each, of this grid."""
        now = self.now
        if now is None:
            return attend(q, k, v, video)
        zones = now.zones if isinstance(now, Clip) else self.zones
        if video.frames != zones.frames:
            raise ValueError(
                f"a chunk of this stream has {zones.frames} latent frames after patchify, and the "
                f"model was called with {video.frames}"
            )
        if isinstance(now, Clip):
            return self._clip(attend, q, k, v, video, now)
        name = attend.layer.name
        history = self._caches.setdefault((now.branch, name), History(zones, self._turn))
        out = attended(attend, q, Seen(k, v), history, history.seen(), video, attend.texts)
        if now.keeps:
            history.push(*_of_grid(k, v, video), video)
        return out

    def _clip(
        self, attend: MethodRun, q: Tensor, k: Tensor, v: Tensor, video: VideoShape, clip: Clip
    ) -> Tensor:
        history = History(clip.zones, self._turn)
        clean, noisy = [], []

        def run(rows: slice, seen: Seen | None) -> Tensor:
            texts = None if attend.texts is None else attend.texts[rows]
            return attended(attend, q[rows], Seen(k[rows], v[rows]), history, seen, video, texts)

        for i in range(clip.chunks):
            seen = history.seen()
            noisy.append(run(clip.noisy_rows(i), seen))
            if i + 1 < clip.chunks:
                rows = clip.clean_rows(i)
                clean.append(run(rows, seen))
                history.push(*_of_grid(k[rows], v[rows], video), video)
        parts = [torch.stack(some, 1).flatten(0, 1) for some in (clean, noisy) if some]
        return torch.cat(parts)

    def _adjust(self, plan: Plan, video: VideoShape, step: int, steps: int | None) -> Plan:
        if self.now is None or video.frames == self.zones.frames:
            return plan
        return self._adjusted(plan, video, step, steps)

    def _last_rows(self, plan: Plan, video: VideoShape, step: int) -> Plan:
        """Leave out the rows of a plan that hold queries of earlier chunks alone."""
        past = video.frames - self.zones.frames
        blocks = query_blocks(plan, video)
        asked = (blocks.last >= past) | blocks.text
        return plan.changed(keep=plan.keep & asked[None, None, :, None])


def _of_grid(keys: Tensor, values: Tensor, video: VideoShape) -> tuple[Tensor, Tensor]:
    """Leave out the text, which comes last."""
    tokens = video.video_tokens
    return keys[:, :, :tokens], values[:, :, :tokens]


def attended(
    attend: MethodRun,
    q: Tensor,
    own: Seen,
    history: History,
    seen: Seen | None,
    video: VideoShape,
    texts: Texts = None,
) -> Tensor:
    """(B, H, N, D) of a chunk's queries on its own keys and on what is `seen` of its history.

    A dense attention is one call with a bias of ln n on the means. A method plans over the chunks
    that are seen whole and the chunk itself, one after the other in time, with queries of the
    last. ValueError for a method with a middle, whose counts its kernels do not take.

    Args:
        video: grid of the chunk, with the text that attends with it.
        texts: which tokens of the text each row sees; None: all. The others are padding, which
            nothing sees, and their output is zero.
    """
    groups, outs = by_text(Tokens(video), len(q), texts, q.device), []
    for some in groups:
        query, *kept = (some.of(x.transpose(1, 2)) for x in (q, own.keys, own.values))
        past = seen
        if seen is not None and not some.whole:
            past = Seen(seen.keys[[*some.rows]], seen.values[[*some.rows]], seen.logs)
        out = _attended(attend, query, Seen(*kept), history, past, some.video)
        outs.append(some.back(out, q.shape[2]))
    return together(groups, outs).transpose(1, 2)


def _attended(
    attend: MethodRun,
    q: Tensor,
    own: Seen,
    history: History,
    seen: Seen | None,
    video: VideoShape,
) -> Tensor:
    scale = attend.call.scale
    past = 0 if seen is None else seen.keys.shape[2]
    attend.keys = past + own.keys.shape[2]
    if attend.method_on(video).is_dense:
        keys, values, logs = own.keys, own.values, None
        if seen is not None:
            keys, values = torch.cat([seen.keys, keys], 2), torch.cat([seen.values, values], 2)
            if seen.logs is not None:
                logs = F.pad(seen.logs, (0, own.keys.shape[2])).to(q.dtype)[None, None, None]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=logs, scale=scale)
    if history.pooled:
        history.zones.check_method(attend.layer.method)
    if seen is None:
        return attend(q, own.keys, own.values, video)
    grid = replace(video, frames=video.frames * (history.exact + 1))
    rows = F.pad(q, (0, 0, past, 0))
    keys, values = torch.cat([seen.keys, own.keys], 2), torch.cat([seen.values, own.values], 2)
    return attend(rows, keys, values, grid)[:, :, past:]
