"""A model of single files trains as the folder of the same weights does."""

import json
from pathlib import Path

from safetensors.torch import save_file
from support import single_files, wan

import gen_accel
from gen_accel.pipelines.generation.assemble import assemble

CLIPS = {"stages": ("9:1",), "validate_every": 0}


def losses(given):
    gen_accel.lora.train(given)
    lines = Path(given.out, "metrics.jsonl").read_text().splitlines()
    return [found["loss"] for found in map(json.loads, lines) if "loss" in found]


def test_losses_and_the_cache_are_those_of_the_folder(on_disk, home, tmp_path, capfd):
    pipe = wan.pipeline()
    save_file(single_files.transformer_state(pipe.transformer), tmp_path / "t.safetensors")
    save_file(single_files.wan_t5_state(pipe.text_encoder), tmp_path / "e.safetensors")
    given = [str(tmp_path / "t.safetensors"), str(tmp_path / "e.safetensors")]
    made = assemble(tmp_path / "model", given, base=home / "model").folder
    cache = tmp_path / "cache"
    first = losses(on_disk(out=tmp_path / "a", cache=cache, **CLIPS))
    assert "3 clips encoded" in capfd.readouterr().err
    second = losses(on_disk(out=tmp_path / "b", cache=cache, model=str(made), **CLIPS))
    assert "0 clips encoded, 3 kept" in capfd.readouterr().err
    assert first == second
    assert first
