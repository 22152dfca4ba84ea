"""Sequences on disk: repeats by weight, columns of statistics, and packs of one source."""

from collections import Counter

import numpy as np
import pytest

from pipeline.data.dataset.reader import SplitIndex, open_split
from pipeline.data.dataset.writer import write_sequences

pytestmark = pytest.mark.tensor


class WrittenSplit:
    """A split on disk with documents of random length, in the layout of `SplitWriter.close`."""

    def __init__(self, folder, counts, weights, *, packing, max_length=64, seed=0):
        random = np.random.default_rng(seed)
        self.sources = np.repeat(np.arange(len(counts)), counts)
        random.shuffle(self.sources)
        count = len(self.sources)
        self.lengths = random.integers(2, max_length // 2, count)
        self.supervised = random.integers(1, self.lengths)
        self.digests = random.integers(0, 2**63, count).astype(np.uint64)
        offsets = np.append(0, np.cumsum(self.lengths))
        masks = [np.arange(n) >= n - s for n, s in zip(self.lengths, self.supervised, strict=True)]
        columns = {
            "ids": np.arange(offsets[-1], dtype=np.int32),
            "supervised": np.concatenate(masks),
            "offsets": offsets,
            "counts": self.supervised,
            "digests": self.digests,
            "sources": self.sources.astype(np.int32),
        }
        for name, column in columns.items():
            np.save(folder / f"{name}.npy", column)
        self.epoch = write_sequences(folder, max_length, packing=packing, weights=weights)
        self.split = open_split(
            SplitIndex(
                key="k",
                folder=folder,
                documents=count,
                tokens=int(offsets[-1]),
                supervised_tokens=int(self.supervised.sum()),
                longest=int(self.lengths.max()),
                sequences=self.epoch.sequences,
                epoch_documents=self.epoch.documents,
                epoch_tokens=self.epoch.tokens,
            )
        )

    def occurrences(self):
        """Number of occurrences of each document in an epoch."""
        occurrences = Counter()
        for i in self.split.sequences.of_epoch():
            occurrences.update(int(ids[0]) for ids, _ in self.split.sequence(i))
        starts = np.append(0, np.cumsum(self.lengths))[:-1]
        return np.array([occurrences[int(start)] for start in starts])


@pytest.mark.parametrize("packing", [True, False])
def test_a_weight_repeats_all_documents_and_a_fixed_fraction_of_them_once_more(packing, tmp_path):
    weights = [1.0, 0.25, 2.5, 0.001, 3.0, 1.1]
    counts = [40, 80, 60, 20, 10, 50]
    written = WrittenSplit(tmp_path, counts, weights, packing=packing)
    occurrences = written.occurrences()
    for source, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        own = occurrences[written.sources == source]
        assert set(own) <= {int(weight), int(weight) + (weight % 1 > 0)}
        assert own.sum() == max(round(weight * count), 1)
    assert written.epoch.documents == occurrences.sum()
    assert written.epoch.tokens == (occurrences * written.lengths).sum()
    assert written.split.sequences.supervised_tokens == (occurrences * written.supervised).sum()
    assert written.epoch.sequences == written.split.sequences.per_epoch


def test_the_fraction_of_a_weight_is_chosen_by_content(tmp_path):
    """The selected documents do not depend on the order of rows."""
    first = WrittenSplit(tmp_path, [400], [0.5], packing=True)
    taken = set(first.digests[first.occurrences() == 1])
    order = np.random.default_rng(1).permutation(400)
    np.save(tmp_path / "digests.npy", first.digests[order])
    second = write_sequences(tmp_path, 64, packing=False, weights=[0.5])
    documents = np.load(tmp_path / "sequence_documents.npy")
    assert second.documents == len(documents) == 200
    assert set(first.digests[order][documents]) == taken


def test_the_fraction_of_a_weight_is_independent_of_holding_out(tmp_path):
    """Both select by digest. A weight of 0.5 also selects half of the rows with high digests."""
    written = WrittenSplit(tmp_path, [2000], [0.5], packing=False)
    high = written.digests > np.median(written.digests)
    assert 400 < written.occurrences()[high].sum() < 600


@pytest.mark.parametrize("packing", [True, False])
def test_sequence_columns_are_sums_over_their_documents(packing, tmp_path):
    split = WrittenSplit(tmp_path, [100, 50], [1.0, 2.0], packing=packing).split
    sequences = split.sequences
    for i in range(len(sequences.tokens)):
        lengths = [len(ids) for ids, _ in split.sequence(i)]
        assert sum(lengths) == sequences.tokens[i] <= 64
        assert sum(n * n for n in lengths) == sequences.squares[i]
        assert sum(int(mask.sum()) for _, mask in split.sequence(i)) == sequences.supervised[i]
        assert packing or len(lengths) == 1
    with pytest.raises(IndexError):
        split.sequence(len(sequences.tokens))
    with pytest.raises(IndexError):
        split.sequence(-1)


def test_packs_hold_documents_of_one_source(tmp_path):
    written = WrittenSplit(tmp_path, [100, 50, 30], [1.0, 2.0, 0.5], packing=True)
    starts = np.append(0, np.cumsum(written.lengths))
    for segment in written.split.sequences.segments:
        for i in range(segment.start, segment.end):
            firsts = [int(ids[0]) for ids, _ in written.split.sequence(i)]
            sources = written.sources[np.searchsorted(starts, firsts)]
            assert set(sources) == {segment.source}
