"""Activation checkpointing that keeps the inputs of blocks in host memory (`offload_activations`).

On a GPU the copies run on a separate CUDA stream, into pinned memory. In the backward pass the
input of the next block is copied back while the present block computes. A CPU rank makes a plain
copy, so that the same code runs in tests.

transformers' `offload` (5.23, modeling_utils.py) is not used, because it copies on the stream of
the computation. DeepSpeed's (0.19.8 runtime/activation_checkpointing/offload_activations.py) is not
used, because it starts the copy back only when the block needs its input.
"""

import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

# Pinned memory is allocated in parts of this size, because PyTorch rounds the size of each part up
# to a power of two (2.13 c10/core/CachingHostAllocator.h).
PART_BYTES = 64 * 2**20
# Largest number of inputs that are on the device while they are copied to the host. The inputs that
# are still there when the backward pass begins need no copy back.
IN_FLIGHT = 2


class _Input:
    """The input of one block.

    `host`: its copy in host memory, in parts. `on_device`: the tensor on the device, from a copy
    until its use; else None. `earlier`: a weak reference to the input of the block before it. It
    returns None if that input no longer exists: a block below all adapters has no backward pass,
    so autograd drops its input.
    """

    def __init__(self, tensor: torch.Tensor, earlier: "Callable[[], _Input | None]") -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.host = [
            torch.empty(len(part), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            for part in _parts(tensor)
        ]
        self.earlier = earlier
        self.on_device: torch.Tensor | None = None
        self.copied: Any = None  # event at the end of the last copy

    def copy_to_host(self, tensor: torch.Tensor) -> None:
        """Copy the input; on a GPU the copy runs in the background."""
        for host, part in zip(self.host, _parts(tensor), strict=True):
            host.copy_(part, non_blocking=True)

    def copy_from_host(self, tensor: torch.Tensor) -> None:
        """Copy the input back into a tensor of its shape."""
        for host, part in zip(self.host, _parts(tensor), strict=True):
            part.copy_(host, non_blocking=True)

    def empty_on_device(self) -> torch.Tensor:
        """A tensor for the input on its device."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of at most PART_BYTES into a contiguous tensor."""
    return tensor.view(-1).split(PART_BYTES // tensor.element_size())  # type: ignore[no-any-return, no-untyped-call]


class HostActivations:
    """Activation checkpointing of all blocks of a model, with their inputs in host memory."""

    def __init__(self) -> None:
        self._last: Callable[[], _Input | None] = lambda: None  # the input that was packed last
        self._copied_back: Any = None  # event at the end of the last copy of a backward pass
        self._in_flight: deque[_Input] = deque()
        self._stream: Any = None

    def checkpoint(self, function: Any, *inputs: Any, **options: Any) -> Any:
        """Call torch.utils.checkpoint.checkpoint, and offload the first input, the hidden states.

        The hooks below see only tensors that checkpointing itself saves. Tensors that the function
        saves are handled by checkpointing: either none is saved, or it has hooks for them.
        """
        assert inputs, f"{function} has no positional input: offload_activations: false is needed"
        hidden = inputs[0]
        # The hooks live as long as the graph, so they hold no reference to the hidden states.
        pack = partial(self._pack, (hidden.data_ptr(), hidden.shape))
        with saved_tensors_hooks(pack, self._unpack):
            return checkpoint(function, *inputs, **options)

    def _pack(self, hidden: tuple[int, torch.Size], tensor: torch.Tensor) -> Any:
        """Hook for a saved tensor: replace the hidden states by their `_Input`.

        `hidden`: data pointer and shape of the hidden states.
        """
        if (tensor.data_ptr(), tensor.shape) != hidden or not tensor.is_contiguous():
            return tensor
        if self._copied_back is not None:
            # A new micro-batch begins. Wait until the copies from the pinned memory of the one
            # before it have ended, so that its memory is reused. Otherwise the CPU, which is ahead
            # of the GPU, would allocate pinned memory for several micro-batches.
            self._copied_back.synchronize()
            self._copied_back = None
        entry = _Input(tensor, self._last)
        self._last = weakref.ref(entry)
        if tensor.is_cuda:
            self._start_copy_to_host(entry, tensor)
        else:
            entry.copy_to_host(tensor)
        return entry

    def _unpack(self, packed: Any) -> torch.Tensor:
        """Hook for the use of a saved tensor in the backward pass: return it on its device."""
        if not isinstance(packed, _Input):
            return packed  # type: ignore[no-any-return]
        if packed.device.type != "cuda":
            tensor = packed.empty_on_device()
            packed.copy_from_host(tensor)
            return tensor
        self._in_flight.clear()  # inputs that are still on the device hold references themselves
        if packed.on_device is None:
            self._start_copy_to_device(packed)
        restored, packed.on_device = packed.on_device, None
        torch.cuda.current_stream(packed.device).wait_event(packed.copied)
        self._copied_back = packed.copied
        earlier = packed.earlier()
        if earlier is not None and earlier.on_device is None:
            self._start_copy_to_device(earlier)
        assert restored is not None
        return restored

    def _start_copy_to_host(self, entry: _Input, tensor: torch.Tensor) -> None:
        """Start the copy of an input to the host, in the background.

        If IN_FLIGHT inputs are already on the device, the oldest is released. The computation waits
        until its copy has ended, so its memory is not reused too early. At most IN_FLIGHT inputs
        are on the device, however far the CPU is ahead of the GPU.
        """
        current = torch.cuda.current_stream(entry.device)
        if len(self._in_flight) == IN_FLIGHT:
            oldest = self._in_flight.popleft()
            current.wait_event(oldest.copied)
            oldest.on_device = None
        if self._stream is None:
            self._stream = torch.cuda.Stream(entry.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            entry.copy_to_host(tensor)
            entry.copied = self._stream.record_event()
        entry.on_device = tensor
        self._in_flight.append(entry)

    def _start_copy_to_device(self, entry: _Input) -> None:
        """Start the copy of an input back to the device, in the background.

        The present stream allocates the memory, because it will also release it.
        """
        tensor = entry.empty_on_device()
        self._stream.wait_stream(torch.cuda.current_stream(entry.device))
        with torch.cuda.stream(self._stream):
            entry.copy_from_host(tensor)
            entry.copied = self._stream.record_event()
        entry.on_device = tensor
