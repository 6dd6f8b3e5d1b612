"""FLOPs of one forward pass, from the tokens that pass a model's layers and attentions.

Counted, at 2 FLOPs for each multiplication and addition: linear layers and convolutions, and both
products of each attention. Not counted: norms, activations, rotary embeddings and embeddings by
table.

Tokens are counted by kind, in expressions such as "video + text" or "frames * text" ("one" is one
row a sample; "noisy" are tokens of frames that are not given, by default all). A kind whose number
is not known counts 0.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple, TypeVar

from torch import nn

from gen_accel.attention_processors.families.sites import Model, SelfAttention
from gen_accel.video import VideoShape

Found = TypeVar("Found")
Default = TypeVar("Default")
LAYERS = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
Lengths = Mapping[str, float]  # numbers of tokens by kind


class Layers(NamedTuple):
    """The tokens that pass the layers of a family's models.

    Args:
        rows: regular expressions, searched for in the names of linear layers and convolutions, to
            the tokens that pass them. The first that is found counts; all others see `default`.
        attends: likewise, query projections of all attentions but the ones over the grid, to their
            queries and their keys.
        beside: the tokens that attend together with the grid, in `self_attentions`.
        pairs: names of blocks whose attention over the grid differs, to its queries and its keys.
        lengths: numbers of tokens that are the same for all videos, by kind.
        uncounted: in words, what depends on more than size and text, and counts nothing here.
    """

    rows: Mapping[str, str]
    attends: Mapping[str, tuple[str, str]]
    beside: str = ""
    pairs: Mapping[str, tuple[str, str]] = {}
    default: str = "video"
    lengths: Mapping[str, int] = {}
    uncounted: str = ""

    def with_first(
        self, rows: Mapping[str, str], attends: Mapping[str, tuple[str, str]] | None = None
    ) -> "Layers":
        """Put rows and attentions before its own."""
        attends = {**(attends or {}), **self.attends}
        return self._replace(rows={**rows, **self.rows}, attends=attends)


# Models whose grid attends to itself, and then to the text.
CROSS = Layers(
    {r"time|adaln": "one", r"text_embedder|caption_projection|attn2\.to_[kv]$": "text"},
    {r"attn2\.to_q$": ("video", "text")},
)
# Models whose grid and text attend together, by projections of their own and then by the same.
JOINT = Layers(
    {
        r"time|norm|guidance": "one",
        r"context_embedder|add_[qkv]_proj|to_add_out|ff_context": "text",
        r"^single_": "video + text",
    },
    {r"refiner_blocks.*attn\.to_q$": ("text", "text")},
    beside="text",
)


class Flops(NamedTuple):
    """FLOPs of one call for one sample.

    Args:
        attention: both products of the attentions over the grid, with the tokens that attend with
            it.
        rest: everything else, other attention too.
    """

    attention: float
    rest: float


class Cost:
    """The work of a model as a function of its tokens.

    Args:
        model: its layers are read; may be on the meta device.
        sites: its `self_attentions`.
        frames_apart: each frame attends by itself.
    """

    def __init__(
        self, model: Model, layers: Layers, sites: Sequence[SelfAttention], frames_apart: bool
    ) -> None:
        self.lengths = layers.lengths
        self.linear: Counter[str] = Counter()  # rows to multiplications of one
        self.other: Counter[tuple[str, str]] = Counter()  # queries and keys to widths
        self.grid: Counter[tuple[str, str]] = Counter()
        for name, layer in model.named_modules():
            if isinstance(layer, LAYERS):
                self.linear[_first(layers.rows, name, layers.default)] += layer.weight.numel()
            pair = _first(layers.attends, name, None)
            if pair is not None:
                assert isinstance(layer, nn.Linear)
                self.other[pair] += layer.out_features
        together = f"video + {layers.beside}" if layers.beside else "video"
        apart = "frames * pixels", "pixels"
        for site in sites:
            usual = apart if frames_apart else (together, together)
            self.grid[layers.pairs.get(site.name, usual)] += site.heads * site.dim

    def __call__(self, video: VideoShape, lengths: Lengths) -> Flops:
        """
        Args:
            video: its grid counts.
            lengths: of all other kinds of tokens, such as "text".
        """
        pixels = video.height * video.width
        known = {"one": 1, "frames": video.frames, "pixels": pixels, "noisy": video.video_tokens}
        known = {**known, **self.lengths, **lengths, "video": video.video_tokens}

        def attention(pairs: Mapping[tuple[str, str], int]) -> float:
            return sum(
                4.0 * _count(queries, known) * _count(keys, known) * width
                for (queries, keys), width in pairs.items()
            )

        linear = sum(2.0 * _count(rows, known) * size for rows, size in self.linear.items())
        return Flops(attention(self.grid), linear + attention(self.other))


def _first(table: Mapping[str, Found], name: str, default: Default) -> Found | Default:
    return next((found for pattern, found in table.items() if re.search(pattern, name)), default)


def _count(expression: str, known: Lengths) -> float:
    return sum(
        prod(known.get(kind.strip(), 0) for kind in term.split("*"))
        for term in expression.split("+")
    )
