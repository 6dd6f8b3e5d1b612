"""Write docs/models.md: the classes that are served, what trains, and what makes longer video.

python tools/models_page.py > docs/models.md
"""

import diffusers

from gen_accel.attention_processors.families import Family, families
from gen_accel.cli.inventory import ModelInfo, methods_of, models

PAGE = """\
# Models

`gen_accel.attach` serves pipelines with these transformers and UNets of diffusers, at any frames,
height, width and batch that they take. This page is written by
`python tools/models_page.py > docs/models.md`.

{count} classes are served. Each passes the same tests (`test_families.py`), as a tiny random model
of diffusers' own class. With `Dense()` it is the stock model, bit for bit. Every token lies where
the family says. Every method equals its reference at that place, at sizes that no tile divides and
at two sizes one after the other. Neither the batch nor the padding of a text changes a sample. A
step of training has finite gradients, and detaching leaves no trace. Published weights were not at
hand.

Tokens are named in the order in which self-attention sees them. Tokens beside video or image see
all and are seen by all. LoRA targets are the ends of layers' names, attention's layers first.
`Radial`, which thins out in time, attaches to models of single frames too, keeps all and warns.
Image prompts have [a page of their own](image_prompts.md). *Single file* says whose weights are
read [in the names of the original model](generate.md#weights-from-comfyui), as diffusers {version}
has them in `SINGLE_FILE_LOADABLE_CLASSES`.

| class | models | family | methods | tokens | LoRA targets | image prompts | single file |
|---|---|---|---|---|---|---|---|"""

TRAINING = """\
## Training and longer video

[Finetuning](finetune.md) trains these classes, where it says what they predict. Each is held to
its pipeline by tests: latents, prompts, what the transformer is given and gives, and the noise
levels. *First frame* says which models also train [from the first frame of each
clip](finetune.md#from-a-first-frame). *Frames* are the lengths of clips, *trained at* is what
[longer videos](longer_videos.md) count from unless `trained_frames` says otherwise, and *rules*
change the rotary frequencies of time.

| class | predicts | first frame | frames | trained at | rules |
|---|---|---|---|---|---|"""
RULES = "riflex", "position_interpolation"


def models_page() -> str:
    """`models` as a page of documentation, in Markdown."""
    found = models()
    served = [model for model in found if not model.refused]
    rows = [
        (
            f"`{model.name}`",
            model.models,
            model.family,
            methods_of(model),
            model.order,
            _targets(model),
            "yes" if model.image_prompts else "",
            "yes" if model.single_file else "",
        )
        for model in served
    ]
    head = PAGE.format(count=len(served), version=diffusers.__version__)
    lines = [head, *(f"| {' | '.join(row)} |" for row in rows)]
    refused = [f"- `{model.name}`: {model.refused}." for model in found if model.refused]
    if refused:
        lines += ["", "These are refused, by name and with the reason:", "", *refused]
    lines += ["", TRAINING, *(f"| {' | '.join(row)} |" for row in _training_rows())]
    return "\n".join(lines) + "\n"


def _training_rows() -> list[tuple[str, ...]]:
    """Classes that train or take rules on rotary frequencies, a row each."""
    rows = []
    for family, kind in ((one, kind) for one in families() for kind in one.classes):
        turns = family.serves("rules on rotary frequencies")
        trains = family.serves("training") and kind == family.classes[0]
        if not (trains or turns):
            continue
        rules = RULES if family.attention.heads_alike else RULES[1:]
        predicted = {"flow": "velocity", "v": "v"}[family.training.predicts]
        rows.append(
            (
                f"`{kind}`",
                predicted if trains else "",
                _given(family) if trains else "",
                family.sizes.coding().rule if trains or family.sizes.temporal else "",
                str(family.sizes.frames or ""),
                ", ".join(f"`{rule}`" for rule in rules) if turns else "",
            )
        )
    return rows


def _given(family: Family) -> str:
    first, last = family.training.first_frame, family.training.last_frame
    return "yes, and the last" if last else "yes" if first else ""


def _targets(model: ModelInfo) -> str:
    groups = model.lora_targets.values()
    return "; ".join(", ".join(f"`{name}`" for name in names) for names in groups)


if __name__ == "__main__":
    print(models_page(), end="")
