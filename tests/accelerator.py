"""A make-believe GPU: no test machine has a real one, and yet the path of a GPU has rules that a test can hold it to.

Its tensors are computed on the CPU, but refuse what a GPU refuses: operations that mix them with tensors in main
memory, reading their memory from outside, and more of them than its memory holds. It also refuses what a GPU is bad at,
decompositions of small cores. Its device is called "meta", a name that torch knows and asks no driver for.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from loratool import engine
from loratool.engine import Resources

_MOVES = ("aten::_to_copy", "aten::copy_")
_INDEXED = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")  # of these an index may be in main memory
_CORES = ("aten::_linalg_svd", "aten::_linalg_eigh")


class OnDevice(torch.Tensor):
    """A tensor of the device; what it holds is `inner`."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="meta"
        )
        self.inner = inner
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        assert force, "its memory is not the CPU's"
        return self.inner.numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of the device in a thread that does not know of it")


class Accelerator:
    """The device: `memory` bytes of it, and what was done on it."""

    def __init__(self, memory: float = float("inf")) -> None:
        self.memory, self.held, self.peak = memory, 0, 0
        self.calls: Counter[str] = Counter()
        self.refusals = 0
        self._owners: Counter[int] = Counter()
        self._lock = threading.RLock()

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Do one operation of torch, wherever its arguments are."""
        name, leaves = func._schema.name, tree_flatten((args, kwargs))[0]
        mine = [x for x in leaves if isinstance(x, OnDevice)]
        wanted = kwargs.get("device")
        there = wanted.type == "meta" if wanted is not None else bool(mine)
        if not mine and not there:
            return func(*args, **kwargs)
        assert name not in _CORES or mine[0].shape[-1] > 1024, f"{name} belongs on the CPU"
        strangers = [x for x in leaves if type(x) is torch.Tensor and x.dim() and x.device.type == "cpu"]
        if mine and strangers and name not in _MOVES + _INDEXED:
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device")
        with self._lock:
            self.calls[name] += 1
        inner = partial(tree_map, lambda x: x.inner if isinstance(x, OnDevice) else x)
        kwargs = {**kwargs, "device": torch.device("cpu")} if wanted is not None else kwargs
        result = func(*inner(args), **inner(kwargs))
        known = {id(x.inner): x for x in mine}  # what is done in place gives the same tensor
        if name == "aten::copy_" and not isinstance(args[0], OnDevice):
            return args[0]

        def outside(x: Any) -> Any:
            return known[id(x)] if id(x) in known else self.put(x) if torch.is_tensor(x) else x

        return tree_map(outside, result) if there else result

    def put(self, inner: torch.Tensor) -> OnDevice:
        """Return a tensor as one of the device, if there is room for it."""
        storage, size = inner.untyped_storage().data_ptr(), inner.untyped_storage().nbytes()
        with self._lock:
            if not self._owners[storage]:
                if self.held + size > self.memory:
                    self.refusals += 1
                    raise torch.OutOfMemoryError("the make-believe GPU is full")
                self.held += size
                self.peak = max(self.peak, self.held)
            self._owners[storage] += 1
        tensor = OnDevice(inner)
        weakref.finalize(tensor, self._release, storage, size)
        return tensor

    def _release(self, storage: int, size: int) -> None:
        with self._lock:
            self._owners[storage] -= 1
            self.held -= 0 if self._owners[storage] else size


class _Mode(TorchDispatchMode):
    def __init__(self, device: Accelerator) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.device.run(func, args, kwargs or {})


@contextmanager
def accelerator(memory: float = float("inf")) -> Iterator[Accelerator]:
    """Make runs in this context find a GPU: `Resources(device="cuda")` is it."""
    device = Accelerator(memory)

    class Workers(ThreadPoolExecutor):
        """Threads that know the device."""

        def __init__(self, threads: int, *_: Any) -> None:
            super().__init__(threads, initializer=lambda: _Mode(device).__enter__())

    tensor = torch.tensor

    def made_there(data: Any, *, device: Any = None, **how: Any) -> torch.Tensor:
        """torch makes it without asking the mode."""
        return tensor(data, **how) if device is None else tensor(data, **how).to(device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", made_there)
        patch.setattr(Resources, "chosen_device", lambda self: "meta" if self.device == "cuda" else self.device)
        patch.setattr(engine, "ThreadPoolExecutor", Workers)
        yield device
