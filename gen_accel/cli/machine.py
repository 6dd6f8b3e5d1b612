"""`gen-accel list`, `models`, `build` and `doctor`: what there is and what runs here."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import groupby
from textwrap import wrap
from typing import TYPE_CHECKING

from gen_accel import published
from gen_accel.cli.app import app
from gen_accel.cli.loading import FOR_PIPELINES, FOR_WEIGHTS, loading, without
from gen_accel.cli.printing import FiguresConfig, hanging, terminal_width
from gen_accel.cli.verb import verb
from gen_accel.config import option
from gen_accel.pipelines.generation.progress import waiting

if TYPE_CHECKING:
    from gen_accel.cli.inventory import KernelInfo, MethodInfo, ModelInfo
    from gen_accel.measure.machine import Check

GROUPS = {
    "video": "Video, every token sees every frame:",
    "frames": "Video, each frame attends by itself:",
    "image": "Images:",
}


class ModelsConfig(FiguresConfig):
    """The models to list."""

    name: str | None = option(
        None, "Models", "Family, class of diffusers or published model to say more of."
    )


@verb(app, FiguresConfig, short_help="Methods with their options, and kernels.")
def list_(config: FiguresConfig) -> None:
    """Methods with their options, and kernels with where they run.

    \b
    gen-accel list
    gen-accel generate ... --method radial --set decay_factor=0.5 --set sink=false
    gen-accel list --json -

    A kernel that cannot run on this machine is listed with the reason.
    """
    with without(*FOR_PIPELINES), loading():
        from gen_accel.cli import inventory

    methods, kernels = inventory.methods(), inventory.kernels()
    data = {
        "methods": [asdict(method) for method in methods],
        "trained_methods": {name: one._asdict() for name, one in published.METHODS.items()},
        "few_steps": [one._asdict() for one in published.FEW_STEPS],
        "kernels": [asdict(kernel) for kernel in kernels],
    }
    config.show(_list_lines(methods, kernels), data)


@verb(app, ModelsConfig, short_help="The models that are served.", positional=("name",))
def models(config: ModelsConfig) -> None:
    """Models that are served, one a line: methods, LoRA training, longer video and image prompts;
    and refused ones, with the reason.

    \b
    gen-accel models
    gen-accel models wan                 all that is known of a family, or of one class
    gen-accel models Wan2.1-T2V-14B
    gen-accel models --json models.json
    """
    is_short = config.name is None and config.json_file is None  # asks no pipeline
    with without(*FOR_PIPELINES if is_short else FOR_WEIGHTS):
        with loading():
            from gen_accel.cli import inventory

        if config.name is not None:
            found = inventory.matching(config.name)
            lines = [line for model in found for line in (*_details(model), "")][:-1]
        else:
            found = inventory.models()
            lines = [*_models_lines(found)]
        config.show(lines, None if is_short else [_as_data(model) for model in found])


@verb(app, FiguresConfig, short_help="Compile the CPU kernel for this machine.")
def build(config: FiguresConfig) -> None:
    """Compile the kernel `native` for this machine: 15 seconds, once. It is the fastest on a CPU,
    forward and backward, and "auto" takes it from then on; all methods run without it too.

    Needs a C++ compiler, on Linux and x86-64. Lies in the user's cache; a new version, another
    torch or another processor needs another build.

    \b
    gen-accel build
    """
    with loading(None):
        from gen_accel.kernels.native.build import build as compile_kernel

    try:
        with waiting("compiling"):
            path = str(compile_kernel())
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    config.show([path], {"kernel": "native", "file": path})


@verb(app, FiguresConfig, short_help="Versions, devices, and what is missing.")
def doctor(config: FiguresConfig) -> None:
    """Versions and devices, what is missing, and the command that adds it.

    \b
    gen-accel doctor
    gen-accel doctor --json machine.json
    """
    with loading():
        from gen_accel.measure.machine import checks

    found = checks()
    config.show(_doctor_lines(found), [asdict(check) for check in found])


def _list_lines(methods: Iterable["MethodInfo"], kernels: Iterable["KernelInfo"]) -> Iterator[str]:
    yield "Methods, which change the answer:"
    for method in methods:
        yield ""
        yield from hanging(f"  {method.name}: ", method.description)
        for field, one in method.fields.items():
            yield from hanging(f"    {field}={one.default}".ljust(30) + " ", one.type)
    yield ""
    yield "Methods as published weights were trained:"
    for name, one in published.METHODS.items():
        yield ""
        yield from hanging(f"  {name}: ", one.about)
        yield from hanging("    = ", " ".join((one.method, *one.settings)))
    yield ""
    yield "Published weights of few steps, which generate samples by itself:"
    for one in published.FEW_STEPS:
        yield ""
        yield from hanging(f"  {one.about}: ", f"{one.as_stream or one.words}; {one.source}")
    yield ""
    yield "Kernels, which do not:"
    places = set()
    for kernel in kernels:
        places |= {*kernel.refused}
        yield ""
        yield from hanging(f"  {kernel.name}: ", kernel.description)
        for where, reasons in kernel.refused.items():
            verdict = f"no: {'; '.join(reasons)}" if reasons else "yes"
            yield from hanging(f"    {where}".ljust(19) + " ", verdict)
    yield ""
    if not any(place.startswith("cuda") for place in places):
        yield "No CUDA device is here: what runs on one is not listed."
    yield "Models: see `gen-accel models`."


def _models_lines(found: list["ModelInfo"]) -> Iterator[str]:
    """One line a model, by what its attention sees; then what is missing and what is refused."""
    import diffusers

    served = [model for model in found if not model.refused]
    names = max(len(model.family) for model in served)
    wide = terminal_width() - names - len("  methods  LoRA  longer  image") - 2
    for kind, title in GROUPS.items():
        yield title
        yield f"  {'family':<{names}}{'':<{wide}}  methods  LoRA  longer  image"
        some = [model for model in served if model.kind == kind]
        for family, members in groupby(some, key=lambda model: model.family):
            group = [*members]
            methods = len({name for model in group for name in model.methods})
            images = any(model.image_prompts for model in group)
            words = (group[0].training, group[0].longer, images)
            train, longer, image = ("yes" if word else "-" for word in words)
            cells = f"  {methods:>7}  {train:>4}  {longer:>6}  {image:>5}"
            first, *rest = wrap(group[0].models, wide - 2) or [""]
            yield f"  {family:<{names}}  {first:<{wide - 2}}{cells}"
            yield from (f"  {'':<{names}}  {line}" for line in rest)
        yield ""
    yield from hanging(
        "",
        "methods: how many of `gen-accel list` leave something out there. LoRA: `gen-accel train` "
        "trains it. longer: techniques of --extend. image: image prompts. `gen-accel models "
        "FAMILY` says more.",
    )
    missing = [model.name for model in found if not model.here]
    if missing:
        yield from hanging(
            f"diffusers {diffusers.__version__} does not have: ", ", ".join(missing)
        )
    for model in found:
        if model.refused:
            yield from hanging(f"{model.name} cannot be served: ", model.refused)


def _details(model: "ModelInfo") -> Iterator[str]:
    """All that is known of a model."""
    from gen_accel.cli import inventory

    yield model.name
    if model.refused:
        yield from hanging("  cannot be served: ", model.refused)
        return
    rows = {
        "models": model.models,
        "family": model.family,
        "published": ", ".join(model.published) or "none that `estimate` knows",
        "methods": inventory.methods_of(model),
        "tokens": model.order,
        "generate from": ", ".join(inventory.inputs_of(model)) or "no: in Python, by `attach`",
        "trained by": "gen-accel train" if model.training else "not by gen-accel train",
        "longer": "techniques of --extend" if model.longer else "no",
        "image prompts": "yes" if model.image_prompts else "no",
        "single file": "yes" if model.single_file else "no",
    }
    rows |= {f"LoRA, {group}": ", ".join(targets) for group, targets in model.lora_targets.items()}
    if not model.here:
        rows["missing"] = "the installed diffusers does not have it"
    width = max(map(len, rows)) + 4
    for name, value in rows.items():
        yield from hanging(f"  {name}".ljust(width), value)


def _as_data(model: "ModelInfo") -> Mapping[str, object]:
    from gen_accel.cli import inventory

    if model.refused:
        return {"name": model.name, "refused": model.refused}
    return asdict(model) | {"generate_from": inventory.inputs_of(model)}


def _doctor_lines(found: list["Check"]) -> Iterator[str]:
    width = max(len(check.name) for check in found) + 2
    for check in found:
        yield from hanging(check.name.ljust(width), check.found or "missing")
    yield ""
    for check in found:
        if check.found is None:
            command, _, note = check.fix.partition("  (")
            yield f"{check.name}:"
            yield from hanging("  ", command)
            if note:
                yield from hanging("  ", f"({note}")
