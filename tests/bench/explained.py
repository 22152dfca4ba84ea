"""List of the tensor storages at the memory peak: `tests.bench.memory --explain`."""

from collections import Counter

from pipeline.train.live_bytes import LiveBytes


class ExplainedLiveBytes(LiveBytes):
    """LiveBytes that records the storages alive at the peak, and the operator that made each."""

    def __init__(self):
        super().__init__()
        self._operator = "before the first operator"
        self._events = []  # (storage, (size, operator)); (storage, None) when it is freed
        self._num_events_at_peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._operator = func
        return super().__torch_dispatch__(func, types, args, kwargs)

    def count(self, tensor):
        before = self.now
        super().count(tensor)
        if self.now != before:
            storage = tensor.untyped_storage()
            self._note(storage._cdata, (storage.nbytes(), str(self._operator)))

    def _forget(self, key):
        super()._forget(key)
        self._note(key, None)

    def _note(self, key, change):
        self._events.append((key, change))
        if self.now == self.peak:
            self._num_events_at_peak = len(self._events)

    def alive(self):
        """Number of storages alive at the peak, by size and operator."""
        storages = {}
        for key, change in self._events[: self._num_events_at_peak]:
            if change is None:
                storages.pop(key, None)  # a storage of 0 bytes has no first event
            else:
                storages[key] = change
        return Counter(storages.values())
