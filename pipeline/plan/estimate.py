"""DataSize: how much there is to train on; before prepare has run, estimated from a sample."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.data_names import DataSource
from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.data_sample import Sample, read_sample
from pipeline.rows.files import find_files

SAMPLE_BYTES = 1_000_000
_MAX_FILES = 64  # of a source: the others are taken to be like these


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Documents of an epoch and their tokens, cut to `max_length`, without padding.

    `longest`: tokens of the longest one, None where not all of them have been seen. `is_exact`:
    counted by prepare rather than estimated. `sequences` of an epoch, None before prepare.
    """

    documents: int
    tokens: int
    longest: int | None
    is_exact: bool
    sequences: int | None = None

    @property
    def mean_tokens(self) -> float:
        """Tokens of a document."""
        return self.tokens / self.documents


def estimate(settings: RunSettings) -> DataSize | None:
    """Estimate from the beginnings of the training files, SAMPLE_BYTES in all; no error.

    None where a file cannot be read, no row is found in the sample, or a source is on the hub.
    Rows of files that are read whole are counted; their tokens are estimates all the same. Rows
    that prepare would refuse for what their contents are count too; `split_turns` does not.
    """
    try:
        files = [find_files(source.path, "train_data") for source in settings.train_sources]
        samples = _samples(files, settings)
        parts = [
            _part(source, source_files, samples)
            for source, source_files in zip(settings.train_sources, files, strict=True)
        ]
    except (OSError, EOFError, ValueError, UserError):  # ValueError: no file has such a name
        return None
    documents = sum(part[0] for part in parts)
    kept = _kept_share(settings, documents)
    if round(documents * kept) < 1:
        return None
    is_whole = all(file in samples and samples[file].share == 1 for each in files for file in each)
    counted = [count for sample in samples.values() for count in sample.tokens]
    return DataSize(
        documents=round(documents * kept),
        tokens=round(sum(part[1] for part in parts) * kept),
        longest=max(counted) if is_whole else None,
        is_exact=False,
    )


def _samples(files: list[list[Path]], settings: RunSettings) -> dict[Path, Sample]:
    """A sample of each file: all of the small ones, an equal part of the rest."""
    chosen = {file for each in files for file in each[:: 1 + (len(each) - 1) // _MAX_FILES]}
    left, samples = SAMPLE_BYTES, {}
    by_size = sorted(chosen, key=lambda file: (file.stat().st_size, file))
    for index, file in enumerate(by_size):
        samples[file] = read_sample(file, left // (len(by_size) - index), settings)
        left -= samples[file].read_bytes
    return samples


def _part(
    source: DataSource, files: list[Path], samples: dict[Path, Sample]
) -> tuple[float, float]:
    """Documents of a source in an epoch, and their tokens."""
    seen = [file for file in files if file in samples]
    scale = _size(files) / _size(seen)
    found = [samples[file] for file in seen if samples[file].tokens]
    documents = scale * sum(len(sample.tokens) / sample.share for sample in found)
    tokens = scale * sum(sum(sample.tokens) / sample.share for sample in found)
    taken = 1.0 if source.limit is None else min(1.0, source.limit / max(documents, 1))
    return documents * taken * source.weight, tokens * taken * source.weight


def _size(files: list[Path]) -> int:
    return max(1, sum(file.stat().st_size for file in files))


def _kept_share(settings: RunSettings, documents: float) -> float:
    """Share of the documents that is not held out."""
    held_out = settings.held_out
    if held_out is None:
        return 1.0
    return 1 - (held_out if isinstance(held_out, float) else min(1.0, held_out / max(documents, 1)))
