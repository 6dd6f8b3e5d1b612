"""Rules on the rotary frequencies of time, on ComfyUI's models.

ComfyUI's Wan, HunyuanVideo and Kandinsky 5 make their rotary embeddings by one module of three
axes, frames first. In its place goes one that has other frequencies for frames, in passes that are
longer than the model was trained at. Other models have no such module: LTX-Video's positions are
seconds, Cosmos scales its own, and Mochi's frequencies are learnt, each head its own.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .layouts import class_name, layout_of

KEY = "gen_accel_rotary"
# Class of the diffusion model -> its module of three axes.
MODULES = {
    "WanModel": "rope_embedder",
    "HunyuanVideo": "pe_embedder",
    "Kandinsky5": "rope_embedder_3d",
}
# own frequencies (pairs,) in rad a latent frame, frames, trained -> the frequencies to use
Frequencies = Callable[[Tensor, int, int], Tensor]


def put_on(model: Any, frequencies: Frequencies, trained: int, least: int = 1) -> Any:
    """A copy of a ModelPatcher whose longer passes have other frequencies.

    Args:
        trained: length that it was trained at, in latent frames.
        least: length to make frequencies for where a pass is shorter than it, but longer than
            `trained`.

    Raises ValueError for a model without such frequencies, or with a rule already.
    """
    diffusion_model = model.get_model_object("diffusion_model")
    name = module_of(diffusion_model)
    if model.get_attachment(KEY) is not None:
        raise ValueError(
            "the model has a rule on its rotary frequencies already: take one of them"
        )
    layout = layout_of(diffusion_model)
    assert layout is not None
    patched, now = model.clone(), _Now()
    own = model.get_model_object(f"diffusion_model.{name}")
    made = Rotary(own, frequencies, trained, least, now)
    patched.set_attachments(KEY, made)
    patched.add_object_patch(f"diffusion_model.{name}", made)

    def watch(forward: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        shape = kwargs["latent_shapes"][0] if "latent_shapes" in kwargs else x.shape
        grid = layout.grid(tuple(shape))
        now.frames = 0 if grid is None else grid[0]
        return forward(x, *args, **kwargs)

    patched.add_wrapper_with_key("apply_model", KEY, watch)
    return patched


def module_of(diffusion_model: Any) -> str:
    """Name of the module of three axes; ValueError for a model that has none."""
    names = [kind.__name__ for kind in type(diffusion_model).__mro__]
    found = next((MODULES[name] for name in names if name in MODULES), None)
    if found is None:
        raise ValueError(
            f"{class_name(diffusion_model)} has no rotary frequencies that a rule can change; "
            f"{', '.join(MODULES)} have"
        )
    return found


class Rotary(nn.Module):
    """Embedding in the place of ComfyUI's EmbedND.

    Args:
        own: the EmbedND; its other axes stay as they are.
    """

    def __init__(
        self, own: nn.Module, frequencies: Frequencies, trained: int, least: int, now: "_Now"
    ) -> None:
        super().__init__()
        self.own: Any = own
        self.frequencies = frequencies
        self.trained, self.least, self.now = trained, least, now

    # A graph would hold the length of the first pass forever.
    @torch.compiler.disable(recursive=True)
    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids (B, N, 3), as the module itself does: (B, 1, N, pairs, 2, 2)."""
        made, frames = self.own(ids), self.now.frames
        if frames <= self.trained:
            return made
        own = self._own(ids.device)
        used = self.frequencies(own, max(frames, self.least), self.trained)
        angles = ids[..., 0].double()[..., None] * used
        turned = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1)
        made = made.clone()
        made[:, 0, :, : len(own)] = turned.unflatten(-1, (2, 2)).to(made.dtype)
        return made

    def _own(self, device: torch.device) -> Tensor:
        """Frequencies of time, (pairs,), in fp64, in rad a latent frame."""
        pairs, theta = self.own.axes_dim[0] // 2, self.own.theta
        device = torch.device("cpu") if device.type == "mps" else device  # which has no fp64
        exponents = torch.arange(pairs, dtype=torch.float64, device=device) / pairs
        return theta**-exponents


class _Now(threading.local):
    frames: int = 0
