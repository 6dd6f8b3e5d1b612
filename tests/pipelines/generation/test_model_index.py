"""What a model folder may name, on every way into the package: nothing that would run its code."""

import json
import sys

import numpy as np
import pytest

import gen_accel.demo
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.encoders import load_encoders
from gen_accel.measure import write_video
from gen_accel.pipelines.generation import loading, model_index

INDEX = json.loads((gen_accel.demo.path() / "model_index.json").read_text())
WAYS = {
    "load": lambda model, run: loading.load(model),
    "load_decoder": lambda model, run: loading.load_decoder(model),
    "load_encoders": lambda model, run: load_encoders(str(model), "cpu", "auto"),
    "cache": lambda model, run: cache(model, [model / "a.mp4"], model / "c", **SIZES),
    "gen-accel generate": lambda model, run: run(
        "generate", "--model", model, "--prompt", "a red circle", "--out", model / "a.gif"
    ),
    "gen-accel cache": lambda model, run: run("cache", *_trained(model)),
    "gen-accel train": lambda model, run: run("train", *_trained(model)),
}
SIZES = {"frames": (9,), "sizes": ((32, 32),)}
EVIL = {
    "a module": {"scheduler": ["elsewhere", "Evil"]},
    "a module as tokenizer": {"tokenizer": ["elsewhere", "Evil"]},
    "one that is imported": {"scheduler": ["os", "PathLike"]},
    "a pipeline of a module": {"_class_name": ["elsewhere", "Evil"]},
    "no class": {"text_encoder": ["transformers", "pipeline"]},
    "a class of another kind": {"text_encoder": ["transformers", "AutoModel"]},
    "a part of a module": {"vae": ["diffusers", "utils.torch_utils.Evil"]},
    "a private name": {"vae": ["diffusers", "_LazyModule"]},
    "no pipeline": {"_class_name": "AutoencoderKLWan"},
}


def _trained(model):
    write_video(np.zeros((9, 16, 16, 3), np.uint8), model / "a.mp4", fps=16)
    (model / "a.txt").write_text("a red circle\n")
    return "--model", model, "--data", model, "--out", model / "run", "--stages", "9:1"


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """Write a model folder, beside a module that can be imported and must not be."""
    (tmp_path / "elsewhere.py").write_text("raise SystemExit('this ran')")
    monkeypatch.syspath_prepend(tmp_path)

    def make(changed):
        (tmp_path / "model_index.json").write_text(json.dumps(INDEX | changed))
        return tmp_path

    yield make
    assert "elsewhere" not in sys.modules


@pytest.mark.parametrize("way", WAYS)
def test_no_way_imports_what_a_folder_names(way, evil, run, refused):
    model = evil(EVIL["a module"])
    words = "scheduler must be a class of diffusers or transformers, got elsewhere.Evil"
    if way.startswith("gen-accel"):
        assert words in WAYS[way](model, refused)
    else:
        with pytest.raises(ValueError, match=words):
            WAYS[way](model, run)


@pytest.mark.parametrize("what", EVIL)
def test_what_is_no_public_class_of_its_kind_is_refused(what, evil):
    (part,) = EVIL[what]
    with pytest.raises(ValueError, match=f"^{part} must be a "):
        model_index.check_index(INDEX | EVIL[what], evil(EVIL[what]))


ODD = {
    "empty": ({"scheduler": []}, "scheduler in .* must be a library and a class"),
    "half": ({"scheduler": ["diffusers"]}, "scheduler in .* must be a library and a class"),
    "nested": ({"vae": [["diffusers"], "x"]}, "vae in .* must be a library and a class"),
    "a dict": ({"vae": [{"a": 1}, "x"]}, "vae in .* must be a library and a class"),
    "null": ({"transformer": None}, r"transformer in .* a library and a class, or \[null, null\]"),
    "a number": ({"tokenizer": 5}, "tokenizer in .* must be a library and a class"),
    "an option": ({"boundary_ratio": "x"}, "boundary_ratio of .* must be float or none"),
    "no expert": ({"boundary_ratio": 0.9}, "transformer_2 runs, which is not there"),
}


@pytest.mark.parametrize("what", ODD)
def test_entries_of_another_form_are_refused(what, evil):
    change, message = ODD[what]
    with pytest.raises(ValueError, match=message):
        model_index.check_index(INDEX | change, evil(change))


def test_code_in_the_place_of_a_class_is_refused(evil):
    model = evil({})
    model_index.check_index(INDEX, model)
    (model / "vae").mkdir()
    (model / "vae/diffusers.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ValueError, match="code in the place of AutoencoderKLWan: it is not run"):
        model_index.check_index(INDEX, model)


def test_parts_that_diffusers_keeps_beside_a_pipeline():
    found = model_index.part_class(["ltx2", "LTX2TextConnectors"], "connectors")
    assert found.__module__.startswith("diffusers.pipelines.ltx2")
