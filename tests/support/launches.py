"""What a GPU would be given to do, counted on the CPU, without doing it where Triton is asked."""

import importlib
import pkgutil
import weakref
from collections import Counter

import torch
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gen_accel.kernels import triton as package
from gen_accel.kernels.triton import launch

# What launches nothing, as allocations; views are told by their schema.
FREE = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided"}
FREE |= {"aten::new_empty_strided", "aten::detach", "aten::lift_fresh", "aten::_unsafe_view"}
FREE.add("prim::device")  # of fake tensors

# What asks the device for a number, and so waits for it.
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
WAITS |= {"aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::is_nonzero"}
WAITS |= {"aten::item"}  # as `_local_scalar_dense`, where it is not taken apart before
WAITS |= {"aten::_pin_memory", "aten::repeat_interleave", "aten::bincount", "aten::allclose"}

# The same of tensors on the CPU does nothing, and is seen by its call alone.
COPIES = {"cpu", "numpy", "tolist", "pin_memory", "tensor", "as_tensor", "from_numpy"}

# What raises on CUDA under torch.use_deterministic_algorithms(True), of the list in the
# documentation of that function, or draws what it writes from a race without it.
RANDOM = {"aten::kthvalue", "aten::histc", "aten::bincount", "aten::put_", "aten::put"}
RANDOM |= {"aten::scatter_reduce", "aten::scatter_reduce_", "aten::median", "aten::index_reduce"}
SUMMED = {"aten::cumsum", "aten::cumsum_", "aten::scatter_add", "aten::scatter_add_"}
SUMMED |= {"aten::index_add", "aten::index_add_", "aten::index_put", "aten::index_put_"}


class Copies(TorchFunctionMode):
    """Notes calls that copy from or to the host where tensors are on a GPU.

    Args:
        waits: what it notes them in.
    """

    def __init__(self, waits):
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        moved = name == "to" and "cpu" in [x for x in (*args, *kwargs.values()) if type(x) is str]
        if name in COPIES or moved:
            self._waits.append(name)
        return func(*args, **kwargs)


class Launches(TorchDispatchMode):
    """Counts what is launched, operators of this package from within.

    Attributes:
        done: how often each operation of torch or kernel of Triton was launched.
        operators: how often each operator of this package was called.
        waits: those that wait for the device.
        random: those that are not the same at each run on a GPU.
    """

    def __init__(self):
        super().__init__()
        self.done, self.operators, self.waits, self.random = Counter(), Counter(), [], []
        self._copies = Copies(self.waits)

    def __enter__(self):
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self._copies.__exit__(*raised)

    @property
    def count(self):
        return self.done.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        if name.startswith("gen_accel::"):
            self.operators[name.removeprefix("gen_accel::")] += 1
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        if not (func.is_view or name in FREE):
            self.done[name] += 1
        if name in WAITS or _leaves(func, args, kwargs) or _has_mask(name, args):
            self.waits.append(name)
        summed = name in SUMMED and any(_is_float(x) for x in args if isinstance(x, torch.Tensor))
        if name in RANDOM or (summed and not _replaces(name, args)):
            self.random.append(name)
        return func(*args, **kwargs)


class Peak(TorchDispatchMode):
    """Follows how many bytes live tensors hold that were made under it, of fake ones too.

    Attributes:
        bytes: at the largest moment, without what an operation takes for itself.
    """

    def __init__(self):
        super().__init__()
        self.bytes, self._held, self._seen = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(x, torch.Tensor):
                self._follow(x)
        self.bytes = max(self.bytes, self._held)
        return out

    def _follow(self, x):
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = size = storage.nbytes()
            self._held += size
            weakref.finalize(storage, self._free, key)

    def _free(self, key):
        self._held -= self._seen.pop(key)


def record(monkeypatch, counted):
    """Have the package's kernels counted in place of run; what they would write holds anything."""

    def note(kernel, programs, x, *arguments, **options):
        counted.done[kernel.__name__] += 1

    own, found = launch.launch, pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    # All are imported before the first is changed, which the others import from.
    for module in [importlib.import_module(one.name) for one in found]:
        if vars(module).get("launch") is own:
            monkeypatch.setattr(module, "launch", note)


def _leaves(func, args, kwargs):
    """Whether a copy goes to another device or into pinned memory."""
    if func._schema.name != "aten::_to_copy":
        return False
    device = kwargs.get("device")
    return kwargs.get("pin_memory") or (device is not None and device != args[0].device)


def _has_mask(name, args):
    """Whether it indexes by a mask, whose true places have to be counted first."""
    if not name.startswith("aten::index"):
        return False
    given = [x for x in args if isinstance(x, (list, tuple))]
    masks = (x for some in given for x in some if isinstance(x, torch.Tensor))
    return any(x.dtype in (torch.bool, torch.uint8) for x in masks)


def _is_float(x):
    return x.is_floating_point()


def _replaces(name, args):
    """Whether it writes in place of adding, each place once."""
    return name.startswith("aten::index_put") and not (len(args) > 3 and args[3])
