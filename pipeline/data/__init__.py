"""Examples -> the batches of each rank.

In: settings, rows, a plan. Out: the prepared data set in the run folder, and the tensors of every
step. `chat/` tokenises one example, `prepare/` all of them, `dataset/` is their form on disk, and
`order/` says which rank trains on what, and when. Open `prepare/prepare.py` first.
"""
