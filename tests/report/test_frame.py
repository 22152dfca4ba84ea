"""The charting library is the published one, and the data block holds no markup."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.frame import UPLOT, data_block

pytestmark = pytest.mark.unit

# File of the npm package uplot 1.6.32 -> SHA-256.
PUBLISHED = {
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}


def test_the_charting_library_is_the_published_one_with_its_licence():
    lines = [line.split() for line in (UPLOT / "SHA256SUMS").read_text().splitlines()]
    assert {name: digest for digest, name in lines} == PUBLISHED
    for name, digest in PUBLISHED.items():
        assert hashlib.sha256((UPLOT / name).read_bytes()).hexdigest() == digest
    assert {path.name for path in UPLOT.iterdir()} == {*PUBLISHED, "SHA256SUMS"}
    assert (UPLOT / "LICENSE").read_text().startswith("The MIT License (MIT)")
    assert sum(path.stat().st_size for path in UPLOT.iterdir()) < 60_000  # bytes of every page


@given(st.text())
def test_no_text_ends_the_data_block_or_opens_markup(text):
    block = data_block({"label": text})
    assert block.isascii()
    assert not set("<>&") & set(block)
    assert json.loads(block) == {"label": text}
