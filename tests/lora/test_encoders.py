"""What a model folder may name: classes of two libraries, whatever else is importable."""

import sys

import pytest

from gen_accel.lora import encoders


@pytest.mark.parametrize("library", ["elsewhere", "os", "gen_accel.lora"])
def test_a_model_folder_names_no_other_library(library, tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text("raise SystemExit('this ran')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"diffusers and transformers, got {library}.Evil"):
        encoders._class([library, "Evil"])
    assert "elsewhere" not in sys.modules
