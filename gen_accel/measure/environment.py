"""Facts about this machine, for the foot of a report and for `gen-accel doctor`."""

import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from gen_accel.kernels import flash4, natten
from gen_accel.kernels.compiler import cpp_compiler
from gen_accel.measure.timing import device_name
from gen_accel.version import __version__

PACKAGES = (
    *("torch", "diffusers", "transformers", "accelerate", "peft", "triton", "xformers"),
    *("flash-attn-4", "natten"),
)
FIXES = {
    **dict.fromkeys(("transformers", "accelerate", "peft"), 'pip install "gen_accel[video]"'),
    "triton": "pip install triton  (Linux only; triton and flex on a GPU need it)",
    "xformers": 'pip install "gen_accel[xformers]"  (optional, CUDA only: the kernel xformers)',
    "flash-attn-4": f"{flash4.INSTALL}  (optional, Hopper and Blackwell: the kernel fa4)",
    "natten": f"{natten.INSTALL}  (optional, CUDA only: the kernel natten)",
}
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the doctor's list.

    Args:
        found: the version or device found; None when it is missing.
        fix: the command that adds it, or what works without it.
    """

    name: str
    found: str | None
    fix: str = ""


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the facts that figures depend on: versions, the device and its threads."""
    versions = {name: version(name) for name in ("gen_accel", "torch", "diffusers")}
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
    }


def checks() -> list[Check]:
    """List everything that the package uses, found or missing, with the command that adds it."""
    found = [Check("gen_accel", version("gen_accel")), Check("python", platform.python_version())]
    for name in PACKAGES:
        found.append(Check(name, version(name), FIXES.get(name, f"pip install {name}")))
    cores = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    found += [Check("CPU", cores), *_gpus(), _compiler(), _native(), _int8()]
    found += [_ffmpeg(), _program()]
    return found


def version(package: str) -> str | None:
    if package == "gen_accel":  # another version may be installed beside a checkout
        return __version__
    if package == "torch":  # its wheels need not name the build, as in +cu128
        return str(torch.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[Check]:
    if torch.cuda.is_available():
        gpus = []
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            memory = f"{properties.total_memory / GIB:.0f} GiB"
            gpus.append(Check(f"GPU {i}", f"{properties.name}, {memory}, sm_{_capability(i)}"))
        return gpus
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        return [Check("GPU", accelerator.type)]
    if torch.version.cuda is None:
        why = "this torch is built for the CPU; https://pytorch.org/get-started has the command"
    else:
        why = "torch finds none; the CPU is used"
    return [Check("GPU", None, why)]


def _capability(index: int) -> str:
    return "".join(map(str, torch.cuda.get_device_capability(index)))


def _compiler() -> Check:
    fix = "apt install g++, or xcode-select --install  (flex on the CPU; gather goes without)"
    return Check("C++ compiler", cpp_compiler(), fix)


def _native() -> Check:
    from gen_accel.kernels.native.build import library, path, why_not

    found = None if library() is None else str(path())
    return Check("CPU kernel", found, f"{why_not()}  (native; gather and routed go without)")


def _int8() -> Check:
    from gen_accel.kernels.native.build import library
    from gen_accel.kernels.native.int8 import lacks

    fix = "gen-accel build  (int8, by name alone)"
    if missing := lacks():
        fix = f"the processor lacks {missing}  (int8; native goes without)"
    return Check("int8 kernel", "ready" if library() and not missing else None, fix)


def _ffmpeg() -> Check:
    fix = 'pip install "gen_accel[video]"  (videos in and out of files)'
    try:
        import av
    except ImportError:
        return Check("ffmpeg", None, fix)
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    lost = [name for name in ("libx264", "gif") if name not in av.codecs_available]
    lacks = f", without the encoder {' and '.join(lost)}" if lost else ""
    return Check("ffmpeg", f"libavcodec {codec} in PyAV {av.__version__}{lacks}", fix)


def _program() -> Check:
    from gen_accel.measure.ffmpeg_process import ffmpeg_binary

    try:
        found = ffmpeg_binary()
    except (ImportError, OSError):
        found = None
    return Check("ffmpeg program", found, 'pip install "gen_accel[quality]"  (optional: VMAF)')
