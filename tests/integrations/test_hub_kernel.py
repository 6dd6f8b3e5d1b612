"""The kernel for the Hugging Face Hub: assembled from our Triton kernels, loaded from a folder."""

import base64
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from support.checks import assert_no_worse
from support.paths import ROOT

from gen_accel.kernels import reference
from gen_accel.plan import Plan, Rest

pytest.importorskip("triton")
tomllib = pytest.importorskip("tomllib")
FOLDER = ROOT / "integrations" / "hub_kernel"
N, D, BLOCK = 75, 24, 16  # neither is a power of two, nor divided by a block


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("assemble_hub_kernel", FOLDER / "assemble.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = module.assemble(tmp_path_factory.mktemp("hub") / "kernel")
    with pytest.raises(FileExistsError, match="is not empty: give a new folder"):
        module.assemble(folder)
    return folder


@pytest.fixture(scope="module")
def kernel(assembled):
    """A package outside of sys.path, under a name that the `kernels` library does not give it."""
    folder = assembled / "build" / f"torch-{'cuda' if torch.cuda.is_available() else 'cpu'}"
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(f"{name}_alone", folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def qkv(device, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 1, 2, N, D, generator=g, dtype=torch.float64)
    return [x.to(device, dtype) for x in drawn]


def kept(device):
    g = torch.Generator().manual_seed(1)
    keep = torch.rand(1, 2, 5, 5, generator=g) < 0.4
    keep[0, 0, 3] = False
    return keep.to(device)


def with_gradients(attend, q, k, v):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v)
    by = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    total = (out * by).sum() + lse.masked_fill(lse.isneginf(), 0.0).sum()
    return [out.detach(), *torch.autograd.grad(total, (q, k, v))]


@pytest.mark.slow
@pytest.mark.turns(3)
@pytest.mark.parametrize(
    ("rest", "centre"),
    [("zeroth", "query"), ("second", "query"), ("first", "key"), (None, "query")],
    ids=str,
)
def test_output_and_gradients_are_those_of_the_definition(kernel, device, rest, centre):
    slots = torch.arange(80, device=device)
    plan = Plan(
        slots.masked_fill(slots >= N, -1),
        kept(device),
        BLOCK,
        BLOCK,
        rest=None if rest is None else Rest(centre, rest),
    )

    def define(q, k, v):
        return reference.kernel.forward_lse(q, k, v, plan, scale=D**-0.5)

    def ours(q, k, v):
        return kernel.block_sparse_attention(
            q, k, v, plan.keep, block_q=BLOCK, block_k=BLOCK, rest=rest, centre=centre
        )

    exact = with_gradients(define, *qkv(device, torch.float64))
    low = with_gradients(define, *qkv(device))
    for one, by_definition, right in zip(
        with_gradients(ours, *qkv(device)), low, exact, strict=True
    ):
        assert_no_worse(one, by_definition, right)


def test_it_stands_beside_an_installed_gen_accel(kernel, assembled, device):
    q, k, v = qkv(device)
    kernel.block_sparse_attention(q, k, v, kept(device), block_q=BLOCK, block_k=BLOCK)
    assert kernel.Plan is not Plan
    text = "".join(x.read_text() for x in (assembled / "build" / "torch-cpu").rglob("*.py"))
    assert '"gen_accel::' not in text
    assert "import gen_accel" not in text
    assert "from gen_accel" not in text
    name = kernel.__name__.removesuffix("_alone")
    assert hasattr(getattr(torch.ops, name), "triton_attention")


@pytest.mark.slow
def test_the_kernels_library_loads_the_folder(assembled, device):
    kernels = pytest.importorskip("kernels")
    if not hasattr(kernels, "get_local_kernel"):  # a folder of tests has the name
        pytest.skip("the kernels library is not installed")
    backend = None if torch.cuda.is_available() else "cpu"
    module = kernels.get_local_kernel(assembled, backend=backend)
    assert Path(module.__file__).is_relative_to(assembled)
    q, k, v = qkv(device)
    out, _ = module.block_sparse_attention(q, k, v, kept(device), block_q=BLOCK, block_k=BLOCK)
    assert torch.isfinite(out).all()


def test_metadata_and_build_file_agree(assembled):
    about = tomllib.loads((FOLDER / "build.toml").read_text())
    assert about["general"]["name"].replace("-", "_") == "block_sparse_rest"
    for folder in (assembled / "build").iterdir():
        read = json.loads((folder / "metadata.json").read_text())
        assert read["version"] == about["general"]["version"]
        assert f"torch-{read['backend']['type']}" == folder.name
        files = {x.relative_to(folder).as_posix() for x in folder.rglob("*.py")}
        assert files == {*read["digest"]["files"]}
        for path, digest in read["digest"]["files"].items():
            found = hashlib.sha256((folder / path).read_bytes()).digest()
            assert base64.b64encode(found).decode() == digest
    sources = {x.name for x in (assembled / "torch-ext" / "block_sparse_rest").iterdir()}
    assert "_ops.py" not in sources  # which the builder writes
    assert Path(assembled / "CARD.md").is_file()


def test_refusals(kernel, device):
    q, k, v = qkv(device)
    with pytest.raises(ValueError, match=r"keep must be \(B or 1, H or 1, 2, 2\) for 75 tokens"):
        kernel.block_sparse_attention(q, k, v, kept(device))
    more = [x.double() for x in (q, k, v)]
    with pytest.raises(ValueError, match="takes bfloat16, float16 and float32"):
        kernel.block_sparse_attention(*more, kept(device), block_q=BLOCK, block_k=BLOCK)
