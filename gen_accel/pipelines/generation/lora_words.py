"""Description of a LoRA's file in words: its layers, its training, and how it is run.

Only names, shapes and metadata are read, so that a file of many gigabytes takes a moment.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from gen_accel import published
from gen_accel.attention_processors.attached.recipe import KEY, Recipe, parse
from gen_accel.attention_processors.attached.trained import GATE, TRAINED
from gen_accel.io import parse_json, read_tensors
from gen_accel.parsing import shown
from gen_accel.paths import expanded
from gen_accel.pipelines.generation.loading import file_of
from gen_accel.pipelines.generation.lora_file import MATRIX, WHOLE
from gen_accel.pipelines.generation.single_file import header_of
from gen_accel.published import few_steps, trained_method

FACTORS = re.compile(r"(.+)\.(hada_w1_a|lokr_w1|lokr_w1_a)")
FASTVIDEO = "fastvideo-lora-v2"
EXPERT = re.compile(r"(high|low)[-_]noise([-_]\w+)?")  # a name that says no more than that


@dataclass
class Contents:
    """Counts of what the tensors of a file are.

    Args:
        ranks: of the layers with two matrices, and how many have each.
        gates, branches: layers with a gate of VSA, or a linear branch of SLA.
        factored: layers of a LoHa or LoKr.
    """

    ranks: dict[int, int] = field(default_factory=dict)
    whole: int = 0
    gates: int = 0
    branches: int = 0
    factored: int = 0
    others: int = 0


def words_of(path: Path) -> tuple[list[str], dict[str, object]]:
    """Describe the file of a LoRA, in sentences and as values for JSON.

    Raises ValueError for a file that is no safetensors file, or a recipe of another version.
    """
    tensors, (_, metadata) = header_of(path), read_tensors(path, lambda names: ())
    held = _contents(tensors)
    text = metadata.get(KEY)
    recipe = None if text is None else parse(parse_json(text, f"the recipe in {path}"), path)
    names = () if recipe is not None else _names(path, metadata)
    method, few = trained_method(*names), few_steps(*names)
    lines = [_what(path, held)]
    if recipe is not None:
        lines += _of_recipe(recipe)
    elif method is not None:
        known = published.METHODS[method]
        options = "".join(f" --set {one}" for one in known.settings)
        lines += [
            f"By its name it is {known.about}.",
            f"Here that attention is --method {method}, which is --method "
            f"{known.method}{options}; generate --lora takes it where no method is named.",
        ]
    if few is not None:
        lines.append(
            f"Its publisher samples {few.about} by {few.as_stream or few.words} ({few.source}); "
            "generate --lora takes what is not given of it."
        )
    if len(lines) == 1:  # nothing is known but what it holds
        by, made_from = metadata.get("format"), metadata.get("finetuned_model", "?")
        told = f"FastVideo wrote it, from {shown(made_from)}." if by == FASTVIDEO else ""
        lines.append(told or "It does not say what it was trained with.")
    if held.gates:
        lines.append(
            "Its gates of VSA run with --method vsa alone; every other method refuses the file."
        )
    if held.branches:
        lines.append("Its linear branches of SLA belong to SparseLinear.")
    if held.others:
        lines.append(f"{held.others} of its {len(tensors)} tensors are of no kind known here.")
    about: dict[str, object] = {
        "file": str(path),
        **vars(held),
        "method": method,
        "known": None if method is None else published.METHODS[method].about,
        "few_steps": None if few is None else few._asdict(),
        "recipe": None if recipe is None else recipe.to_dict(),
    }
    return lines, about


def names_of(source: str) -> tuple[str, ...]:
    """Return the names by which the weights of a LoRA from elsewhere may be known, see
    `gen_accel.published`; none of a LoRA with a recipe of its own.

    Args:
        source: a folder or file, or a repository, of which the name alone is looked at.
    """
    path = expanded(source)
    if not path.exists():
        return (source,)
    try:
        file = file_of(source)
        _, metadata = read_tensors(file, lambda names: ())
    except (OSError, ValueError):
        return ()  # loading it says why
    return () if KEY in metadata else _names(file, metadata)


def _names(path: Path, metadata: Mapping[str, str]) -> tuple[str, str]:
    home = f"{path.parent.name}/" if EXPERT.fullmatch(path.stem.lower()) else ""
    return metadata.get("finetuned_model", ""), home + path.name


def _contents(tensors: Mapping[str, Tensor]) -> Contents:
    held, gates, branches = Contents(), set(), set()
    for key, x in tensors.items():
        if own := TRAINED.fullmatch(key):
            (gates if own[2] == GATE else branches).add(own[1])
        elif WHOLE.fullmatch(key):
            held.whole += 1
        elif matrix := MATRIX.fullmatch(key):
            if matrix[2]:
                held.ranks[len(x)] = held.ranks.get(len(x), 0) + 1
        elif FACTORS.fullmatch(key):
            held.factored += 1
        elif not re.search(r"\.(lora_|hada_|lokr_)", key):
            held.others += 1
    held.gates, held.branches = len(gates), len(branches)
    return held


def _what(path: Path, held: Contents) -> str:
    parts = [f"rank {rank} on {n} layers" for rank, n in sorted(held.ranks.items())]
    found = [f"a LoRA of {' and '.join(parts)}"] if parts else []
    found += [f"a LoHa or LoKr on {held.factored} layers"] if held.factored else []
    found += [f"{held.whole} differences of whole weights"] if held.whole else []
    found += [f"trained gates of VSA in {held.gates} blocks"] if held.gates else []
    found += [f"linear branches of SLA in {held.branches} blocks"] if held.branches else []
    return f"{path} holds {', '.join(found) or 'nothing of a LoRA'}."


def _of_recipe(recipe: Recipe) -> list[str]:
    guidance = (
        f"it holds a guidance of {recipe.teacher_guidance:g}: run it with --guidance-scale 1"
        if recipe.holds_guidance
        else "it holds no guidance: run it with the model's own"
    )
    return [
        f"gen-accel trained it for {recipe.transformer['class']} of {recipe.base_model}, "
        f"{recipe.part}, in {recipe.steps} steps on clips of up to {recipe.frames} frames of "
        f"{recipe.height} x {recipe.width}.",
        f"It was trained through {recipe.build_method()!r}, "
        f"{recipe.build_schedule()}; {guidance}.",
        "Run it with --from-lora, which brings that attention.",
    ]
