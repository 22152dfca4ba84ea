"""Peak bytes of live tensors on a CPU, where PyTorch does not count them."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counter of the bytes in the storages of all tensors that operators read or return.

    A storage counts from its first use by an operator until it is freed; memory-mapped tensors
    count too. Workspace that a kernel allocates and frees within one operator does not count,
    because on a CPU its size differs from a GPU's. `now`: bytes at present. `peak`: the largest
    number of bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        # Address of a storage -> the storage and its counted bytes.
        self._counted: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count its inputs and outputs."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.count(leaf)
        return out

    def count(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor if it is new or has another size than before."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._counted:
            reference, counted_size = self._counted[address]
            if reference() is storage:
                if size != counted_size:
                    self._counted[address] = (reference, size)
                    self._add(size - counted_size)
                return
        reference = weakref.ref(storage, lambda _: self._forget(address))
        self._counted[address] = (reference, size)
        self._add(size)

    def _forget(self, address: int) -> None:
        _, size = self._counted.pop(address)
        self._add(-size)

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)
