"""Parameters of methods that come with weights: found in their files, kept on the transformer,
and used by `attach`.

diffusers has no place for them, and leaves them out without a word. They are named

    blocks.0.to_gate_compress.weight                          FastWan's gates of VSA
    transformer_blocks.0.attn.to_gate_compress.set_weight     FastH3's, in an adapter
    blocks.0.self_attn.attn_op.local_attn.proj_l.weight       TurboWan's linear branches of SLA
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gen_accel.attention_processors.attached.clock import KEPT, served_transformers
from gen_accel.attention_processors.families import family_of
from gen_accel.method import Method
from gen_accel.parsing import shown
from gen_accel.paths import expanded

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

GATE, LINEAR = "to_gate_compress", "proj_l"
TRAINED = re.compile(
    r"(?:(?:transformer|diffusion_model|net)\.)?(.+?)\.(?:attn_op\.)?(?:local_attn\.)?"
    rf"({GATE}|{LINEAR})\.(?:set_)?(weight|bias)"
)


class Part(NamedTuple):
    """Parameters of one layer that a method has.

    Args:
        what: in words.
        part: of the method, "branch" or "gate".
        own: its layer in that part.
        use: how it is attached.
    """

    what: str
    part: str
    own: str
    use: str


PARTS = {
    GATE: Part(
        "gates of VSA",
        "gate",
        GATE,
        "attach VSA(critical), with 1 - the sparsity of its training, 0.2 for FastWan and 0.1 for "
        "FastH3; on a command line --method vsa --set critical=0.2",
    ),
    LINEAR: Part(
        "linear branches of SLA",
        "branch",
        "proj",
        "attach SparseLinear(0.1, linear_over='all', tile='raster'), with the share and blocks of "
        "its training; on a command line --method sparse_linear --set linear_over=all",
    ),
}


class Trained(NamedTuple):
    """Parameters that one file or folder brought.

    Args:
        kind: of `PARTS`.
        layers: the parameters of each layer, by the name of its block and their own.
    """

    origin: str
    kind: str
    layers: Mapping[str, Mapping[str, Tensor]]


def trained_of(transformer: nn.Module) -> Trained | None:
    """Return the parameters that came with a transformer's weights."""
    return getattr(transformer, KEPT, None)


def keep_trained(
    transformer: nn.Module, tensors: Mapping[str, Tensor], origin: object, weight: float = 1.0
) -> None:
    """Keep parameters on a transformer, in the place of earlier ones, until a method is attached.

    Args:
        tensors: by their names in the file.
        origin: file or folder, for errors.
        weight: factor of the parameters.

    Raises:
        ValueError: of no block of the model, of another size, not finite, or of two kinds.
    """
    from gen_accel.io import named, not_finite

    if wrong := not_finite(tensors):
        raise ValueError(f"{origin} holds NaN or infinity in {named(map(shown, wrong))}")
    sites = family_of(transformer).self_attentions(transformer)
    found: dict[str, dict[str, Tensor]] = {}
    kinds, name = set(), type(transformer).__name__
    for key, x in tensors.items():
        match = TRAINED.fullmatch(key)
        assert match is not None
        place, kind, part = match.groups()
        site = next((s for s in sites if f"{place}.".startswith(f"{s.name}.")), None)
        what = PARTS[kind].what
        if site is None:
            raise ValueError(f"{origin} holds {shown(key)}, {what} of no attention of {name}")
        inner = (site.dim, site.dim) if kind == LINEAR else (site.heads * site.dim, site.width)
        wanted = inner[: 2 if part == "weight" else 1]
        if x.shape != wanted:
            raise ValueError(
                f"{shown(key)} of {origin} must be {wanted} for {name}, got {tuple(x.shape)}"
            )
        kinds.add(kind)
        own = found.setdefault(site.name, {})
        own[f"{PARTS[kind].own}.{part}"] = x * weight if weight != 1 else x
    if len(kinds) > 1:
        raise ValueError(f"{origin} holds {' and '.join(PARTS[one].what for one in kinds)}")
    lacking = [name for name, own in found.items() if not any("weight" in key for key in own)]
    if lacking:
        raise ValueError(f"{origin} lacks the weights of {named(lacking)}, beside their biases")
    kept = Trained(str(origin), kinds.pop(), found) if found else None
    setattr(transformer, KEPT, kept)


def load_trained(pipe: "DiffusionPipeline", model: str | Path) -> int:
    """Load what a pipeline's own weights have for a method and diffusers left out, for `attach` to
    use, and return in how many layers:

        pipe = WanPipeline.from_pretrained("FastVideo/FastWan2.1-T2V-1.3B-Diffusers")
        gen_accel.load_trained(pipe, "FastVideo/FastWan2.1-T2V-1.3B-Diffusers")
        gen_accel.attach(pipe, VSA(0.2))

    Args:
        model: the folder or repository that the pipeline was loaded from.

    Raises:
        OSError: neither a folder nor a repository that is there.
        ValueError: parameters that do not fit the model.
    """
    from gen_accel.hub import downloaded

    count = 0
    for part, transformer in served_transformers(pipe).items():
        folder = expanded(model)
        if not folder.is_dir():
            folder = downloaded(str(model), [f"{part}/*.safetensors"])
        held = trained_in(sorted((folder / part).glob("*.safetensors")))
        keep_trained(transformer, held, model)
        kept = trained_of(transformer)
        count += 0 if kept is None else len(kept.layers)
    return count


def trained_in(files: list[Path]) -> dict[str, Tensor]:
    """Read such parameters in some files of a model; of the others the header alone."""
    found = {}
    for path in files:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if TRAINED.fullmatch(name)]  # noqa: SIM118
            found |= {name: file.get_tensor(name) for name in names}
    return found


def check_files_used(held: Mapping[str, Iterable[Path]], method: Method) -> None:
    """Raise ValueError for a method that leaves out what files hold, by their headers, before
    anything is loaded.

    Args:
        held: files by where they come from, in the order of loading: what a later one holds takes
            the place of an earlier one's.
    """
    kept = None
    for origin, files in held.items():
        names: list[re.Match[str]] = []
        for path in files:
            # Whoever loads a broken file says what is wrong.
            with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
                names += filter(None, map(TRAINED.fullmatch, file.keys()))
        if names:
            kept = origin, names[0][2], len({name[1] for name in names})
    if kept is not None:
        _check(*kept, "the model", method)


def check_used(name: str, transformer: nn.Module, method: Method) -> None:
    """Raise ValueError for a method that leaves out what came with a transformer called `name`."""
    held = trained_of(transformer)
    if held is not None:
        _check(held.origin, held.kind, len(held.layers), name, method)


def _check(origin: str, kind: str, blocks: int, name: str, method: Method) -> None:
    part = PARTS[kind]
    own = method.branch(1, 1) if part.part == "branch" else method.gate(1, 1, 1)
    if own is None or f"{part.own}.weight" not in own.state_dict():
        raise ValueError(
            f"{origin} holds {part.what} for {blocks} blocks of {name}, which {method!r} does not "
            f"use: {part.use}"
        )
