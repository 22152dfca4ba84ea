"""Sequences on disk: repeats by weight, columns of statistics, and packs of one source."""

from collections import Counter

import numpy as np
import pytest

from pipeline.data.dataset.reader import SplitIndex, open_split
from pipeline.data.dataset.writer import write_sequences

pytestmark = pytest.mark.tensor


class WrittenSplit:
    """A split on disk with documents of random length, in the files that `SplitWriter` writes.

    `counts` and `weights`: number of documents and weight of each source. The token ids of the
    split are 0, 1, 2, ..., so that the first id of a document is its offset.
    """

    def __init__(self, folder, counts, weights, *, packing, max_length=64, seed=0):
        random = np.random.default_rng(seed)
        self.sources = np.repeat(np.arange(len(counts)), counts)
        random.shuffle(self.sources)
        count = len(self.sources)
        self.lengths = random.integers(2, max_length // 2, count)
        self.supervised = random.integers(1, self.lengths)
        self.digests = random.integers(0, 2**63, count).astype(np.uint64)
        offsets = np.append(0, np.cumsum(self.lengths))
        masks = [  # the last tokens of a document are supervised
            np.arange(length) >= length - num_supervised
            for length, num_supervised in zip(self.lengths, self.supervised, strict=True)
        ]
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
        occurrences_by_offset = Counter()
        for i in self.split.sequences.of_epoch():
            occurrences_by_offset.update(int(ids[0]) for ids, _ in self.split.sequence(i))
        offsets = np.append(0, np.cumsum(self.lengths))[:-1]
        return np.array([occurrences_by_offset[int(offset)] for offset in offsets])


@pytest.mark.parametrize("packing", [True, False])
def test_a_weight_repeats_all_documents_and_a_fixed_fraction_of_them_once_more(packing, tmp_path):
    weights = [1.0, 0.25, 2.5, 0.001, 3.0, 1.1]
    counts = [40, 80, 60, 20, 10, 50]
    written = WrittenSplit(tmp_path, counts, weights, packing=packing)
    occurrences = written.occurrences()
    for source, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        of_source = occurrences[written.sources == source]
        has_fraction = weight % 1 > 0
        assert set(of_source) <= {int(weight), int(weight) + has_fraction}
        assert of_source.sum() == max(round(weight * count), 1)
    assert written.epoch.documents == occurrences.sum()
    assert written.epoch.tokens == (occurrences * written.lengths).sum()
    assert written.split.sequences.supervised_tokens == (occurrences * written.supervised).sum()
    assert written.epoch.sequences == written.split.sequences.per_epoch


def test_the_fraction_of_a_weight_is_chosen_by_content(tmp_path):
    """The selected documents do not depend on the order of rows: a digest is a hash of a row."""
    first = WrittenSplit(tmp_path, [400], [0.5], packing=True)
    selected = set(first.digests[first.occurrences() == 1])
    shuffled_digests = np.random.default_rng(1).permutation(first.digests)
    np.save(tmp_path / "digests.npy", shuffled_digests)
    second = write_sequences(tmp_path, 64, packing=False, weights=[0.5])
    documents = np.load(tmp_path / "sequence_documents.npy")
    assert second.documents == len(documents) == 200
    assert set(shuffled_digests[documents]) == selected


def test_the_fraction_of_a_weight_is_independent_of_holding_out(tmp_path):
    """Weights and holding out both select rows by digest, but not the same ones.

    A weight of 0.5 selects about half of the 1000 rows with high digests, not all or none of them.
    """
    written = WrittenSplit(tmp_path, [2000], [0.5], packing=False)
    has_high_digest = written.digests > np.median(written.digests)
    assert 400 < written.occurrences()[has_high_digest].sum() < 600


@pytest.mark.parametrize("packing", [True, False])
def test_sequence_columns_are_sums_over_their_documents(packing, tmp_path):
    split = WrittenSplit(tmp_path, [100, 50], [1.0, 2.0], packing=packing).split
    sequences = split.sequences
    for i in range(len(sequences.tokens)):
        lengths = [len(ids) for ids, _ in split.sequence(i)]
        assert sum(lengths) == sequences.tokens[i] <= 64
        assert sum(length**2 for length in lengths) == sequences.squares[i]
        assert sum(int(mask.sum()) for _, mask in split.sequence(i)) == sequences.supervised[i]
        assert packing or len(lengths) == 1
    with pytest.raises(IndexError):
        split.sequence(len(sequences.tokens))
    with pytest.raises(IndexError):
        split.sequence(-1)


def test_the_documents_of_a_pack_have_the_same_source(tmp_path):
    written = WrittenSplit(tmp_path, [100, 50, 30], [1.0, 2.0, 0.5], packing=True)
    offsets = np.append(0, np.cumsum(written.lengths))
    for segment in written.split.sequences.segments:
        for i in range(segment.start, segment.end):
            offsets_in_pack = [int(ids[0]) for ids, _ in written.split.sequence(i)]
            documents = np.searchsorted(offsets, offsets_in_pack)
            assert set(written.sources[documents]) == {segment.source}
