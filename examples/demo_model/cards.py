"""Write the model cards of the embedded adapters: `python -m demo_model.cards`."""

from pathlib import Path

from gen_accel import demo
from gen_accel.attention_processors.attached.recipe import CONFIG, parse, read_recipe
from gen_accel.demo.job import SCORE, lora_path
from gen_accel.io import read_fields
from gen_accel.lora.publish import CARD, new_card

LICENSE = "apache-2.0"
SCORED = {  # in score.json, to words
    "clips": "clips, of prompts and seeds that it was not trained on",
    "dense": "of these right, dense attention",
    "sparse": "of these right, its sparse attention",
    "without": "of these right, without the LoRA",
    "psnr_db": "PSNR of sparse to dense clips, dB",
}


def cards() -> dict[Path, str]:
    """Each card's file to its text, from the recipes and scores beside it."""
    made = {}
    for folder in (lora_path(guided=True), lora_path(guided=False), demo.stream_lora_path()):
        score = read_fields(folder / SCORE) if (folder / SCORE).is_file() else {}
        figures = {words: score[name] for name, words in SCORED.items() if name in score}
        made[folder / CARD] = new_card(read_recipe(folder), license=LICENSE, figures=figures)
    folder = demo.image_prompt_path()
    recipe = parse(read_fields(folder / CONFIG)["recipe"], folder)
    made[folder / CARD] = new_card(recipe, image=True, license=LICENSE)
    return made


if __name__ == "__main__":
    for file, text in cards().items():
        file.write_text(text, encoding="utf-8")
        print(file)
