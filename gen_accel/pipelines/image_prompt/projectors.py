"""Projectors: modules that turn an image's features into tokens for the attention layers.

B images, E width of a feature, S features of one image, T tokens, C width of a token.

There is one class for each shape of projector in published adapters, and `Pixels`, which is ours.
Names in a state dict follow the official files, https://github.com/tencent-ailab/IP-Adapter, so
that these load directly. Each class has

tokens            T of one image
width             C
forward(features) the tokens, (B, T, C)
null(features)    the features of "no image" in the form of `features`
of(state, variant) a projector without the values of a state dict, at the sizes of its shapes
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_accel.attention_processors.image_prompt import Projector

HEAD = 64  # dim of a head in every published resampler

GREY = 128  # of 255, pixel value of "no image" for `Pixels`

# Width of a face vector from face recognition, such as InsightFace's.
IDENTITY = 512
PIXELS = 32  # a side, for "pixels"


class Linear(Projector):
    """LayerNorm(x W), T tokens from one embedding. The projector of the base adapters and Flux's.

    Args:
        embedding: E.
        black: "no image" is the embedding of a black image, as in Flux's adapters, not zeros.
    """

    def __init__(self, embedding: int, width: int, tokens: int = 4, black: bool = False) -> None:
        super().__init__()
        self.tokens, self.width, self.black = tokens, width, black
        self.nothing: Tensor | None = None
        self.proj = nn.Linear(embedding, tokens * width)
        self.norm = nn.LayerNorm(width)

    @classmethod
    def of(cls, state: Mapping[str, Tensor], variant: str) -> "Linear":
        rows, embedding = _shape(state, "proj.weight", 2)
        width = _shape(state, "norm.weight", 1)[0]
        return cls(embedding, width, rows // width, black=variant == "flux")

    def forward(self, features: Tensor) -> Tensor:
        """Project (B, E) to (B, T, C)."""
        return self.norm(self.proj(features).unflatten(-1, (self.tokens, self.width)))

    def null(self, features: Tensor) -> Tensor:
        """Return zeros, or `nothing`; see `Resampler.null`."""
        return _nothing(self.nothing, features) if self.black else torch.zeros_like(features)


class MLP(Projector):
    """Projector of the full-face adapter: a token for each hidden state of the encoder.

    Args:
        embedding: E.
        tokens: hidden states of one image: 257 for a CLIP ViT-H/14.
    """

    def __init__(self, embedding: int, width: int, tokens: int = 257) -> None:
        super().__init__()
        self.tokens, self.width = tokens, width
        self.nothing: Tensor | None = None
        self.proj = nn.Sequential(
            nn.Linear(embedding, embedding),
            nn.GELU(),
            nn.Linear(embedding, width),
            nn.LayerNorm(width),
        )

    @classmethod
    def of(cls, state: Mapping[str, Tensor], variant: str) -> "MLP":
        width, embedding = _shape(state, "proj.2.weight", 2)
        return cls(embedding, width)

    def forward(self, features: Tensor) -> Tensor:
        """Project (B, S, E) to (B, S, C)."""
        return self.proj(features)

    def null(self, features: Tensor) -> Tensor:
        """See `Resampler.null`."""
        return _nothing(self.nothing, features)


class IdLinear(Projector):
    """Projector of the FaceID adapters: tokens from the vector of a face.

    Args:
        embedding: E, 512.
        hidden: width between the two layers.
    """

    def __init__(self, embedding: int, width: int, tokens: int = 4, hidden: int = 1024) -> None:
        super().__init__()
        self.tokens, self.width = tokens, width
        self.proj = nn.Sequential(
            nn.Linear(embedding, hidden), nn.GELU(), nn.Linear(hidden, tokens * width)
        )
        self.norm = nn.LayerNorm(width)

    @classmethod
    def of(cls, state: Mapping[str, Tensor], variant: str) -> "IdLinear":
        hidden, embedding = _shape(state, "proj.0.weight", 2)
        width = _shape(state, "norm.weight", 1)[0]
        return cls(embedding, width, _shape(state, "proj.2.weight", 2)[0] // width, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """Project (B, E) to (B, T, C)."""
        return self.norm(self.proj(features).unflatten(-1, (self.tokens, self.width)))

    def null(self, features: Tensor) -> Tensor:
        return torch.zeros_like(features)


class Resampler(Projector):
    """T learned queries that attend to the features in a few layers.

    Used by the plus adapters, on an encoder's hidden states, and by Lynx, on the vector of a face.
    Jaegle et al., 2021, https://arxiv.org/abs/2103.03206.

    Args:
        embedding: E.
        dim: width of the layers.
        heads: number of heads of dim 64.
        spread: width of the feed-forward layers in units of `dim`.
        identity: the features are vectors of faces, whose "no image" is zeros.
    """

    def __init__(
        self,
        embedding: int,
        width: int,
        tokens: int = 16,
        dim: int = 768,
        depth: int = 4,
        heads: int = 12,
        spread: int = 4,
        identity: bool = False,
    ) -> None:
        super().__init__()
        self.tokens, self.width, self.identity = tokens, width, identity
        self.nothing: Tensor | None = None
        self.latents = nn.Parameter(torch.randn(1, tokens, dim) / dim**0.5)
        self.proj_in = nn.Linear(embedding, dim)
        self.layers = _layers(dim, depth, heads, spread)
        self.proj_out = nn.Linear(dim, width)
        self.norm_out = nn.LayerNorm(width)

    @classmethod
    def of(cls, state: Mapping[str, Tensor], variant: str) -> "Resampler":
        _, tokens, dim = _shape(state, "latents", 3)
        return cls(tokens=tokens, dim=dim, identity=variant != "plus", **_sizes(state))

    def forward(self, features: Tensor) -> Tensor:
        """Resample (B, S, E), or vectors of faces, (B, E), to (B, T, C)."""
        if features.dim() == 2:
            if not self.identity:
                raise ValueError(
                    f"hidden states must be (images, sequence, {self.proj_in.in_features}), got "
                    f"{tuple(features.shape)}: give one image as features[None]"
                )
            features = features.unsqueeze(1)
        x = self.proj_in(features)
        latents = self.latents.expand(len(x), -1, -1)
        return self.norm_out(self.proj_out(_read(self.layers, x, latents)))

    def null(self, features: Tensor) -> Tensor:
        """Return the features of "no image": zeros for the vector of a face.

        For hidden states it is `nothing`, (1, S, E), the hidden states of an empty image. Only
        the encoder knows them; set `nothing` to the result of `ImageEncoder.negative`.
        """
        return torch.zeros_like(features) if self.identity else _nothing(self.nothing, features)


class IdResampler(Projector):
    """Projector of the FaceID-Plus adapters.

    Queries are made from the vector of a face, and attend to the hidden states of its picture.

    Args:
        embedding: width of a hidden state.
        identity: width of the vector, 512.
        hidden: width between the two layers that make the queries.
        shortcut: second version, whose tokens are the queries plus `structure` times the
            attention's output; the first version's tokens are that output.
    """

    def __init__(
        self,
        embedding: int,
        width: int,
        tokens: int = 4,
        identity: int = IDENTITY,
        hidden: int = 1024,
        depth: int = 4,
        heads: int = 12,
        spread: int = 4,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.tokens, self.width, self.shortcut = tokens, width, shortcut
        self.structure = 1.0
        self.nothing: Tensor | None = None
        self.proj = nn.Sequential(
            nn.Linear(identity, hidden), nn.GELU(), nn.Linear(hidden, tokens * width)
        )
        self.norm = nn.LayerNorm(width)
        self.perceiver_resampler = nn.ModuleDict(
            {
                "proj_in": nn.Linear(embedding, width),
                "proj_out": nn.Linear(width, width),
                "norm_out": nn.LayerNorm(width),
                "layers": _layers(width, depth, heads, spread),
            }
        )

    @classmethod
    def of(cls, state: Mapping[str, Tensor], variant: str) -> "IdResampler":
        prefix = "perceiver_resampler."
        inner = {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}
        hidden, identity = _shape(state, "proj.0.weight", 2)
        tokens = _shape(state, "proj.2.weight", 2)[0] // _shape(state, "norm.weight", 1)[0]
        face = {"tokens": tokens, "identity": identity, "hidden": hidden}
        return cls(**face, **_sizes(inner), shortcut=variant == "faceid_plus_v2")

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Project {"id": (B, 512), "clip": (B, S, E)} to (B, T, C)."""
        queries = self.norm(self.proj(features["id"]).unflatten(-1, (self.tokens, self.width)))
        part = self.perceiver_resampler
        read = _read(part["layers"], part["proj_in"](features["clip"]), queries)
        read = part["norm_out"](part["proj_out"](read))
        return queries + self.structure * read if self.shortcut else read

    def null(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Resampler.null`."""
        return {
            "id": torch.zeros_like(features["id"]),
            "clip": _nothing(self.nothing, features["clip"]),
        }


class Pixels(Projector):
    """Small encoder that trains along with the adapter: pixels to T tokens.

    Convolutions halve the image, with GroupNorm after each; then each channel is pooled to its
    mean and its maximum, which drops positions. Nothing depends on the batch.

    Args:
        channels: number of channels after each convolution.
    """

    def __init__(
        self, width: int, tokens: int = 4, channels: tuple[int, ...] = (32, 64, 128)
    ) -> None:
        super().__init__()
        self.tokens, self.width = tokens, width
        pairs = zip((3, *channels), channels, strict=False)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.norms = nn.ModuleList(nn.GroupNorm(_groups(c), c) for c in channels)
        self.proj = nn.Linear(2 * channels[-1], tokens * width)
        self.norm = nn.LayerNorm(width)

    @classmethod
    def of(cls, state: Mapping[str, Tensor], variant: str) -> "Pixels":
        names = [k for k in state if k.startswith("convs.") and k.endswith(".weight")]
        channels = tuple(_shape(state, f"convs.{i}.weight", 4)[0] for i in range(len(names)))
        width = _shape(state, "norm.weight", 1)[0]
        return cls(width, _shape(state, "proj.weight", 2)[0] // width, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Encode (B, 3, S, S), in [-1, 1] or uint8, to (B, T, C)."""
        x = features
        if x.dtype == torch.uint8:
            x = normalised(x).to(self.proj.weight.dtype)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        x = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)
        return self.norm(self.proj(x).unflatten(-1, (self.tokens, self.width)))

    def null(self, features: Tensor) -> Tensor:
        """Return a grey image, in uint8 or normalised like `features`."""
        grey = torch.full_like(features, GREY, dtype=torch.uint8)
        return grey if features.dtype == torch.uint8 else normalised(grey).to(features)


def normalised(pixels: Tensor) -> Tensor:
    """Normalise uint8 to [-1, 1], in float32: half precision would lose values close to 0."""
    return pixels.float() / 127.5 - 1


class ResamplerAttention(nn.Module):
    """Attention of the queries to the features and to themselves."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * HEAD, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * HEAD, bias=False)
        self.to_out = nn.Linear(heads * HEAD, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat([self.norm1(x), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (-1, HEAD)).transpose(1, 2) for y in (self.to_q(latents), k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


def _layers(dim: int, depth: int, heads: int, spread: int) -> nn.ModuleList:
    def layer() -> nn.ModuleList:
        forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, spread * dim, bias=False),
            nn.GELU(),
            nn.Linear(spread * dim, dim, bias=False),
        )
        return nn.ModuleList([ResamplerAttention(dim, heads), forward])

    return nn.ModuleList(layer() for _ in range(depth))


def _read(layers: nn.Module, x: Tensor, latents: Tensor) -> Tensor:
    for layer in layers.children():
        attention, forward = layer.children()
        latents = latents + attention(x, latents)
        latents = latents + forward(latents)
    return latents


def _shape(state: Mapping[str, Tensor], name: str, axes: int) -> torch.Size:
    shape = state[name].shape
    if len(shape) != axes:
        raise ValueError(f"{name} is {tuple(shape)}, must have {axes} axes")
    return shape


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Read the sizes that both resamplers have from a state dict."""
    rows = _shape(state, "layers.0.0.to_q.weight", 2)[0]
    if rows % HEAD:
        raise ValueError(f"layers.0.0.to_q.weight has {rows} rows, no multiple of {HEAD}")
    inner, dim = _shape(state, "layers.0.1.1.weight", 2)
    return {
        "embedding": _shape(state, "proj_in.weight", 2)[1],
        "width": _shape(state, "proj_out.weight", 2)[0],
        "depth": len({k.split(".")[1] for k in state if k.startswith("layers.")}),
        "heads": rows // HEAD,
        "spread": inner // dim,
    }


def _nothing(given: Tensor | None, features: Tensor) -> Tensor:
    if given is None:
        raise ValueError(
            "if there is no image, this adapter needs the image encoder's features of an empty "
            "one: give negative=, or load the adapter with image_encoder="
        )
    return given.to(features).expand(len(features), *given.shape[1:])


def _groups(channels: int) -> int:
    return max(g for g in range(1, 9) if channels % g == 0)
