"""Most memory that a process has held."""

import sys

import torch


def peak_gb(device: torch.device) -> float | None:
    """Return the most memory held so far, in GB (10^9 bytes): of an accelerator what torch has
    allocated there, of a CPU the resident memory of the process. None where nobody says."""
    if device.type != "cpu":
        try:
            return torch.accelerator.max_memory_allocated(device) / 1e9
        except (RuntimeError, AttributeError):
            return None
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size * (1 if sys.platform == "darwin" else 1024) / 1e9
