"""Boxes of the screen Generate for the fields of a method."""

import pytest

pytest.importorskip("gradio", reason='needs gradio: pip install "gen_accel[ui]"')

from gen_accel.cli import inventory
from gen_accel.ui.generate import BOXES


def test_no_method_has_more_fields_than_there_are_boxes():
    assert max(len(method.fields) for method in inventory.methods()) <= BOXES
