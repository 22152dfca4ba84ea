"""Curves keep every minimum and maximum when they are thinned."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.curves import (
    MAX_POINTS,
    MIN_POINTS,
    Chart,
    Marks,
    Series,
    bin_edges,
    page_data,
    smoothed,
    thinned,
)

pytestmark = pytest.mark.unit


@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=400),
    max_points=st.integers(min_value=4, max_value=60),
)
def test_the_minimum_and_maximum_of_every_bin_survive(values, max_points):
    steps = np.arange(len(values))
    kept, kept_values = thinned(steps, np.array(values), max_points)
    assert len(kept) <= max_points
    assert list(kept) == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, len(values) - 1)
    assert [values[step] for step in kept] == kept_values.tolist()
    edges = bin_edges(len(values), max_points)
    for start, end in pairwise(edges):
        kept_in_bin = [values[step] for step in kept if start <= step < end]
        # A bin may be empty; then both sides are 0.
        assert min(values[start:end], default=0) == min(kept_in_bin, default=0)
        assert max(values[start:end], default=0) == max(kept_in_bin, default=0)


def test_bins_cover_every_point_once_and_differ_by_at_most_one_point():
    edges = bin_edges(100_000)
    assert (edges[0], edges[-1]) == (0, 100_000)
    # 4,000 points are 1,999 bins of two points, and the two ends: 50.03 steps in a bin.
    assert {end - start for start, end in pairwise(edges)} <= {50, 51}


def test_values_that_are_not_finite_are_left_out_of_the_data_of_a_page():
    points = ([1, 2, 3, 4], [math.nan, 2.0, math.inf, 0.123456789])
    data = Series(label="a", points=points).as_json(MAX_POINTS)
    assert (data["x"], data["y"]) == ([2, 4], [2.0, 0.123457])
    json.dumps(data, allow_nan=False)  # raises an error for a number that is not finite


def test_a_page_of_many_runs_has_fewer_points_for_each_curve():
    steps = list(range(20_000))
    points = (steps, [float(step % 97) for step in steps])
    series_of_runs = [Series(label=str(i), points=points, colour=i) for i in range(100)]
    data = page_data([Chart(name="loss", title="Loss", series=series_of_runs)], Marks())
    assert MIN_POINTS <= data["points"] < MAX_POINTS
    assert max(len(series["x"]) for series in data["charts"][0]["series"]) <= data["points"]
    assert len(json.dumps(data)) < 4_000_000  # bytes


def test_smoothing_keeps_a_constant_and_a_line():
    assert smoothed([2.0] * 45) == pytest.approx([2.0] * 45)
    assert smoothed([float(i) for i in range(60)])[30] == pytest.approx(30)
    assert smoothed([]) == []
