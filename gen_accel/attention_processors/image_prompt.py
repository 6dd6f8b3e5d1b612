"""Image prompts: attention to the tokens of an image, beside that to the text.

    Z = Attn(Q, K, V) + scale Attn(Q, K', V'),   K' = c W'_k,   V' = c W'_v

c are tokens that a projector makes of features of an image; Q are the model's own queries, and
the sum is taken before the output projection. Only the projector, W'_k and W'_v train.

Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models",
2023, https://arxiv.org/abs/2308.06721. There W'_k and W'_v start as copies of the text's W_k and
W_v, so that training does not begin at the base model. An adapter with a `start` does begin there:
it adds

    scale (Attn(Q, c W'_k, c W'_v) - Attn(Q, c_0 W_k, c_0 W_v))

where c_0 are the tokens of the untrained projector, which stays frozen like the layer's own W_k
and W_v. Since W'_k and W'_v are copies, both terms are equal when training begins and their
difference is exactly 0. The gradient comes from the first term, and is 0 for no parameter.

B batch, N tokens of video or image, H heads, D dim of a head, T tokens of an image prompt, C width
of those.
"""

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_accel.attention_processors.families import ImageAttention, family_for
from gen_accel.attention_processors.families.sites import Model
from gen_accel.parsing import fits, shown

if TYPE_CHECKING:
    from diffusers import ModelMixin

KeyNorm = Literal["none", "own", "plain"]
TEXT = "text_weights"  # of the metadata: what the layers of a `start` held, by number
_SAMPLES = 16  # of each weight, kept there
_LARGEST = torch.finfo(torch.float32).max
_ROUNDED = 5e-3  # of its size that a weight in half precision may be off
PLAIN_EPS = 1e-5  # of Lynx' light layers: IPAWanAttnProcessor2_0, github.com/bytedance/lynx


# Entries of an adapter's file beside its tensors, by name.
Metadata = dict[str, Any]


class Projector(nn.Module):
    """Base of the modules that turn features of images into tokens.

    Attributes:
        tokens: T of one image.
        width: C.
    """

    tokens: int
    width: int

    def null(self, features: Any) -> Any:
        """Return the features of "no image" in the form of `features`."""
        raise NotImplementedError


class KeysValues(nn.Module):
    """W'_k and W'_v of one attention.

    Args:
        width: C.
        inner: H D.
        bias: published adapters have none, but for Flux and Lynx.
        registers: learned tokens after the image tokens.
    """

    def __init__(self, width: int, inner: int, *, bias: bool, registers: int = 0) -> None:
        super().__init__()
        self.to_k = nn.Linear(width, inner, bias=bias)
        self.to_v = nn.Linear(width, inner, bias=bias)
        self.registers: nn.Parameter | None = None
        if registers:
            self.registers = nn.Parameter(torch.randn(1, registers, width) / width**0.5)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C) to keys and values, (B, T + registers, H D) each."""
        if self.registers is not None:
            own = self.registers.to(tokens.dtype).expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens, own], 1)
        return self.to_k(tokens), self.to_v(tokens)


class ImageAdapter(nn.Module):
    """All that an image-prompt adapter holds.

    Args:
        variant: the kind of projector, which decides what features it takes.
        projector: features to (B, T, C).
        layers: by the numbers that a family gives its attentions.
        key_norm: what the keys pass through: nothing, the layer's own norm of keys, or an RMS
            norm without weights.
        start: the projector as training began, see the module's docstring; it never trains.
        metadata: the entries in its file.
    """

    def __init__(
        self,
        variant: str,
        projector: "Projector",
        layers: Mapping[str, KeysValues],
        *,
        key_norm: KeyNorm = "none",
        start: "Projector | None" = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if key_norm not in get_args(KeyNorm):
            raise ValueError(f"key_norm must be one of {get_args(KeyNorm)}, got {shown(key_norm)}")
        if not layers:
            raise ValueError("an adapter needs layers, got none")
        self.variant, self.key_norm = variant, key_norm
        self.metadata: Metadata = dict(metadata or {})
        self.projector = projector
        self.layers = nn.ModuleDict(dict(layers))
        self.start = None if start is None else start.requires_grad_(False).eval()

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def train(self, mode: bool = True) -> "ImageAdapter":
        super().train(mode)
        if self.start is not None:
            self.start.eval()
        return self

    def keys_values(self, site: ImageAttention, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """K' and V' of one attention, (B, T, H, D) each, of tokens (B, T, C)."""
        k, v = self.layers[site.number](tokens)
        return self._normalised(site, k), v.unflatten(-1, (site.heads, site.dim))

    @torch.no_grad()
    def start_keys_values(self, site: ImageAttention, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values of tokens of `start` by the layer's own W_k and W_v."""
        k, v = (_projected(own_projection(site, name), tokens) for name in (site.to_k, site.to_v))
        return self._normalised(site, k), v.unflatten(-1, (site.heads, site.dim))

    def _normalised(self, site: ImageAttention, k: Tensor) -> Tensor:
        """(B, T, H D) to (B, T, H, D)"""
        if self.key_norm == "plain":
            k = F.rms_norm(k, k.shape[-1:], eps=PLAIN_EPS)
        heads = k.unflatten(-1, (site.heads, site.dim))
        norm = own_norm(site) if self.key_norm == "own" else None
        if norm is None:
            return heads
        size = _normalised_size(norm)
        if size == k.shape[-1]:
            return _normed(norm, k).unflatten(-1, (site.heads, site.dim))
        if size == site.dim:
            return _normed(norm, heads)
        raise ValueError(
            f"{site.norm} of {site.name} must normalise a head of {site.dim} or all "
            f"{k.shape[-1]}, got {size}"
        )


def new_adapter(
    transformer: "ModelMixin",
    projector: Projector,
    *,
    variant: str,
    start: Literal["identity", "clone"] = "identity",
) -> ImageAdapter:
    """An adapter for `transformer` before its training: W'_k and W'_v are copies of W_k and W_v.

    Args:
        projector: new or trained; see `ImageAdapter`.
        start: "identity" begins at the base model, "clone" as the paper does.

    Raises:
        ValueError: a model without image prompts, or tokens of another width than its text's.
    """
    if start not in ("identity", "clone"):
        raise ValueError(f"start must be identity or clone, got {shown(start)}")
    sites = family_for(transformer, "image prompts").image_attentions(transformer)
    layers = {}
    for site in sites:
        if projector.width != site.width:
            raise ValueError(
                f"{site.name} takes tokens of width {site.width}, the projector makes "
                f"{projector.width}"
            )
        k, v = own_projection(site, site.to_k), own_projection(site, site.to_v)
        layer = KeysValues(site.width, site.heads * site.dim, bias=k.bias is not None)
        layer.to_k.load_state_dict(k.state_dict())
        layer.to_v.load_state_dict(v.state_dict())
        layers[site.number] = layer.to(k.weight.device, k.weight.dtype)
    samples = {site.number: _sampled(site) for site in sites}
    told = {number: x.tolist() for number, x in samples.items() if x is not None}
    return ImageAdapter(
        variant,
        projector,
        layers,
        key_norm="own" if any(own_norm(site) is not None for site in sites) else "none",
        start=deepcopy(projector) if start == "identity" else None,
        metadata={TEXT: told} if start == "identity" else None,
    )


class OtherText(UserWarning):
    """An adapter with a `start` runs on other weights than it starts from."""


def warn_of_other_text(adapter: ImageAdapter, sites: Sequence[ImageAttention]) -> None:
    """Warn if W_k and W_v differ from those at the start of training; the adapter keeps samples of
    these. The adapter then no longer adds a difference from the base model."""
    told = adapter.metadata.get(TEXT)
    if adapter.start is None or not isinstance(told, Mapping):
        return
    pairs = [
        (_recorded(told, site, now), now)
        for site in sites
        if site.number in told and (now := _sampled(site)) is not None
    ]
    off = sum(float((now - then).square().sum()) for then, now in pairs) ** 0.5
    size = sum(float(then.square().sum()) for then, _ in pairs) ** 0.5
    if off > _ROUNDED * size:
        warnings.warn(
            "the image prompt starts from the model's own text weights, and to_k and to_v of "
            f"{sites[0].name} and others differ by {off / size:.2g} of their size from those: a "
            "LoRA that was merged, or another checkpoint? Unmerge it, or load the base model",
            OtherText,
            stacklevel=2,
        )


def _recorded(told: Mapping[str, Any], site: ImageAttention, now: Tensor) -> Tensor:
    """Return what an adapter keeps of a layer's weights, of the shape of `now`."""
    values = told[site.number]
    right = fits(values, tuple[float, ...]) and len(values) == len(now)
    if not right or not all(abs(x) <= _LARGEST for x in values):
        raise ValueError(
            f"{TEXT} of the adapter must hold {len(now)} numbers for {site.name}, got "
            f"{shown(values)}: the file was changed, or is for another model"
        )
    return torch.tensor([*map(float, values)])


def image_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) v, with (B, N, H, D) queries and (B, T, H, D) keys and values.

    Args:
        scale: 1 / sqrt(D) if not given.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def own_projection(site: ImageAttention, name: str) -> Any:
    """The model's own W_k or W_v, without what a LoRA adds to it."""
    module = site.module.get_submodule(name)
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def own_norm(site: ImageAttention) -> Any:
    """Return the model's own norm of keys there; None if it has none."""
    return None if site.norm is None else getattr(site.module, site.norm)


def _sampled(site: ImageAttention) -> Tensor | None:
    """Sample some values of W_k and W_v; None if they are quantised or offloaded."""
    found = []
    for name in (site.to_k, site.to_v):
        weight = getattr(own_projection(site, name), "weight", None)
        if weight is None or not _is_plain(weight) or weight.dtype.itemsize < 2:
            return None
        flat = weight.detach().flatten()
        found.append(flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].float().cpu())
    return torch.cat(found)


def _is_plain(weight: Tensor) -> bool:
    """Whether these are values in memory, neither offloaded nor of a package that quantises."""
    return type(weight) in (Tensor, nn.Parameter) and not weight.is_meta


def _projected(module: Model, tokens: Tensor) -> Tensor:
    if type(module) is not nn.Linear or not _is_plain(module.weight):
        # Quantised, or offloaded until it is called.
        return module(tokens.to(_device(module, tokens)))
    # In the precision of the adapter, so that its copies give the same numbers.
    weight, bias = module.weight, module.bias
    bias = None if bias is None else bias.to(tokens.dtype)
    return F.linear(tokens.to(weight.device), weight.to(tokens.dtype), bias)


def _normed(norm: Model, k: Tensor) -> Tensor:
    weight = getattr(norm, "weight", None)
    dtype = k.dtype if weight is None else weight.dtype
    return norm(k.to(_device(norm, k), dtype))


def _normalised_size(norm: object) -> int:
    for name in ("normalized_shape", "dim"):
        if isinstance(getattr(norm, name, None), tuple):
            return getattr(norm, name)[-1]
    weight = getattr(norm, "weight", None)
    return -1 if weight is None else weight.shape[-1]


def _device(module: Model, x: Tensor) -> torch.device:
    """Device to call a module on. Offloaded weights come to the device of their input."""
    parameter = next(module.parameters(), None)
    return x.device if parameter is None or parameter.is_meta else parameter.device
