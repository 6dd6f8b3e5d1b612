"""What a kernel raises when it finds out only by trying that it cannot run."""


class KernelFailed(RuntimeError):
    """`forward` could not be built here; its reason is in `unsupported` from now on."""
