"""The embedded demo model: a real `WanPipeline`, its image prompt, and the captions that it knows.

Imports nothing that is slow.
"""

from collections.abc import Iterable
from pathlib import Path

from gen_accel.paths import DEMO
from gen_accel.paths import adapter_named as adapter_named
from gen_accel.paths import model_named as model_named

NAME = DEMO
TRAINED_FRAMES = 33  # of its clips, as model/gen_accel.json says

COLORS = {
    "red": (235, 50, 45),
    "green": (45, 200, 75),
    "blue": (60, 105, 245),
    "yellow": (245, 220, 50),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 0.8, "quickly": 2.0}  # pixels a frame

# Of the demo: chosen among what dense attention gets right with the long-video LoRA.
PROMPT, SEED = "a blue square moves down slowly", 7
ANONYMOUS = "something moves right slowly"  # with an image prompt

WORDS = ("a", "something", "moves", *COLORS, *SHAPES, *DIRECTIONS, *SPEEDS)


def path() -> Path:
    """The folder that `WanPipeline.from_pretrained` loads."""
    return Path(__file__).parent / "model"


def image_prompt_path() -> Path:
    """The folder of the adapter for `gen_accel.load_image_prompt`, made by
    configs/image_prompt/demo.yaml."""
    return Path(__file__).parent / "image_prompt"


def stream_lora_path() -> Path:
    """The folder of the LoRA for `gen_accel.stream`, made by configs/lora/demo_causal.yaml."""
    return Path(__file__).parent / "stream_lora"


def check_known(*prompts: str) -> None:
    """Raise ValueError for a prompt with words that the demo model was never trained on."""
    for prompt in prompts:
        unknown = [word for word in dict.fromkeys(words_of(prompt)) if word not in WORDS]
        if unknown:
            raise ValueError(
                f"the demo model does not know {_joined(map(repr, unknown[:5]), 'and')}: it knows "
                f'"a COLOUR SHAPE moves DIRECTION SPEED", with {_joined(COLORS)}; '
                f"{_joined(SHAPES)}; {_joined(DIRECTIONS)}; {_joined(SPEEDS)}"
            )


def words_of(caption: str) -> list[str]:
    """Words of a caption, in lower case and without commas and stops."""
    return caption.lower().replace(",", " ").replace(".", " ").split()


def _joined(words: Iterable[str], last: str = "or") -> str:
    *first, end = words
    return f"{', '.join(first)} {last} {end}" if first else end
