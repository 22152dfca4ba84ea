"""The test suite; ROOT is the root of the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
