"""What sparse attention would bring for one model and size, before anything is generated.

The model of time is as simple as it can be:

    step time     ∝  FLOPs: those of self-attention, and those of everything else
    sparse layer  =  dense self-attention x computed density / efficiency
    speed-up      =  1 / (1 - share x sparse x (1 - computed density / efficiency))

`share` is self-attention's part of a step's FLOPs, `sparse` the part of all (layer, step) pairs
that the schedule leaves to the method. `computed density` is the share of token pairs that a block
kernel computes, padding included. `efficiency` is the achieved share of the ideal 1 / computed
density: how much faster than dense attention the kernel is on this device, times its computed
density. It is measured once for a device and kept.

Counted, at 2 FLOPs for each multiplication and addition: the projections q, k, v and output of
self- and cross-attention, the two products of each, the feed-forward layers, and the embeddings
at both ends. Not counted: norms, activations, rotary embeddings, the text encoder, the autoencoder
and, for Wan 2.2 TI2V-5B, the timestep of each token, less than 2 %. So time is overrated where
attention runs at a higher rate than matrix products and underrated where it runs at a lower one,
and the speed-up is that of the denoising alone.
"""

import json
import math
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gen_accel import demo
from gen_accel.attention_processors import Neighborhood, Radial
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.families import wan
from gen_accel.attention_processors.lengths import PIXELS, nearest
from gen_accel.files import cache_folder, write_json
from gen_accel.functional import attention
from gen_accel.measure.timing import device_name, interleaved
from gen_accel.method import check_method, density_of, parts_of, plan_of
from gen_accel.plan import Plan
from gen_accel.version import __version__
from gen_accel.video import VideoShape

WORTH = 1.1  # the least speed-up that pays for a changed result
LONGEST = 1024  # frames
CALLS = 2  # of the transformer in a step: guidance runs it with the prompt and without
TEXT, IMAGE = 512, 257  # tokens that Wan's cross-attention sees
# Plans of more block pairs than this take gigabytes: the search for a length stops there.
MOST_PAIRS = 50_000_000

PRESETS: dict[str, dict[str, Any]] = {
    "Wan2.1-T2V-1.3B": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "Wan2.1-T2V-14B": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    "Wan2.2-T2V-A14B": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    "Wan2.2-TI2V-5B": {
        "num_attention_heads": 24,
        "num_layers": 30,
        "ffn_dim": 14336,
        "in_channels": 48,
        "out_channels": 48,
    },
}
NEEDED = ("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "patch_size")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Printable; `to_dict()` for a report.

    Args:
        num_frames, height, width: as a user gives them, in frames and pixels.
        video: the token grid that they make.
        density, computed_density: shares of the token pairs that are kept, and that are computed.
        attention_flops, sparse_attention_flops: of all self-attention in one step, both guidance
            calls, with every layer dense and with every layer sparse.
        step_flops: of the whole transformer in one dense step, both guidance calls.
        sparse_share: of the (layer, step) pairs, those that the schedule leaves sparse.
        efficiency: achieved share of the ideal 1 / computed density; `efficiency_from` says where
            it comes from.
        speedup: of the denoising.
        pays_from: the least number of frames from which the speed-up is at least 1.1, found by
            bisection at this height and width; None where there is none up to `searched_to`.
    """

    model: str
    method: Any
    schedule: Schedule
    steps: int
    num_frames: int
    height: int
    width: int
    video: VideoShape
    density: float
    computed_density: float
    attention_flops: float
    sparse_attention_flops: float
    step_flops: float
    sparse_share: float
    efficiency: float
    efficiency_from: str
    speedup: float
    pays_from: int | None
    searched_to: int

    @property
    def tokens(self) -> int:
        return self.video.tokens

    @property
    def attention_share(self) -> float:
        """Self-attention's part of a dense step's FLOPs."""
        return self.attention_flops / self.step_flops

    @property
    def limit(self) -> float:
        """The speed-up if sparse attention took no time at all."""
        return 1 / max(1 - self.attention_share * self.sparse_share, 1e-9)

    @property
    def pays(self) -> bool:
        return self.speedup >= WORTH

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "method": str(self.method),
            "schedule": str(self.schedule),
            "steps": self.steps,
            "num_frames": self.num_frames,
            "height": self.height,
            "width": self.width,
            "grid": list(self.video.grid),
            "tokens": self.tokens,
            "density": self.density,
            "sparsity": 1 - self.density,
            "computed_density": self.computed_density,
            "calls_per_step": CALLS,
            "attention_flops_per_step": self.attention_flops,
            "sparse_attention_flops_per_step": self.sparse_attention_flops,
            "flops_per_step": self.step_flops,
            "attention_share": self.attention_share,
            "sparse_share": self.sparse_share,
            "efficiency": self.efficiency,
            "efficiency_from": self.efficiency_from,
            "speedup": self.speedup,
            "speedup_limit": self.limit,
            "pays": self.pays,
            "pays_from_frames": self.pays_from,
            "searched_to_frames": self.searched_to,
        }

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.model}, {self.num_frames} frames of {self.height} x {self.width}: "
                f"{self.video} = {self.tokens} tokens",
                f"{self.method}, {self.schedule}, {self.steps} steps",
                f"density {self.density:.3f} (sparsity {1 - self.density:.3f}), "
                f"{self.computed_density:.3f} computed with padding",
                f"FLOPs a step, both guidance calls: self-attention {self.attention_flops:.3g} "
                f"dense, {self.sparse_attention_flops:.3g} sparse; whole transformer "
                f"{self.step_flops:.3g} dense, {self.attention_share:.0%} of it self-attention",
                f"predicted speed-up of the denoising: {self.speedup:.2f}x, with "
                f"{self.sparse_share:.0%} of the layers and steps sparse and a kernel efficiency "
                f"of {self.efficiency:.2f} ({self.efficiency_from}); free attention would give "
                f"{self.limit:.2f}x",
                self._verdict(),
            ]
        )

    def _verdict(self) -> str:
        if self.pays:
            return f"pays off ({WORTH}x or more) from {self.pays_from} frames at this size"
        if self.pays_from is None:
            longer = f"no length up to {self.searched_to} frames reaches {WORTH}x at this size"
        else:
            longer = f"it pays off ({WORTH}x or more) from {self.pays_from} frames at this size"
        return f"do not bother: {self.speedup:.2f}x is not worth a changed result; {longer}"


def estimate(
    pipe_or_config: Any,
    method: Any,
    *,
    height: int,
    width: int,
    num_frames: int,
    schedule: Schedule | None = None,
    steps: int = 50,
    efficiency: float | None = None,
) -> Estimate:
    """Tokens, density, FLOPs and speed-up of `method`, without running the model.

        size = {"height": 480, "width": 832, "num_frames": 81}
        print(gen_accel.estimate("Wan2.1-T2V-1.3B", Radial(), **size))

    The module's docstring has the formula and what is counted.

    Args:
        pipe_or_config: a Wan pipeline or transformer, a transformer's config, the folder of a
            saved pipeline, of which only two config files are read, or a name from `PRESETS`.
            Where the autoencoder is not known, it is taken for Wan's: 4 in time and, for 48 latent
            channels 16 in space, otherwise 8.
        height, width: pixels.
        num_frames: frames of the video, not latents.
        schedule: layers and steps that stay dense.
        steps: denoising steps, of which the schedule may keep a share dense.
        efficiency: achieved share of the ideal 1 / computed density, the kernel_efficiency
            that benchmarks/kernels.py writes. Without, it is measured on the device that the model
            is on, or on the best one there is, which takes seconds the first time and is kept in
            the cache folder.

    Raises:
        ValueError: a model that is not Wan's or is unknown, sizes that it cannot make, or a method
            that does not fit them.
    """
    schedule = schedule or Schedule()
    check_method(method)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if efficiency is not None and not 0 < efficiency < math.inf:
        raise ValueError(f"efficiency must be positive, got {efficiency}")
    model = _read(pipe_or_config)
    video = _grid(model, height, width, num_frames)
    density, computed, plan = _densities(method, video)  # before the seconds of a measurement

    if parts_of(method).is_dense:
        efficiency, source = 1.0, "the model's own attention"
    elif efficiency is not None:
        source = "given"
    else:
        windows = plan is not None and plan.partial is not None
        efficiency, source = _known_efficiency(model, windows)
    layers = [*range(model["num_layers"]), *range(len(model["vace_layers"]))]
    sparse_layers = sum(schedule.why_layer(layer) is None for layer in layers)
    sparse_steps = sum(schedule.why_step(step, steps) is None for step in range(steps))
    sparse_share = sparse_layers * sparse_steps / (len(layers) * steps)

    def predict(video: VideoShape, computed: float) -> float:
        attention_flops, rest = _flops(model, video)
        share = attention_flops / (attention_flops + rest)
        return 1 / max(1 - share * sparse_share * (1 - computed / efficiency), 1e-9)

    def pays(latents: int) -> tuple[bool, int]:
        clip = VideoShape(latents, video.height, video.width)
        try:
            _, computed, plan = _densities(method, clip)
        except ValueError:
            return False, 0  # a window longer than so short a clip
        return predict(clip, computed) >= WORTH, 0 if plan is None else plan.keep.numel()

    def frames(latents: int) -> int:
        return (latents - 1) * model.temporal + 1

    speedup = predict(video, computed)
    last = max(video.frames, (LONGEST - 1) // model.temporal + 1)
    if predict(VideoShape(last, video.height, video.width), 0.0) < WORTH:
        pays_from, searched = None, last  # not even if sparse attention took no time
    else:
        pairs = 0 if plan is None else plan.keep.numel()
        pays_from, searched = _search(pays, video.frames, last, speedup >= WORTH, pairs)
    attention_flops, rest = _flops(model, video)
    return Estimate(
        model=model.name,
        method=method,
        schedule=schedule,
        steps=steps,
        num_frames=num_frames,
        height=height,
        width=width,
        video=video,
        density=density,
        computed_density=computed,
        attention_flops=CALLS * attention_flops,
        sparse_attention_flops=CALLS * attention_flops * computed,
        step_flops=CALLS * (attention_flops + rest),
        sparse_share=sparse_share,
        efficiency=efficiency,
        efficiency_from=source,
        speedup=speedup,
        pays_from=None if pays_from is None else frames(pays_from),
        searched_to=frames(searched),
    )


@dataclass(frozen=True)
class _Model:
    """A Wan transformer's config, and the autoencoder's factors in time and space."""

    name: str
    config: Mapping[str, Any] = field(repr=False)
    temporal: int
    spatial: int
    device: torch.device
    dtype: torch.dtype

    def __getitem__(self, key: str) -> Any:
        return self.config[key]


def _read(source: Any) -> _Model:
    if isinstance(source, str | Path):
        return _read_name(str(source))
    if isinstance(source, Mapping):
        return _model(source.get("_class_name", wan.CLASSES[0]), source, {})
    if isinstance(source, nn.Module):
        module = getattr(source, "_orig_mod", source)  # of a compiled one
        return _model(type(module).__name__, _config_of(module), {}, module)
    found = (getattr(source, name, None) for name in ("transformer", "transformer_2"))
    module = next((module for module in found if module is not None), None)
    if module is None:
        raise ValueError(
            "pipe_or_config must be a pipeline, a transformer, its config, a folder or one of "
            f"{tuple(PRESETS)}, got {type(source).__name__}"
        )
    vae = getattr(source, "vae", None)
    return _model(
        type(source).__name__,
        _config_of(getattr(module, "_orig_mod", module)),
        {} if vae is None else vae.config,
        module,
        getattr(source, "_execution_device", None),
    )


def _read_name(name: str) -> _Model:
    folder = demo.path() if name == "demo" else Path(name).expanduser()
    if folder.is_dir():
        config = folder / "transformer" / "config.json"
        if not config.exists():
            raise ValueError(f"{folder} holds no transformer/config.json")
        vae = folder / "vae" / "config.json"
        known = json.loads(vae.read_text()) if vae.exists() else {}
        return _model(folder.resolve().name, json.loads(config.read_text()), known)
    preset = name.removeprefix("Wan-AI/").removesuffix("-Diffusers")
    if preset not in PRESETS:
        near = get_close_matches(preset, PRESETS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"model must be the folder of a saved pipeline or one of {tuple(PRESETS)}, "
            f"got {name!r}{hint}"
        )
    shape = {"attention_head_dim": 128, "patch_size": (1, 2, 2)}
    return _model(preset, shape | PRESETS[preset], {})


def _config_of(module: Any) -> Mapping[str, Any]:
    """With the class's name, by which a config is refused that is not Wan's."""
    return {**getattr(module, "config", {}), "_class_name": type(module).__name__}


def _model(
    name: str,
    config: Mapping[str, Any],
    vae: Mapping[str, Any],
    module: Any = None,
    device: torch.device | None = None,
) -> _Model:
    kind = config.get("_class_name", wan.CLASSES[0])
    if kind not in wan.CLASSES:
        raise ValueError(
            f"estimate counts the FLOPs of Wan alone ({', '.join(wan.CLASSES)}), got {kind}; "
            "attach and summary() tell the density of any model"
        )
    missing = [key for key in NEEDED if key not in config]
    if missing:
        raise ValueError(f"the config of {name} lacks {', '.join(missing)}")
    if config["patch_size"][0] != 1:
        raise ValueError(f"patch_size must be 1 in time, got {config['patch_size']}")
    config = {
        "in_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
        "vace_layers": (),
        "vace_in_channels": 96,
        **config,
    }
    config["out_channels"] = config.get("out_channels") or config["in_channels"]
    guess = 16 if config["out_channels"] == 48 else 8
    dtype = None
    if module is not None:
        weight = next(module.parameters())
        dtype, device = module.dtype, device or weight.device
    if device is None or device.type == "meta":
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    temporal = vae.get("scale_factor_temporal", 4)
    return _Model(name, config, temporal, vae.get("scale_factor_spatial", guess), device, dtype)


def _grid(model: _Model, height: int, width: int, num_frames: int) -> VideoShape:
    _, *patch = model["patch_size"]
    sides, wrong = [], []
    for name, size, p in (("height", height, patch[0]), ("width", width, patch[1])):
        step = math.lcm(PIXELS, model.spatial * p)
        if size < step or size % step:
            near = _nearest(size, step, step)
            wrong.append(f"{name} must be a multiple of {step}, got {size}; nearest: {near}")
        sides.append(size // (model.spatial * p))
    if num_frames < 1 or (num_frames - 1) % model.temporal:
        near = _nearest(num_frames, model.temporal, 1)
        wrong.append(
            f"num_frames must be 1 more than a multiple of {model.temporal}, got {num_frames}; "
            f"nearest: {near}"
        )
    if wrong:
        raise ValueError("\n".join(wrong))
    return VideoShape((num_frames - 1) // model.temporal + 1, *sides)


def _nearest(size: int, step: int, least: int) -> str:
    return " or ".join(map(str, nearest(size, step, least)))


def _flops(model: _Model, video: VideoShape) -> tuple[float, float]:
    """Of one call for one clip: both products of self-attention, and everything else."""
    N, C = video.tokens, model["num_attention_heads"] * model["attention_head_dim"]
    patch = math.prod(model["patch_size"])
    seen, extra = TEXT, model["added_kv_proj_dim"]
    control = len(model["vace_layers"])
    layers = model["num_layers"] + control
    attention_flops = layers * 4.0 * N * N * C

    # Multiplications in a block for each video token, each text token and each image token.
    video_side = 4 * C * C + 2 * C * C + 2 * C * model["ffn_dim"]
    block = N * video_side + TEXT * 2 * C * C
    if extra is not None:
        image = model["pos_embed_seq_len"] or IMAGE
        seen += image
        block += image * 2 * C * extra
    block += 2 * N * seen * C  # both products of cross-attention
    time = model["freq_dim"] * C + 7 * C * C
    ends = N * C * patch * (model["in_channels"] + model["out_channels"])
    ends += time + TEXT * (model["text_dim"] * C + C * C)
    if model["image_dim"] is not None:
        ends += (seen - TEXT) * model["image_dim"] * (model["image_dim"] + C)
    if control:
        ends += N * C * patch * model["vace_in_channels"] + (control + 1) * N * C * C
    return attention_flops, 2.0 * (layers * block + ends)


def _densities(method: Any, video: VideoShape) -> tuple[float, float, Plan | None]:
    """Kept and computed share of the token pairs, and the plan where there is one."""
    parts = parts_of(method)
    if parts.is_dense:
        return 1.0, 1.0, None  # runs the model's own attention
    if not parts.has_plan:  # depends on the values: its own word must do
        density = density_of(method, video)
        return density, density, None
    plan = plan_of(method, video)
    return plan.density, plan.computed_density, plan


def _search(
    pays: Callable[[int], tuple[bool, int]], asked: int, last: int, asked_pays: bool, pairs: int
) -> tuple[int | None, int]:
    """The least length that pays off, and the longest that was looked at, in latent frames.

    Upwards by doubling where the length asked for does not pay off, then by bisection.

    Args:
        pays: whether a length pays off, and how many pairs of blocks its plan holds.
        pairs: the latter for the length asked for.
    """
    low, high = (0, asked) if asked_pays else (asked, asked)
    while low == high:
        room = math.floor(low * (MOST_PAIRS / max(pairs, 1)) ** 0.5)
        last = min(last, max(low, room))
        high = min(2 * low, last)
        if high == low:
            return None, low
        good, pairs = pays(high)
        low = low if good else high
    searched = high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle)[0] else (middle, high)
    return high, searched


def _known_efficiency(model: _Model, windows: bool) -> tuple[float, str]:
    """From the cache, or measured now and kept there; with words on where it comes from."""
    dim, name = model["attention_head_dim"], device_name(model.device)
    dtype = str(model.dtype).removeprefix("torch.")
    key = " | ".join(
        [
            name,
            f"torch {torch.__version__}",
            dtype,
            f"head dim {dim}",
            "windows" if windows else "blocks",
            f"gen_accel {__version__}",
        ]
    )
    path = cache_file()
    known = _read_cache(path)
    if key not in known:
        known[key] = measure_efficiency(model.device, model.dtype, dim, windows)
        try:
            write_json(path, known)
        except OSError as error:
            warnings.warn(f"cannot keep the kernel efficiency: {error}", stacklevel=3)
    return known[key], f"measured on {name}, {dtype}"


def cache_file() -> Path:
    """Where measured efficiencies are kept. Delete it to measure anew."""
    return cache_folder() / "efficiency.json"


def _read_cache(path: Path) -> dict[str, float]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # none yet, or not ours any more: it is only a cache
    return known if isinstance(known, dict) else {}


@torch.no_grad()
def measure_efficiency(
    device: torch.device, dtype: torch.dtype, head_dim: int, windows: bool
) -> float:
    """Speed-up over dense SDPA times computed density, by the kernel that "auto" picks.

    One small case at a density of about 0.1, whose frames the tiles divide: about 8k tokens on the
    CPU, where this takes a few seconds, and about 33k on a GPU, which less would not fill.

    Args:
        windows: for methods with a rule on token pairs inside their blocks, which costs more.
    """
    on_cpu = device.type == "cpu"
    video, heads = (VideoShape(57, 12, 12), 2) if on_cpu else (VideoShape(228, 12, 12), 12)
    method = Radial(decay_factor=0.15 if on_cpu else 1.5)
    if windows:
        method = Neighborhood((-1, 4, 4))
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, video.tokens, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    seconds = interleaved(
        {
            "dense": lambda: nn.functional.scaled_dot_product_attention(q, k, v),
            "sparse": lambda: attention(q, k, v, video=video, method=method),
        },
        rounds=3 if on_cpu else 10,
        device=device,
    )
    speedup = statistics.median(seconds["dense"]) / statistics.median(seconds["sparse"])
    return speedup * method.plan(video).computed_density
