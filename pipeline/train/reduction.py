"""Reduction of the gradients over ranks, once in an optimizer step.

By default DeepSpeed reduces the gradients after each micro-batch, and the ranks wait for each other
each time. Here the gradients of all micro-batches are summed first, and the sum is reduced.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def accumulate_in_fp32(parameters: Collection[nn.Parameter]) -> None:
    """Let autograd sum the gradients of micro-batches in fp32, whatever the parameters' dtype."""
    for parameter in parameters:
        parameter.grad_dtype = torch.float32


@contextmanager
def reduced_once(engine: Any, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Sum the gradients of all backward passes in the body, and reduce the sums at its end.

    After an exception nothing may be reduced, because the other ranks may be in another collective
    operation. DeepSpeed 0.19.8 reduces at the end of its context in any case (engine.py:3280);
    therefore the gradients are removed before.
    """
    with engine.coalesce_grad_reduction():
        try:
            yield
        except BaseException:
            for parameter in parameters:
                parameter.grad = None
            raise
