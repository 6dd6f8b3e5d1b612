"""A small stand-in of what the ComfyUI node uses of ComfyUI 0.19.3: a patcher, its wrappers and
callbacks, a sampling step, models that call the attention function in ComfyUI's manner."""

import copy
import importlib.util
import logging
import os
import subprocess
import sys
from functools import cache
from operator import attrgetter

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.paths import ROOT
from torch import nn

COMFYUI = os.environ.get("COMFYUI_DIR")
FOLDER = ROOT / "integrations" / "comfyui"
HEADS, WIDTH, BLOCKS = 2, 32, 3
OVERRIDE = "optimized_attention_override"


def import_pack(name="custom_nodes_gen_accel"):
    """The folder, imported as ComfyUI imports one of `custom_nodes`."""
    spec = importlib.util.spec_from_file_location(
        name, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def forget_pack(name="custom_nodes_gen_accel"):
    for loaded in [one for one in sys.modules if one.partition(".")[0] == name]:
        del sys.modules[loaded]


@cache
def pack_script():
    """Import the script that writes the pack's help pages and workflows."""
    spec = importlib.util.spec_from_file_location("comfyui_pack", f"{FOLDER}_pack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def computed_by_comfyui(script, folder):
    """Run a script of this folder by ComfyUI's Python, and return what it wrote."""
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable)]
    done = subprocess.run(
        [*command, ROOT / "tests" / "support" / script, ROOT, folder],
        cwd=COMFYUI,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "out.safetensors")


def latents(frames=5, height=16, width=16, batch=1):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, frames, height, width, generator=g)


def optimized_attention(q, k, v, heads, **options):
    """Attend as ComfyUI does: an override is asked first, and may call what it is given."""
    transformer_options = options.get("transformer_options")
    if transformer_options is not None and OVERRIDE in transformer_options:
        override = transformer_options[OVERRIDE]
        return override(plain, q, k, v, heads, _inside_attn_wrapper=True, **options)
    return plain(q, k, v, heads, **options)


def plain(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **others):
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None and mask.ndim == 3:
        mask = mask.unsqueeze(1)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=others.get("scale"))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class WanModel(nn.Module):
    """Self- and cross-attention over patches of latents, as in ComfyUI's Wan.

    Args:
        front: tokens before those of the latents.
        behind: tokens behind those of the latents.
        said: what is added to the options besides the number of the block.
    """

    patch_size = (1, 2, 2)
    ref_conv = None
    numbers_blocks = True
    dim = WIDTH

    def __init__(self, front=0, behind=0, **said):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(BLOCKS))
        self.front = nn.Parameter(torch.randn(1, front, WIDTH))
        self.behind = nn.Parameter(torch.randn(1, behind, WIDTH))
        self.said = said

    def attention(self, q, k, v, **options):
        return optimized_attention(q, k, v, HEADS, **options)

    def forward(self, x, timestep, context, control=None, transformer_options=None, mask=None):
        padded = F.pad(x, (0, x.shape[4] % 2, 0, x.shape[3] % 2))
        tokens = self.embed(padded).flatten(2).transpose(1, 2)
        beside = [part.expand(len(x), -1, -1) for part in (self.front, self.behind)]
        tokens = torch.cat([beside[0], tokens, beside[1]], dim=1)
        transformer_options |= self.said
        options = {"transformer_options": transformer_options}
        for i, block in enumerate(self.blocks):
            if self.numbers_blocks:
                transformer_options["block_index"] = i
            q, k, v = block(tokens).chunk(3, dim=-1)
            tokens = tokens + self.attention(q, k, v, mask=mask, **options)
            tokens = tokens + self.attention(tokens, context, context, **options)
        return tokens


class Sampling:
    """A shift as of ModelSamplingSD3: 1 leaves the sigmas as they are."""

    def __init__(self, shift=1.0):
        self.shift = shift

    def percent_to_sigma(self, percent):
        sigma = 1 - percent
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)


class Executor:
    """Call of the wrappers around a method, the first one outermost."""

    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        rest = Executor(self.original, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](rest, *args, **kwargs)


class BaseModel:
    """Wrapper of a diffusion model."""

    def __init__(self, diffusion_model):
        self.diffusion_model, self.model_sampling = diffusion_model, Sampling()

    def apply_model(self, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        if "latent_shapes" in kwargs:
            shape = kwargs.pop("latent_shapes")[0]
            x = x.flatten()[: torch.Size(shape).numel()].reshape(shape)
        options = {"control": control, "transformer_options": transformer_options, **kwargs}
        return self.diffusion_model(x, t, c_crossattn, **options)


class Patcher:
    """Parts of a ModelPatcher that the node uses."""

    def __init__(self, diffusion_model):
        self.model = BaseModel(diffusion_model)
        self.object_patches, self.attachments = {}, {}
        self.model_options = {"transformer_options": {}}
        self.wrappers, self.callbacks = {}, {}

    def clone(self):
        twin = Patcher(self.model.diffusion_model)
        twin.model = self.model
        twin.object_patches = dict(self.object_patches)
        twin.attachments = dict(self.attachments)
        twin.model_options = copy.deepcopy(self.model_options)
        twin.wrappers = {key: [*these] for key, these in self.wrappers.items()}
        twin.callbacks = {key: [*these] for key, these in self.callbacks.items()}
        return twin

    def get_model_object(self, name):
        if name in self.object_patches:
            return self.object_patches[name]
        return attrgetter(name)(self.model)

    def add_object_patch(self, name, value):
        self.object_patches[name] = value

    def set_attachments(self, key, attachment):
        self.attachments[key] = attachment

    def get_attachment(self, key):
        return self.attachments.get(key)

    def add_wrapper_with_key(self, kind, key, wrapper):
        assert kind == "apply_model"
        self.wrappers.setdefault(key, []).append(wrapper)

    def add_callback_with_key(self, kind, key, callback):
        assert kind == "on_cleanup"
        self.callbacks.setdefault(key, []).append(callback)

    def forward(self, x, sigma=0.5, context=None, **options):
        """One forward pass as in the middle of sampling."""
        context = torch.ones(len(x), 6, WIDTH) if context is None else context
        wrappers = [wrapper for these in self.wrappers.values() for wrapper in these]
        about = self.model_options["transformer_options"] | {"sigmas": torch.tensor([sigma])}
        backup = {name: attrgetter(name)(self.model) for name in self.object_patches}
        self._put(self.object_patches)
        try:
            call = Executor(self.model.apply_model, self.model, wrappers)
            return call(x, torch.tensor([sigma]), None, context, None, about, **options)
        finally:
            self._put(backup)

    def _put(self, objects):
        for name, value in objects.items():
            place, _, last = f".{name}".rpartition(".")
            setattr(attrgetter(place[1:])(self.model) if place else self.model, last, value)

    def clean_up(self, caplog):
        """Lines that are logged at the end of sampling."""
        caplog.clear()
        with caplog.at_level(logging.INFO):
            for callback in [one for these in self.callbacks.values() for one in these]:
                callback(self)
        return [record.getMessage() for record in caplog.records]


class Unpacked(BaseModel):
    """For video beside sound, which the sampler has in one tensor; time runs from 1000."""

    def apply_model(self, x, t, c_concat, c_crossattn, control, transformer_options, **given):
        parts, rest = [], x.flatten()
        for shape in given.pop("latent_shapes"):
            size = torch.Size(shape).numel()
            parts.append(rest[:size].view(shape))
            rest = rest[size:]
        options = {"transformer_options": transformer_options, **given}
        return self.diffusion_model(parts, t * 1000, c_crossattn, **options)


class Adapter:
    """As ComfyUI's: what it is made of."""

    def __init__(self, loaded_keys, weights):
        self.weights = weights


class Weighted(Patcher):
    """With patches on weights, as a ModelPatcher keeps them."""

    def __init__(self, diffusion_model, kind=BaseModel):
        super().__init__(diffusion_model)
        self.patches, self.model = {}, kind(diffusion_model)
        inner = self.model
        inner.state_dict = lambda: {
            f"diffusion_model.{name}": x for name, x in diffusion_model.state_dict().items()
        }

    def clone(self):
        twin = super().clone()
        twin.__class__, twin.patches = Weighted, {k: [*v] for k, v in self.patches.items()}
        return twin

    def add_patches(self, patches, strength):
        for key, one in patches.items():
            self.patches.setdefault(key, []).append((strength, one))
