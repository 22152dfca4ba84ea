"""What was alive when live tensors had the most bytes: for `tests.bench.memory --explain`."""

from collections import Counter

from pipeline.train.live_bytes import LiveBytes


class Explained(LiveBytes):
    """Remembers every change, to say what was alive at the peak."""

    def __init__(self):
        super().__init__()
        self._events = []
        self._at_peak = 0

    def _count(self, size, source, key):
        before = self.peak
        super()._count(size, source, key)
        self._events.append((size, source, key))
        if self.peak > before:
            self._at_peak = len(self._events)

    def alive(self):
        """How many storages of which size were alive at the peak, by what made them."""
        found = {}
        for size, source, key in self._events[: self._at_peak]:
            if source:
                before, maker = found.get(key, (0, source))
                found[key] = before + size, maker
            else:
                del found[key]
        return Counter(found.values())
