"""A model of single files trains as the folder of the same weights does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import finetuning as ft
from support import single_files, wan

import gen_accel
from gen_accel.pipelines.generation.assemble import assemble
from gen_accel.pipelines.generation.quantising import load_quantised

pytestmark = pytest.mark.slow

CLIPS = {"stages": ("9:1",), "validate_every": 0}


def losses(given):
    gen_accel.lora.train(given)
    lines = Path(given.out, "metrics.jsonl").read_text().splitlines()
    return [found["loss"] for found in map(json.loads, lines) if "loss" in found]


def assembled(home, folder):
    pipe = wan.pipeline()
    save_file(single_files.transformer_state(pipe.transformer), folder / "t.safetensors")
    save_file(single_files.wan_t5_state(pipe.text_encoder), folder / "e.safetensors")
    given = [str(folder / "t.safetensors"), str(folder / "e.safetensors")]
    return assemble(folder / "model", given, base=home / "model").folder


def test_losses_and_the_cache_are_those_of_the_folder(on_disk, home, tmp_path, capfd):
    made = assembled(home, tmp_path)
    cache = tmp_path / "cache"
    first = losses(on_disk(out=tmp_path / "a", cache=cache, **CLIPS))
    assert "3 clips encoded" in capfd.readouterr().err
    second = losses(on_disk(out=tmp_path / "b", cache=cache, model=str(made), **CLIPS))
    assert "0 clips encoded, 3 kept" in capfd.readouterr().err
    assert first == second
    assert first


def test_the_base_of_a_gguf_trains(on_disk, home, tmp_path):
    file = single_files.write_gguf(wan.transformer(), tmp_path / "q8.gguf")
    made = assemble(tmp_path / "model", [str(file)], base=home / "model").folder
    found = losses(on_disk(model=str(made), **CLIPS))
    plain = losses(on_disk(out=tmp_path / "plain", cache=tmp_path / "run" / "cache", **CLIPS))
    assert found == pytest.approx(plain, rel=0.01)
    assert found != plain
    for fields, words in (
        ({"base": "int8"}, r"original\.gguf is quantised already: leave base or quantize out"),
        ({"base": "fp8", "gradient_checkpointing": "on"}, "are quantised already: leave base out"),
    ):
        with pytest.raises(ValueError, match=words):
            gen_accel.lora.train(on_disk(out=tmp_path / "b", model=str(made), **(CLIPS | fields)))


@pytest.mark.parametrize(("base", "held"), [("int8", "Int8Tensor"), ("nf4", "Params4bit")])
def test_a_quantised_base_is_that_of_the_folder(tmp_path, base, held):
    wide = wan.transformer(attention_head_dim=64, ffn_dim=128)
    home = tmp_path / "home"
    wan.pipeline(transformer=wide).save_pretrained(home)
    file = tmp_path / "t.safetensors"
    save_file(single_files.transformer_state(wide), file)
    made = assemble(tmp_path / "model", [str(file)], base=home).folder
    given, device = ft.config(tmp_path / "run", base=base), torch.device("cpu")
    x = {name: value.bfloat16() for name, value in wan.inputs(2, 4, 6).items()}
    outputs, kinds = [], []
    for folder in (home, made):
        kind = wan.WanTransformer3DModel
        model = load_quantised(kind, str(folder), given.part, base, torch.bfloat16, device)
        kinds.append({n: (type(p).__name__, p.dtype) for n, p in model.named_parameters()})
        with torch.no_grad():
            outputs.append(model(**x, return_dict=False)[0])
    assert kinds[0] == kinds[1]
    assert held in {name for name, _ in kinds[0].values()}
    assert torch.equal(*outputs)
