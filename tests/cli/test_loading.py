"""Messages and imports of other libraries while a verb starts."""

import logging
from types import SimpleNamespace

import pytest

from gen_accel.cli import loading
from gen_accel.lora.config import packages_of
from gen_accel.registry import hide_load_failures

SAID = {
    "torchao": "Failed to load _C_mxfp8.so: could not load this library",
    "torch.utils._pytree": "<enum 'A'> is an Enum subclass and is now natively supported by torch",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects.",
    "bitsandbytes.cextension": "bitsandbytes was compiled without GPU support",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "transformers.utils.import_utils": "`A` requires torchvision (not installed); falling back",
}


@pytest.fixture
def heard():
    """Messages that reach whoever listens to these loggers."""
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    for name in SAID:
        logging.getLogger(name).addHandler(handler)
    yield found
    hide_load_failures()
    for name in SAID:
        logging.getLogger(name).removeHandler(handler)


def say(words):
    for name, text in words.items():
        logging.getLogger(name).error(text)


def test_parts_that_do_not_load_here_are_not_told(heard):
    """By whoever imports gen_accel."""
    say(SAID)
    hide_load_failures()
    say(SAID)
    assert heard == []


def test_all_else_is_told(heard):
    hide_load_failures()
    others = dict.fromkeys(SAID, "something else is wrong")
    say(others)
    assert heard == [*others.values()]


def test_what_is_asked_for_is_told(heard):
    hide_load_failures(packages_of({"base": "int8", "optimizer": "adamw"}))
    say(SAID)
    assert heard == [*SAID.values()][:3]
    heard.clear()
    hide_load_failures(packages_of({"optimizer": "bitsandbytes.optim.Lion8bit"}))
    say(SAID)
    assert heard == [*SAID.values()][3:5]


@pytest.mark.parametrize(
    ("modules", "what", "told"),
    [
        ({}, "diffusers", ["loading torch\n", "loading diffusers\n"]),
        ({}, "", ["loading torch\n", ""]),
        ({"torch": "is there"}, "diffusers", ["", ""]),
    ],
)
def test_each_slow_import_is_told_as_it_begins(monkeypatch, capsys, modules, what, told):
    heard = []
    monkeypatch.setattr(loading, "sys", SimpleNamespace(modules=modules))
    monkeypatch.setattr(loading, "import_module", lambda _: heard.append(capsys.readouterr().err))
    with loading.loading(what):
        heard.append(capsys.readouterr().err)
    assert heard == told


def test_packages_are_out_of_sight_while_libraries_are_imported(monkeypatch):
    modules: dict = {"scipy": "was imported"}
    monkeypatch.setattr(loading, "sys", SimpleNamespace(modules=modules))
    with loading.without(*loading.FOR_WEIGHTS):
        assert modules == {
            "scipy": "was imported",
            "torchao": None,
            "bitsandbytes": None,
            "peft": None,
        }
    assert [*modules] == ["scipy"]
    modules["diffusers"] = "knows already whether they are there"
    with loading.without(*loading.FOR_WEIGHTS):
        assert [*modules] == ["scipy", "diffusers"]


def test_pipelines_are_not_needed_where_a_name_says_the_sizes(tmp_path, monkeypatch):
    assert loading.unneeded("MiniMax-H3") == loading.FOR_PIPELINES
    assert loading.unneeded("someone/else") == loading.unneeded(None) == loading.FOR_WEIGHTS
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MiniMax-H3").mkdir()  # a folder wins
    assert loading.unneeded("MiniMax-H3") == loading.FOR_WEIGHTS
