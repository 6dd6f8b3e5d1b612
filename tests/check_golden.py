"""Hold our methods to what the public code of each of them answers.

    python tests/check_golden.py tests/golden

A golden is a NAME.json with a list of cases beside a NAME.npz with their arrays. Which method it
belongs to is read from the keys of its cases, never from its name.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from support.checks import budget, largest_error
from torch import Tensor

from gen_accel.attention_processors import BlockMixture, Neighborhood, Radial, SparseLinear
from gen_accel.functional import attention
from gen_accel.kernels import native, reference
from gen_accel.video import VideoShape

Arrays = Mapping[str, np.ndarray]

# Those that run everywhere at once. FlexAttention would be compiled for every case.
KERNELS = ("reference", "gather", *(["native"] if native.build.library() is not None else []))

SLA_ARRAYS = ("q", "k", "v", "do", "W", "b", "o", "dq", "dk", "dv")


@dataclass(frozen=True)
class Deviation:
    """How far one result is from what it has to be."""

    what: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget  # False for NaN

    def __str__(self) -> str:
        return f"{self.what} {self.error:.2g} (budget {self.budget:.2g})"


@dataclass(frozen=True)
class Format:
    """One kind of golden.

    Args:
        method: what the line printed for a file calls it.
        keys: those every case has.
        arrays: what stands before the case's id in the names of its arrays.
        check: yields how far each result of one case deviates.
    """

    method: str
    keys: frozenset[str]
    arrays: tuple[str, ...]
    check: Callable[[dict, Arrays], Iterator[Deviation]]


@dataclass(frozen=True)
class Verdict:
    line: str
    ok: bool


def radial_masks(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """The public code's block mask, bit for bit."""
    rows, columns = case["shape"]
    seq, block = case["seq"], case["block"]
    if rows != columns or rows not in (seq // block, -(-seq // block)):
        raise ValueError(f"shape must count the blocks of {block} in {seq}, got {case['shape']}")
    bits = arrays[str(case["id"])]
    if bits.shape != (-(-rows * columns // 8),):
        raise ValueError(f"{rows} x {columns} bits must be packed, got {bits.shape} bytes")
    want = torch.from_numpy(np.unpackbits(bits, count=rows * columns).astype(bool))

    s, text = case["tokens_per_frame"], seq - case["frames"] * case["tokens_per_frame"]
    sink = {"hunyuan": False, "wan": True}[case["model_type"]]
    method = Radial("code-2025-11", case["decay_factor"], sink, block)
    keep = method.block_mask(VideoShape(case["frames"], 1, s, text))
    wrong = (keep[:rows, :columns] != want.view(rows, columns)).sum().item()
    yield Deviation("wrong blocks", wrong, 0)


def natten(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """Outputs of every kernel and the log-sum-exp."""
    grid = tuple(case["grid"])
    q, k, v, want = (torch.from_numpy(arrays[f"{name}{case['id']}"]) for name in "qkvo")
    want_lse = torch.from_numpy(arrays[f"lse{case['id']}"])
    if q.shape[1:-2] != grid or want_lse.shape != q.shape[:-1]:
        raise ValueError(f"q must be (B, *{grid}, heads, dim), got {tuple(q.shape)}")
    # (B, *grid, H, D) -> (B, H, N, D)
    q, k, v, want = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v, want))
    want_lse = want_lse.flatten(1, -2).transpose(1, 2)

    missing = 3 - len(grid)
    video = VideoShape(*(1,) * missing, *grid)
    method = Neighborhood(
        window=(1,) * missing + tuple(case["window"]),
        stride=(1,) * missing + tuple(case["stride"]),
        dilation=(1,) * missing + tuple(case["dilation"]),
        is_causal=(False,) * missing + tuple(case["is_causal"]),
    )
    plan, scale = method.plan(video), q.shape[-1] ** -0.5

    def ours(dtype: torch.dtype, kernel: str) -> Tensor:
        inputs = (x.to(dtype) for x in (q, k, v))
        return attention(*inputs, video=video, method=method, kernel=kernel)

    def lse(dtype: torch.dtype) -> Tensor:
        return reference.logsumexp(q.to(dtype), k.to(dtype), plan, scale=scale)

    exact = ours(torch.float64, "reference")
    yield from _both_sides({k: ours(torch.float32, k) for k in KERNELS}, want, exact)
    sums, exact_sums = {"reference": lse(torch.float32)}, lse(torch.float64)
    yield from _both_sides(sums, want_lse, exact_sums, " in logsumexp")


def sparse_linear(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """Output and gradients of every kernel, with the projection of the case."""
    tensors = {x: torch.from_numpy(arrays[f"{x}{case['id']}"]) for x in SLA_ARRAYS}
    q, W, b = (tensors[x] for x in ("q", "W", "b"))
    method = SparseLinear(
        critical=case["topk"],
        linear_over="all",
        feature_map=case["feature_map"],
        block_q=case["block_q"],
        block_k=case["block_k"],
        order="raster",
    )
    video = VideoShape(1, 1, q.shape[2])

    def ours(dtype: torch.dtype, kernel: str) -> dict[str, Tensor]:
        branch = method.branch(q.shape[1], q.shape[3])
        branch.load_state_dict({"proj.weight": W, "proj.bias": b})
        leaves = [tensors[x].to(dtype, copy=True).requires_grad_() for x in "qkv"]
        options = {"video": video, "method": method, "kernel": kernel}
        o = attention(*leaves, **options, branch=branch.to(dtype))
        gradients = torch.autograd.grad(o, leaves, tensors["do"].to(dtype))
        return dict(zip(("o", "dq", "dk", "dv"), (o.detach(), *gradients), strict=True))

    exact = ours(torch.float64, "reference")
    results = {kernel: ours(torch.float32, kernel) for kernel in KERNELS}
    for name, one in exact.items():
        of_kernels = {kernel: result[name] for kernel, result in results.items()}
        yield from _both_sides(of_kernels, tensors[name], one, f" in {name}")


def block_mixture(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """Outputs of every kernel. A chunk is so many frames, or (rows, columns), or a box."""
    grid, value = tuple(case["grid"]), case["value"]
    # (1, N, H, D) -> (1, H, N, D)
    q, k, v, want = (
        torch.from_numpy(arrays[f"{name}{case['id']}"]).transpose(1, 2) for name in "qkvo"
    )
    chunk = case["chunk"] if isinstance(case["chunk"], list) else [case["chunk"]]
    if any(side != int(side) for side in chunk):
        raise ValueError(f"chunk must be whole frames, rows and columns, got {case['chunk']}")
    sides = tuple(int(side) for side in chunk)
    partition = ("1d", "2d", "3d")[len(sides) - 1]
    amount = {"threshold": value} if case["select_mode"] == "threshold" else {"topk": (value,) * 3}
    method = BlockMixture(
        partition=partition,
        **{f"chunk_{partition}": sides[0] if partition == "1d" else sides},
        select=case["select_mode"],
        scope=case["threshold_type"],
        **amount,
    )

    def ours(dtype: torch.dtype, kernel: str) -> Tensor:
        inputs = (x.to(dtype) for x in (q, k, v))
        return attention(*inputs, video=VideoShape(*grid), method=method, kernel=kernel)

    exact = ours(torch.float64, "reference")
    by_kernel = {k: ours(torch.float32, k) for k in (*KERNELS, "routed")}
    yield from _both_sides(by_kernel, want, exact)


FORMATS = (
    Format(
        "radial",
        frozenset(
            {"frames", "tokens_per_frame", "seq", "decay_factor", "model_type", "block", "shape"}
        ),
        ("",),
        radial_masks,
    ),
    Format(
        "neighborhood",
        frozenset({"grid", "window", "stride", "dilation", "is_causal"}),
        ("q", "k", "v", "o", "lse"),
        natten,
    ),
    Format(
        "sparse linear",
        frozenset({"topk", "feature_map", "block_q", "block_k"}),
        SLA_ARRAYS,
        sparse_linear,
    ),
    Format(
        "block mixture",
        frozenset({"grid", "chunk", "select_mode", "threshold_type", "value"}),
        ("q", "k", "v", "o"),
        block_mixture,
    ),
)


def check_file(path: Path) -> Verdict:
    """Check the golden at `path`.json and `path`.npz."""
    try:
        cases, arrays = _read(path)
        kind = _recognise(cases, arrays)
    except Exception as error:  # whatever a damaged file makes its reader throw
        return Verdict(f"{path.name}: FAIL: {type(error).__name__}: {error}", False)
    title = f"{path.name}: {kind.method}, {len(cases)} cases"
    found: list[Deviation] = []
    failed: dict[str, str] = {}
    for case in cases:
        try:
            deviations = list(kind.check(case, arrays))
        except Exception as error:  # a case that makes no sense fails, and the next one is checked
            failed[str(case["id"])] = f"{type(error).__name__}: {error}"
            continue
        found += deviations
        wrong = [str(deviation) for deviation in deviations if not deviation.ok]
        if wrong:
            failed[str(case["id"])] = ", ".join(wrong)
    worst = f", at worst {max(found, key=_badness)}" if found else ""
    outcome = "FAIL" if failed else "ok"
    details = "".join(f"; case {case}: {why}" for case, why in failed.items())
    return Verdict(f"{title}{worst}: {outcome}{details}", not failed)


def check_directory(folder: Path) -> list[Verdict]:
    """Check every golden in `folder`; ValueError when there is none."""
    files = [path for path in folder.glob("*") if path.suffix in (".json", ".npz")]
    if not files:
        raise ValueError(f"{folder} holds no golden")
    return [check_file(stem) for stem in sorted({path.with_suffix("") for path in files})]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python tests/check_golden.py DIR", file=sys.stderr)
        return 2
    try:
        verdicts = check_directory(Path(arguments[0]))
    except ValueError as error:
        print(f"FAIL: {error}", file=sys.stderr)
        return 1
    for verdict in verdicts:
        print(verdict.line)
    return 0 if all(verdict.ok for verdict in verdicts) else 1


def _read(path: Path) -> tuple[list[dict], dict[str, np.ndarray]]:
    cases = json.loads(path.with_name(f"{path.name}.json").read_text())
    with np.load(path.with_name(f"{path.name}.npz"), allow_pickle=False) as file:
        return cases, dict(file)


def _recognise(cases: list[dict], arrays: Arrays) -> Format:
    if not isinstance(cases, list) or not cases or not all(isinstance(c, dict) for c in cases):
        raise ValueError("the json must be a list of cases")
    for kind in FORMATS:
        if all(kind.keys | {"id"} <= case.keys() for case in cases):
            names = [f"{array}{case['id']}" for case in cases for array in kind.arrays]
            if lost := [name for name in names if name not in arrays]:
                raise ValueError(f"arrays are missing from the npz: {', '.join(lost)}")
            return kind
    raise ValueError(f"no known format has cases with keys {sorted(cases[0])}")


def _both_sides(
    results: Mapping[str, Tensor], golden: Tensor, exact: Tensor, of: str = ""
) -> Iterator[Deviation]:
    """What each kernel and the golden err against `exact`, ours in fp64.

    Both sides are held to it: ours may err twice as much as the golden, and the golden twice as
    much as our fp32 reference, each with one spacing of floats to spare. So a golden that answers
    another question fails, instead of setting itself a large budget.
    """
    for kernel, result in results.items():
        yield _deviation(f"error of {kernel}{of}", result, golden, exact)
    yield _deviation(f"error of the golden{of}", golden, results["reference"], exact)


def _deviation(what: str, result: Tensor, other: Tensor, exact: Tensor) -> Deviation:
    return Deviation(what, largest_error(result, exact), budget(other, exact))


def _badness(deviation: Deviation) -> float:
    if deviation.ok:
        return deviation.error / deviation.budget if deviation.budget else 0.0
    return float("inf")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
