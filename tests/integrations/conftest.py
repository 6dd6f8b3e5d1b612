"""The ComfyUI pack, imported once for a file of tests."""

import pytest
from support.comfyui_host import forget_pack, import_pack


@pytest.fixture(scope="module")
def pack():
    yield import_pack()
    forget_pack()
