"""Examples -> the batches of each rank.

In: settings, rows, a plan. Out: the prepared data set in the run folder, and the tensors of every
step. `chat/` tokenises one example and `prepare/` all of them; `dataset/` is the prepared data set
on disk; `order/` assigns its sequences to steps and ranks. Open `prepare/prepare.py` first.
"""
