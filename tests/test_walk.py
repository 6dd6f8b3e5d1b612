"""The walk of one attention call, and the modules that are imported for it: counted, not timed.

`pytest -s tests/test_walk.py` prints the walk.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import gen_accel
from gen_accel import Piecewise, attach, demo

ROOT = f"{Path(gen_accel.__file__).parent}/"
MOST_FRAMES, MOST_FILES, MOST_CALLS, MOST_MODULES = 16, 30, 330, 40

# A tiny model, so that what is counted is what attaching it needs.
ATTACHED = """
import os
import sys
import torch
child = os.fork()
if not child:
    try:
        from gen_accel.attention_processors.families import family_named, served_classes
        families = "gen_accel.attention_processors.families."
        own = {families + name for name in ("wan", "ltx", "mochi")}
        assert len(served_classes()) > 30
        assert not own & {*sys.modules}
        family_named("ltx")
        assert own & {*sys.modules} == {families + "ltx"}
        status = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        status = 1
    os._exit(status)
assert os.waitpid(child, 0)[1] == 0, "a family is imported before it is asked for"
import gen_accel
from gen_accel import Radial, attach
assert "pydantic" not in sys.modules
from diffusers import WanTransformer3DModel
sizes = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4)
sizes |= dict(text_dim=16, freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32)
attach(WanTransformer3DModel(**sizes), Radial())
print(*sorted(name for name in sys.modules if name.split(".")[0] == "gen_accel"))
"""


def walk_of_one_call() -> list[tuple[int, str, str]]:
    """Depth, file and function of each of our frames in one warm attention call of the demo
    model's transformer, in order."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(demo.path() / "transformer").eval()
    g = torch.Generator().manual_seed(0)
    given = (
        torch.randn(1, model.config.in_channels, 9, 24, 24, generator=g),
        torch.tensor([500.0]),
        torch.randn(1, 16, model.config.text_dim, generator=g),
    )
    walk: list[tuple[int, str, str]] = []
    depth = 0

    def look(frame, event, _):
        nonlocal depth
        if not frame.f_code.co_filename.startswith(ROOT):
            return
        if event == "call":
            depth += 1
            name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
            walk.append((depth, frame.f_code.co_filename.removeprefix(ROOT), name))
        elif event == "return":
            depth -= 1

    def forward(*given, **more):
        sys.setprofile(look)
        try:
            return stock(*given, **more)
        finally:
            sys.setprofile(None)

    with attach(model, Piecewise(0.2)), torch.no_grad():
        for _ in range(2):
            model(*given)
        module = model.blocks[0].attn1
        stock = module.forward
        module.forward = forward
        model(*given)
    return walk


@pytest.mark.usefixtures("built", "one_thread")
def test_one_attention_call_is_short():
    walk = walk_of_one_call()
    told = "\n".join(f"{'  ' * depth}{file}: {name}" for depth, file, name in walk)
    frames = max(depth for depth, _, _ in walk)
    files = Counter(file for _, file, _ in walk)
    sizes = f"{frames} frames deep, {len(files)} files, {len(walk)} calls"
    print(f"{told}\n{sizes}")
    assert frames <= MOST_FRAMES, sizes
    assert len(walk) <= MOST_CALLS, sizes
    assert len(files) <= MOST_FILES, f"{sizes}: {dict(files)}"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_attaching_imports_little():
    """No pydantic, no family but those asked for, and few modules."""
    code = [sys.executable, "-c", ATTACHED]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert len(names) <= MOST_MODULES, f"{len(names)} modules: {', '.join(names)}"
