"""Names that users choose by, known without the slow imports of the things that they name; and
the checks of a class that is added, and of a package that a choice needs or that speaks of parts
which nothing runs."""

import inspect
import json
import logging
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Literal, NamedTuple, get_args
from urllib.parse import urlsplit
from urllib.request import url2pathname

from gen_accel.parsing import shown

# A public name this similar to a part that a class leaves at its default is a misspelling.
NEAR = 0.85
METHODS = {  # the module and class of each, in attention_processors.methods
    "dense": "dense:Dense",
    "piecewise": "piecewise:Piecewise",
    "radial": "radial:Radial",
    "neighborhood": "neighborhood:Neighborhood",
    "block_mixture": "block_mixture:BlockMixture",
    "sparse_linear": "sparse_linear:SparseLinear",
    "reuse": "reuse:Reuse",
    "profiled": "profiled:Profiled",
    "vsa": "vsa:VSA",
}


class RulePreset(NamedTuple):
    """A preset by rule.

    Args:
        critical: density of `Piecewise`.
        start: share of the steps that stay dense, from the second on.
        layers: the first blocks that stay dense.
    """

    critical: float
    start: float
    layers: int


TEXT, FIRST, LAST, VIDEO = KINDS = ("text", "first frame", "last frame", "video")  # of input
KERNELS = (
    *("triton", "fa4", "natten", "native", "flex", "xformers", "routed", "gather", "int8"),
    "triton_int8",
    "reference",
)
# Packages that hold the weights of a model's blocks in 8 or 4 bits, and all ways to hold them so.
QUANTISERS = {"int8": "torchao", "nf4": "bitsandbytes"}
Quantised = Literal["fp8", "int8", "nf4"]
# Caches of diffusers with their numbers: how much may change from step to step, and for taylorseer
# how many steps lie between two that are computed.
CACHES: dict[str, float] = {"first_block": 0.05, "taylorseer": 5, "sea": 0.25}
MOST_INTERVAL = 1000
LinearKernel = Literal["auto", "torch", "onednn"]  # of linear layers on a CPU
EXPERTS = ("transformer", "transformer_2")  # of pipelines with two: for high noise, for low
TECHNIQUES = (
    *("riflex", "position_interpolation", "ultravico", "rotating_anchors", "window_noise"),
    *("continuation", "fresh_noise"),
)
SAMPLERS = ("euler", "unipc", "lcm", "dpmpp_2m_sde")  # on exact levels, see `pipelines.sampler`
DRAWING = ("lcm", "dpmpp_2m_sde")  # of `SAMPLERS`, which draw noise at each step
MOST_FEW = 12  # steps, up to which one that is wasted counts
OWN_NOISE = ("fresh_noise", "window_noise")  # of `TECHNIQUES`
DAMPENING = ("ultravico",)  # of `TECHNIQUES`: a gain on scores, which goes with no rest
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # names of this machine to itself
KEEP_MINUTES = 10.0  # that a model stays in the memory of a page or server
# As the published methods were measured at: a fifth to a quarter of the steps dense and the first
# block (Radial Attention, https://arxiv.org/abs/2506.19852, table 1), densities of 0.1 to 0.3
# (PISA, https://arxiv.org/abs/2602.01077; SLA, https://arxiv.org/abs/2509.24006).
RULES = {
    "quality": RulePreset(0.3, 0.25, 1),
    "balanced": RulePreset(0.2, 0.2, 1),
    "fast": RulePreset(0.1, 0.15, 0),
}
PRESETS = tuple(RULES)
PRESET = "balanced"  # the attention where none is chosen
WITHOUT_REST = "radial"  # the method where none is chosen and a technique dampens scores
Cost = Literal["seconds", "density"]  # that `tune` makes small
# Change of a weight: a product of two matrices; the product by element of two such; a Kronecker
# product.
LoraKind = Literal["lora", "loha", "lokr"]
Scale = Literal["mean", "even", "worst"]  # of errors over its prompts
Axis = Literal["steps", "layers", "heads"]
AXES: tuple[Axis, ...] = get_args(Axis)
METRICS = ("lpips", "vmaf", "cvvdp")  # beside PSNR and SSIM
DEFAULT_METRICS = ("lpips", "vmaf")  # if they can be computed
NOT_ASKED = "not asked for"  # why a metric has no figure
DTYPES = ("float32", "bfloat16", "float16")
# Characters of a prompt: text encoders read 200 to 1,000 tokens, and leave out the rest.
MOST_PROMPT = 10_000
LEAST_TOKENS = 4_000  # of a clip: below, attention is too small a part of a step to gain by
# Below, no later steps make errors good; then as much is kept as benchmarks/results/few_steps.json
# shows to keep clips right.
LEAST_STEPS, LEAST_DENSITY = 10, 0.2
MOST_TOKENS = 2_000_000  # of a grid that is drawn, or that a preset's file names
LORA_FORMATS = ("comfyui",)  # of `export`
OFFLOADS = ("none", "model", "group", "sequential")
DEVICES = ("cpu", "cuda", "mps", "xpu", "npu", "hpu", "mlu", "musa", "mtia")
# Messages of parts that do not load on a machine and that nothing here runs: the package, the
# logger that speaks of it, and how it begins or goes on.
MESSAGES = (
    ("torchao", "torchao", "Failed to load "),
    ("torchao", "torch.utils._pytree", "is an Enum subclass and is now natively supported"),
    (
        *("torchao", "diffusers.quantizers.torchao.torchao_quantizer"),
        "Unable to import `torchao` Tensor objects",
    ),
    ("bitsandbytes", "bitsandbytes.cextension", "was compiled without GPU support"),
    ("bitsandbytes", "bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit"),
    ("bitsandbytes", "kernels.hf_hub", "Skipping publisher trust check"),  # without a network
    ("torch", "torch.utils.cpp_extension", "No CUDA runtime is found"),  # by its wheels for CUDA
    ("torchvision", "transformers.utils.import_utils", "requires torchvision (not installed)"),
)


def too_small(tokens: int, steps: int, sparse: Collection[int] | None = None) -> str:
    """Say why sparse attention gains nothing in a run of so many tokens, or how it is to be set in
    so few steps; "" for larger runs, and where the second step is none of those that are `sparse`:
    what attention leaves out of it costs a clip most."""
    if tokens < LEAST_TOKENS:
        return (
            f"below about {LEAST_TOKENS:,} tokens sparse attention gains nothing, and this clip "
            f"has {tokens:,}"
        )
    if steps < LEAST_STEPS and (sparse is None or 1 in sparse):
        return (
            f"in fewer than {LEAST_STEPS} steps, {steps} here, no later ones make errors good: "
            f"keep some dense from the second on, dense_start={RULES[PRESET].start:g}, and at "
            f"least {LEAST_DENSITY:g} of the blocks"
        )
    return ""


class InFourSteps(NamedTuple):
    """Cost of a cache in four steps, the mean over the clips of 33 frames in
    benchmarks/results/few_steps.json.

    Args:
        skipped: steps that were not computed.
        psnr: in dB, to the clip without.
    """

    skipped: float
    psnr: float


IN_FOUR_STEPS = {"taylorseer": InFourSteps(1, 26.0)}  # of `CACHES`


def cached_in_few(cache: str | None, steps: int) -> str:
    """Say what a cache costs in so few steps; "" in more, and of what is not in `IN_FOUR_STEPS`.

    Args:
        cache: NAME or NAME:NUMBER; None for none.
    """
    name = "" if cache is None else split_cache(cache)[0]
    one = IN_FOUR_STEPS.get(name)
    if steps >= LEAST_STEPS or one is None:
        return ""
    return (
        f"in fewer than {LEAST_STEPS} steps, {steps} here, each is unlike the last: of 4 {name} "
        f"skips {one.skipped:g}, and the clip ends {one.psnr:.1f} dB from the one without; leave "
        "the cache out"
    )


def check_method(name: str) -> None:
    """Raise ValueError, with the nearest name, for a method that is not known. "module:Class" is
    known by its import alone, a registered one once the methods are loaded."""
    from gen_accel import published  # which attaching a method does not need

    loaded = "gen_accel.attention_processors" in sys.modules
    if name not in METHODS and name not in published.METHODS and ":" not in name and not loaded:
        hint = nearest_to(name, [*METHODS, *published.METHODS])
        raise ValueError(f"method must be one of {tuple(METHODS)}, got {shown(name)}{hint}")


def check_kernel(kernel: str, what: str = "kernel") -> None:
    """Raise ValueError, with the nearest name, unless `kernel` is "auto" or in `KERNELS`.

    Args:
        what: name of the argument, for the message.
    """
    if kernel != "auto" and kernel not in KERNELS:
        hint = nearest_to(kernel, KERNELS)
        raise ValueError(f"{what} must be 'auto' or one of {KERNELS}, got {shown(kernel)}{hint}")


def check_device(device: str) -> None:
    """Raise ValueError for a device of no kind of `DEVICES`."""
    if device != "auto" and device.partition(":")[0] not in DEVICES:
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {shown(device)}")


def split_technique(given: str) -> tuple[str, tuple[str, ...]]:
    """Split "fresh_noise:shift=22" into the name of a technique and its settings, with a colon
    before each."""
    name, *settings = given.split(":")
    return name, tuple(settings)


def check_techniques(names: Sequence[str], what: str = "technique") -> None:
    """Raise ValueError for a name that is not in `TECHNIQUES`; settings are not looked at."""
    for name in names:
        if split_technique(name)[0] not in TECHNIQUES:
            raise ValueError(f"{what} must be one of {', '.join(TECHNIQUES)}, got {shown(name)}")


def split_cache(given: str) -> tuple[str, float]:
    """Split "first_block:0.1" into the name of a cache and its number, by default its own.

    Raises ValueError for a name that is not in `CACHES`, and a number that is none of it.
    """
    name, colon, text = given.partition(":")
    if name not in CACHES:
        hint = nearest_to(name, [*CACHES])
        raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {shown(name)}{hint}")
    usual = CACHES[name]
    try:
        number = type(usual)(text) if colon else usual
    except ValueError:
        number = -1
    if not 1 < number <= MOST_INTERVAL if isinstance(usual, int) else not 0 < number < inf:
        rule = f"a whole number from 2 to {MOST_INTERVAL}" if isinstance(usual, int) else "above 0"
        raise ValueError(f"the number of cache {name} must be {rule}, got {shown(text)}")
    return name, number


def check_metrics(metrics: Sequence[str] | None) -> None:
    """Raise ValueError, with the nearest name, for a metric that is not in `METRICS`."""
    for name in metrics or ():
        if name not in METRICS:
            hint = nearest_to(name, METRICS)
            raise ValueError(
                f"metrics beside PSNR and SSIM are {', '.join(METRICS)}, got {shown(name)}{hint}"
            )


def check_loading(dtype: str, offload: str, quantize: str | None = None) -> None:
    """Raise ValueError for an unknown dtype or offload word, and for offloading that takes apart
    what a package holds together."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {shown(dtype)}")
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be one of {OFFLOADS}, got {shown(offload)}")
    if quantize in QUANTISERS and offload in OFFLOADS[2:]:
        raise ValueError(
            f"quantize {quantize} does not go with offload {offload}, which takes apart what "
            f"{QUANTISERS[quantize]} holds together: take offload model, or quantize fp8"
        )


def check_export(out: str | Path, format: str, dtype: str) -> None:
    """Raise ValueError for an unknown format or dtype of a LoRA, or a file of another ending."""
    if format not in LORA_FORMATS:
        hint = nearest_to(format, LORA_FORMATS)
        raise ValueError(f"format must be {', '.join(LORA_FORMATS)}, got {shown(format)}{hint}")
    if dtype not in DTYPES:
        hint = nearest_to(dtype, DTYPES)
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {shown(dtype)}{hint}")
    if Path(out).suffix != ".safetensors":
        raise ValueError(f"out must end in .safetensors, got {out}")


def other_steps(preset: object, solved: int, steps: int) -> ValueError:
    """Make the error for a preset that was solved for another number of steps.

    Args:
        preset: its file, name or contents.
    """
    named = isinstance(preset, str | Path)
    file = preset if named and preset not in PRESETS else "FILE"
    return ValueError(
        f"{preset if named else 'the preset'} was solved for {solved} steps, not {steps}: "
        f"gen-accel tune --preset {file} --steps {steps} --out NEW.json solves it again"
    )


def nearest_to(name: object, known: Sequence[str], cutoff: float = 0.6) -> str:
    """Suggest the nearest of `known`, as the end of a message."""
    near = get_close_matches(str(name), known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


@contextmanager
def needed_for(what: str, *, extra: str) -> Iterator[None]:
    """Name the command that installs a package if an import inside does not find it.

    >>> with needed_for("writing a video", extra="video"):
    ...     import av

    Args:
        what: begins the sentence, as in "writing a video needs av".
        extra: of pyproject.toml, which brings the package.

    Raises:
        ModuleNotFoundError: one line, with the package and the command.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        if package == __package__:  # a fault of ours, which no package mends
            raise
        raise ModuleNotFoundError(needs(what, package, extra), name=error.name) from None


def check_package(what: str, package: str, *, extra: str) -> None:
    """Raise ModuleNotFoundError as `needed_for` for a package that is not there, without importing
    it."""
    if find_spec(package) is None:
        raise ModuleNotFoundError(needs(what, package, extra), name=package)


def needs(what: str, package: str, extra: str) -> str:
    """Write that a choice needs a package, and the command that adds the extra with it."""
    return f"{what} needs {package}: {install(extra)}"


def install(extra: str) -> str:
    """Write the command that adds an extra: from the folder that gen_accel was installed from, or
    by its name."""
    from importlib.metadata import PackageNotFoundError, distribution  # which takes a while

    place, told = "gen_accel", None
    with suppress(PackageNotFoundError):
        told = distribution(place).read_text("direct_url.json")  # of pip, see PEP 610
    found = json.loads(told or "{}")
    if "dir_info" in found and found["url"].startswith("file:"):
        folder = Path(url2pathname(urlsplit(found["url"]).path))
        if (folder / "pyproject.toml").is_file():
            place = "." if folder == Path.cwd() else str(folder)
    return f'pip install "{place}[{extra}]"'


def _without(words: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: words not in record.getMessage()


_FILTERS = [(package, logger, _without(words)) for package, logger, words in MESSAGES]


def hide_load_failures(asked: Collection[str] = ()) -> None:
    """Hide what optional packages say of parts that do not load on this machine. Call it before
    diffusers is imported, which says them.

    Args:
        asked: packages that are to run, whose messages are shown.
    """
    for package, logger, one in _FILTERS:
        if package in asked:
            logging.getLogger(logger).removeFilter(one)
        else:
            logging.getLogger(logger).addFilter(one)


def check_subclass(kind: type, base: type, what: str) -> None:
    """Check what a class adds to `base`, whose public attributes and `__call__` are the parts.

    Args:
        what: a noun for instances of `base`, for errors: "method".

    Raises:
        ValueError: a part of the wrong type, a part that does not take the arguments that `base`
            declares, or a public name that looks like a misspelt part. Options, which are
            annotated, may have any name.
    """
    parts = {name for name in vars(base) if not name.startswith("_")}
    own = dict(vars(kind))
    for name, value in own.items():
        if name in parts or (name == "__call__" and name in vars(base)):
            _check_part(kind, base, name, value)
    left = [name for name in parts if getattr(kind, name) is getattr(base, name)]
    plain = {name.replace("_", ""): name for name in left}
    for name in own.keys() - parts - _annotated(kind):
        near = get_close_matches(name.replace("_", "").lower(), plain, n=1, cutoff=NEAR)
        if near and not name.startswith("_"):
            raise ValueError(
                f"no part of a {what} is called {name!r}, got {kind.__name__}.{name}; did you "
                f"mean {plain[near[0]]!r}? For another purpose choose another name, or one that "
                "begins with _"
            )


def check_takes(kind: type, name: str, *positional: str, **keywords: None) -> None:
    """Raise ValueError unless the function `name` of a class takes these arguments beside self."""
    taken = inspect.signature(getattr(kind, name))
    try:
        taken.bind(None, *positional, **keywords)
    except TypeError:
        star = ", *, " if positional and keywords else ""
        names = ", ".join([*taken.parameters][1:])
        raise ValueError(
            f"{name} of {kind.__name__} must take ({', '.join(positional)}{star}"
            f"{', '.join(keywords)}), it takes ({names})"
        ) from None


def _check_part(kind: type, base: type, name: str, value: object) -> None:
    declared = vars(base)[name]
    if not callable(declared) and not isinstance(declared, classmethod):
        default = getattr(base(), name)
        plain = isinstance(value, bool | int | float | str | tuple | list | dict | None)
        wrong = plain and type(value) is not type(default)
        short = isinstance(value, tuple) and default and len(value) != len(default)
        if wrong or short or inspect.isfunction(value):
            raise ValueError(
                f"{name} of {kind.__name__} must be of type {type(default).__name__}, such as "
                f"{default!r}, got {shown(value)}"
            )
        return
    wanted = [*inspect.signature(getattr(base, name)).parameters.values()]
    if isinstance(declared, classmethod):
        wanted = [inspect.Parameter("cls", inspect.Parameter.POSITIONAL_ONLY), *wanted]
    positional = [one.name for one in wanted[1:] if one.kind is not one.KEYWORD_ONLY]
    keywords = [one.name for one in wanted[1:] if one.kind is one.KEYWORD_ONLY]
    if not callable(value) and not isinstance(value, classmethod | property):
        said = ", ".join(positional + keywords)
        raise ValueError(
            f"{name} of {kind.__name__} must be a method {name}({said}), got {shown(value)}"
        )
    if inspect.isfunction(value):
        check_takes(kind, name, *positional, **dict.fromkeys(keywords))


def _annotated(kind: type) -> set[str]:
    try:
        return {*inspect.get_annotations(kind)}
    except NameError:  # Python 3.14 evaluates them, and one may be known to type checkers alone
        return {*vars(kind)}
