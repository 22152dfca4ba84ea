"""The generator of the quickstart's data, whose script imports from its own folder."""

import sys

from tests import ROOT

FOLDER = ROOT / "launch/quickstart"

sys.path.insert(0, str(FOLDER))
from make_data import NUM_TRAIN, make_data  # noqa: E402 - needs the path

__all__ = ["NUM_TRAIN", "make_data"]
