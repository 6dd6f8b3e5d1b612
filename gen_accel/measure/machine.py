"""This machine: its versions and devices, timings, load by other processes, measured figures."""

import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from gen_accel.io import fields_of, make_cache_folder, parse_json, trusted_text, write_json
from gen_accel.registry import install
from gen_accel.version import __version__

T = TypeVar("T")

PACKAGES = (
    *("torch", "diffusers", "transformers", "accelerate", "peft", "triton", "xformers"),
    *("flash-attn-4", "natten"),
)
GIB = 2**30
OTHERS = 0.15  # share of all cores used by others that slows this process down
ALIKE = 1.6  # ratio of the rates of two runs on one machine, others on it included
IDLE = 0.15  # idle share of all cores above which nobody was slowed down

_BUSY: ContextVar[dict[tuple[Path, str], tuple[Any, str]] | None] = ContextVar(
    "busy", default=None
)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Time each call in each round, in turn, A B A B, so that a slow machine slows both.

    Each runs once before the clock starts, unless they are `warm` already. On a GPU every call is
    waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in () if warm else calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            wait_for(device)
            start = time.perf_counter()
            call()
            wait_for(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def wait_for(device: torch.device) -> None:
    """Wait until an accelerator has run what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@cache
def processor() -> dict[str, str | None]:
    """Vendor, family and model number of the processor, as it tells them; its marketing name is
    the same over generations of unlike speed. None for what it does not tell."""
    names = {"vendor": "vendor_id", "family": "cpu family", "model": "model"}
    found: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return {name: found.get(key) for name, key in names.items()}


@cache
def multiply_rate(threads: int) -> float:
    """Billions of multiplications and additions a second in products of fp32 matrices by PyTorch,
    the best of some, with the threads that are set: a measure of this machine and its libraries
    in some hundredths of a second."""
    size, least = 768, float("inf")
    x = torch.full((size, size), 0.5)
    with torch.inference_mode():
        for _ in range(6):
            start = time.perf_counter()
            torch.mm(x, x)
            least = min(least, time.perf_counter() - start)
    return round(2 * size**3 / least / 1e9, 1)


def other_machine(known: Mapping[str, object], here: Mapping[str, object]) -> str:
    """Difference between the machines of two results of `environment`, in words; "" if their
    figures can stand in one table. Facts that one of them lacks are not compared."""
    for name in ("device", "threads"):
        if name in known and name in here and known[name] != here[name]:
            return f"{name} {known[name]} there, {here[name]} here"
    there, ours = known.get("processor"), here.get("processor")
    if not isinstance(there, Mapping) or not isinstance(ours, Mapping):
        return ""
    for name in ("vendor", "family", "model"):
        if there.get(name) != ours.get(name):
            return f"processors of {name} {there.get(name)} there, {ours.get(name)} here"
    known_rate, rate = there.get("gflops"), ours.get("gflops")
    if not isinstance(known_rate, int | float) or not isinstance(rate, int | float):
        return ""
    apart = max(known_rate, rate) > ALIKE * min(known_rate, rate)
    return f"{known_rate} GFLOP/s there, {rate} here" if apart else ""


def check_same_machine(known: Mapping[str, object], here: Mapping[str, object], what: str) -> None:
    """Raise ValueError if results of another machine would come under the same name.

    Args:
        what: what holds the known results, such as a file.
    """
    if why := other_machine(known, here):
        raise ValueError(
            f"{what} is of another machine ({why}): give these results a name of their own"
        )


def device_name(device: torch.device) -> str:
    """Name of the graphics card or the processor, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class ExternalLoad:
    """Processor time of other processes, counted from when this is made.

    Without psutil it is told by the load of the last minute.
    """

    def __init__(self) -> None:
        self._start = _times()

    def busy(self) -> str | None:
        """Sentence about processor time that others took from this process; None if they took
        none."""
        now = _times()
        if now is None or self._start is None:
            return _load()
        wall, own, used, idle = (
            after - before for after, before in zip(now, self._start, strict=True)
        )
        cores = os.cpu_count() or 1
        others = max(0.0, used - own) / max(wall, 1e-9)
        if others < OTHERS * cores or idle / max(wall, 1e-9) >= IDLE * cores:
            return None
        return f"the machine was busy: other processes used {others:.1f} of {cores} cores"


@contextmanager
def remembering() -> Iterator[None]:
    """Remember inside figures measured on a busy machine too, so that none is measured twice."""
    before = _BUSY.set({})
    try:
        yield
    finally:
        _BUSY.reset(before)


def kept(
    path: Path,
    key: str,
    measure: Callable[[], T],
    *,
    what: str,
    valid: Callable[[object], bool],
    again: bool = False,
) -> tuple[T, str]:
    """Return the value that a file holds under `key`, or measure it now and keep it.

    A value that was measured while others used the processor is returned and not kept.

    Args:
        what: name of the value, for a warning.
        valid: whether a value of the file can be one of ours.
        again: measure in any case.

    Returns:
        The value, and the fault of its measurement in words; "" for none.
    """
    known = _read(path)
    if not again and key in known and valid(known[key]):
        return known[key], ""
    memory = _BUSY.get()
    if memory is not None and not again and (path, key) in memory:
        return memory[path, key]
    load = ExternalLoad()
    value = measure()
    busy = load.busy()
    if busy is None:
        try:
            make_cache_folder()
            write_json(path, _read(path) | {key: value})
        except OSError as error:
            warnings.warn(f"cannot keep {what}: {error}", stacklevel=5)
    elif memory is not None:
        memory[path, key] = value, busy
    return value, busy or ""


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


def environment(device: torch.device | str = "cpu") -> dict[str, object]:
    """Return the facts that figures depend on: versions, the device and its threads, and the
    processor with its rate in GFLOP/s."""
    return {
        **{name: version(name) for name in ("gen_accel", "torch", "diffusers")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "processor": processor() | {"gflops": multiply_rate(torch.get_num_threads())},
    }


def checks() -> list[Check]:
    """List everything that the package uses, found or missing, with the command that adds it."""
    from gen_accel.kernels import flash4, natten
    from gen_accel.kernels.base import cpp_compiler
    from gen_accel.kernels.native.build import lacks_bytes, library, path, why_not

    fixes = {
        **dict.fromkeys(("transformers", "accelerate", "peft"), install("video")),
        "triton": "pip install triton  (Linux only; triton and flex on a GPU need it)",
        "xformers": f"{install('xformers')}  (optional, CUDA only: the kernel xformers)",
        "flash-attn-4": f"{flash4.INSTALL}  (optional, Hopper and Blackwell: the kernel fa4)",
        "natten": f"{natten.INSTALL}  (optional, CUDA only: the kernel natten)",
    }
    found = [Check("gen_accel", version("gen_accel")), Check("python", platform.python_version())]
    for name in PACKAGES:
        found.append(Check(name, version(name), fixes.get(name, f"pip install {name}")))
    threads = torch.get_num_threads()
    cores = f"{device_name(torch.device('cpu'))}, {threads} thread{'s' * (threads != 1)}"
    compiler = "apt install g++, or xcode-select --install  (flex on the CPU; gather goes without)"
    native = None if library() is None else str(path())
    missing = lacks_bytes()
    int8 = "gen-accel build  (int8, by name alone)"
    if missing:
        int8 = f"the processor lacks {missing}  (int8; native goes without)"
    program = None
    with suppress(ImportError, OSError):
        from gen_accel.measure.quality import ffmpeg_binary

        program = ffmpeg_binary()
    return [
        *found,
        Check("CPU", cores),
        *_gpus(),
        Check("C++ compiler", cpp_compiler(), compiler),
        Check("CPU kernel", native, f"{why_not()}  (native; gather and routed go without)"),
        Check("int8 kernel", "ready" if native and not missing else None, int8),
        _ffmpeg(),
        Check("ffmpeg program", program, f"{install('quality')}  (optional: VMAF)"),
    ]


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
            capability = "".join(map(str, torch.cuda.get_device_capability(i)))
            gpus.append(Check(f"GPU {i}", f"{properties.name}, {memory}, sm_{capability}"))
        return gpus
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        return [Check("GPU", accelerator.type)]
    if torch.version.cuda is None:
        why = "this torch is built for the CPU; https://pytorch.org/get-started has the command"
    else:
        why = "torch finds none; the CPU is used"
    return [Check("GPU", None, why)]


def _ffmpeg() -> Check:
    fix = f"{install('video')}  (videos in and out of files)"
    try:
        import av
    except ImportError:
        return Check("ffmpeg", None, fix)
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    lost = [name for name in ("libx264", "gif") if name not in av.codecs_available]
    lacks = f", without the encoder {' and '.join(lost)}" if lost else ""
    return Check("ffmpeg", f"libavcodec {codec} in PyAV {av.__version__}{lacks}", fix)


def _times() -> tuple[float, float, float, float] | None:
    """Seconds on the clock, of this process on all cores, of all processes, and idle; None
    without psutil."""
    try:
        import psutil
    except ImportError:
        return None
    times = psutil.cpu_times()._asdict()
    idle = times["idle"] + times.get("iowait", 0.0)
    guests = times.get("guest", 0.0) + times.get("guest_nice", 0.0)  # within user and nice
    used = sum(times.values()) - idle - guests
    return time.perf_counter(), time.process_time(), used, idle


def _load() -> str | None:
    cores = os.cpu_count() or 1
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # not on Windows
        return None
    return f"the machine was busy: a load of {load:.1f} on {cores} cores" if load > cores else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return fields_of(parse_json(trusted_text(path) or "{}", path), path)
    except ValueError:
        return {}  # not ours any more: it is only a cache
