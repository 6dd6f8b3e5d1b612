"""The ComfyUI pack, imported once for a file of tests."""

import pytest
from safetensors.torch import save_file
from support.comfyui_host import Adapter, forget_pack, import_pack


@pytest.fixture(scope="module")
def pack():
    yield import_pack()
    forget_pack()


@pytest.fixture
def load(pack, monkeypatch, tmp_path):
    """The node Load Gates, on tensors of a file."""

    def node(model, tensors, name="fastwan.safetensors", strength=1.0, **inputs):
        save_file(tensors, tmp_path / name)
        monkeypatch.setattr(pack.gate_nodes, "weight_path", lambda name: tmp_path / name)
        monkeypatch.setattr(pack.gate_nodes, "lora_adapter", lambda: Adapter)
        return pack.gate_nodes.LoadGatesNode().load(model, name, strength, **inputs)[0]

    return node
