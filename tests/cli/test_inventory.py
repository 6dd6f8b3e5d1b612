"""What `gen-accel list` and `gen-accel models` read."""

import diffusers
import pytest

from gen_accel.cli import inventory


def test_classes_that_this_diffusers_lacks_are_named(run, monkeypatch):
    missing = [model.name for model in inventory.models() if not model.here]
    assert ("does not have" in run("models").stdout) == bool(missing)
    gone = "WanVACETransformer3DModel"

    class Older:
        """`diffusers.models` without one class."""

        def __dir__(self):
            return [name for name in dir(diffusers_models) if name != gone]

    diffusers_models = diffusers.models

    class Top:
        __version__ = "0.38.0"
        models = Older()

        def __dir__(self):
            return [name for name in dir(diffusers) if name != gone]

    monkeypatch.setattr(inventory, "diffusers", Top())
    found = [model.name for model in inventory.models() if not model.here]
    assert sorted(found) == sorted([*missing, gone])
    said = run("models").stdout.partition("does not have: ")[2]
    assert all(name in said for name in found)


@pytest.mark.parametrize("model", [m for m in inventory.models() if m.here and not m.refused])
def test_classes_are_found_where_diffusers_keeps_them(model):
    assert hasattr(diffusers, model.name) or hasattr(diffusers.models, model.name)


def test_every_option_of_a_method_is_said_in_a_sentence():
    """The page shows it beside the control."""
    known = {one.name: one.fields for one in inventory.methods()}
    silent = [
        f"{n}.{x}" for n, fields in known.items() for x, one in fields.items() if not one.meaning
    ]
    assert silent == []
