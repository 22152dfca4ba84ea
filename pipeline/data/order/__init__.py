"""Prepared data set -> this rank's batches of every step, as a pure function of (seed, epoch).

In: a plan, a split and a rank. Out: tensors of each micro-batch and the size of each step. Open
`steps.py` first; `order.py` has the order, `balance.py` divides a step over ranks, `batches.py`
builds tensors.
"""
