"""Error of a kernel that finds out only by trying that it cannot run."""


class KernelFailed(RuntimeError):
    """`forward` could not run here; "auto" goes on to the next kernel."""
