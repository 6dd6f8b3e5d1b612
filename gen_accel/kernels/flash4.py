"""FlashAttention-4 as a package: whether it is here, and which calls its block-sparse kernels
take.

References:
    Dao-AILab, flash-attention, `flash_attn/cute`, read in flash-attn-4 4.0.0b36. The blocks that
    fit its tiles are in `interface._tile_size_fwd_sm90`, `_fit_sm90_fwd_tile_to_block_sparsity`,
    `_tile_size_bwd_sm90`, `_get_fwd_config` and `block_sparsity.normalize_block_sparse_config`.
    On sm_80 it takes lists of blocks and never reads them; on sm_120 it asserts that there
    are none.
"""

import math
from functools import cache
from importlib.util import find_spec

import torch

from gen_accel.kernels.base import Facts, order_reasons

INSTALL = 'pip install "flash-attn-4>=4.0.0b36"'
DTYPES = (torch.bfloat16, torch.float16)
LARGEST_DIM = 128
MAJORS = (9, 10)  # of the compute capability
MOST_MERGED = 4


def reasons(facts: Facts) -> list[str]:
    """List the reasons why its block-sparse kernels cannot run a call; empty where they can."""
    found = []
    if not installed():
        found.append(f"flash-attn-4 is not installed: {INSTALL}")
    if not serves(facts.device):
        found.append(
            "FlashAttention-4 reads lists of blocks on CUDA devices of capability 9.x and 10.x, "
            f"got {_written(facts.device)}"
        )
    if facts.dtype not in DTYPES:
        found.append(f"it takes bfloat16 and float16, got {facts.dtype}")
    if facts.dim % 8 or facts.dim > LARGEST_DIM:
        found.append(f"head dim must be a multiple of 8 up to {LARGEST_DIM}, got {facts.dim}")
    found += order_reasons(facts)
    return found + _block_reasons(facts) if serves(facts.device) else found


def blocks(facts: Facts) -> tuple[int, int]:
    """Slots of a query and a key block in its lists: the smallest multiples of the plan's blocks
    that its tiles fit, at most `MOST_MERGED` blocks along an axis. The plan's own where none
    fits."""
    major, own = _major(facts.device), (facts.block_q, facts.block_k)
    if major == 10:
        steps = 256, 128
    elif major == 9:
        steps = (128 if facts.dim <= 64 else 64, 128) if facts.grad else (64, 16)
    else:
        return own
    made = [math.lcm(block, step) for block, step in zip(own, steps, strict=True)]
    query, key = (
        new if new <= MOST_MERGED * block else block for new, block in zip(made, own, strict=True)
    )
    return query, key


def _block_reasons(facts: Facts) -> list[str]:
    """List the tiles that do not divide the plan's blocks."""
    major, step, reasons = _major(facts.device), 64, []
    where = f"on sm_{major}0"
    if major == 10:
        step = 256  # two tiles of queries share a list
    elif facts.grad and facts.dim <= 64:
        step = 128
    if facts.block_q % step:
        training = " to train" if facts.grad else ""
        reasons.append(
            f"block_q must be a multiple of {step} {where}{training}, got {facts.block_q}"
        )
    if major == 10 and facts.block_k % 128:
        reasons.append(f"block_k must be a multiple of 128 {where}, got {facts.block_k}")
    if major == 9 and facts.grad and facts.block_k != 128:
        reasons.append(f"block_k must be 128 {where} to train, got {facts.block_k}")
    elif major == 9 and (facts.block_k % 16 or facts.block_k > 128):
        reasons.append(f"block_k must be a multiple of 16 up to 128 {where}, got {facts.block_k}")
    return reasons


@cache
def installed() -> bool:
    try:
        return find_spec("flash_attn.cute") is not None
    except (ImportError, ValueError):  # no `flash_attn`, or an old one that does not import
        return False


def serves(device: torch.device) -> bool:
    """Whether its block-sparse kernels run on this device."""
    return _major(device) in MAJORS


def is_hopper(device: torch.device) -> bool:
    return _major(device) == 9


def _major(device: torch.device) -> int | None:
    """Major of the compute capability; None without such a device here."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)[0]


def _written(device: torch.device) -> str:
    if _major(device) is None:
        return f"{device.type} under ROCm" if torch.version.hip else device.type
    return ".".join(map(str, torch.cuda.get_device_capability(device)))
