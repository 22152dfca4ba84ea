"""published_shapes.json has the layer sizes that the command counts on the models' classes."""

import pytest

from pipeline.cli.shapes import shape_by_class, shapes_text
from pipeline.files import read_json
from pipeline.plan.given.published import SHAPES_FILE, published_models

pytestmark = pytest.mark.tensor

# A dense model, one with several head widths, and one that is counted as another model type.
NAMES = ("ibm-granite/granite-3.1-2b-instruct", "google/gemma-4-31B", "moonshotai/Kimi-K2-Instruct")


@pytest.mark.parametrize("name", NAMES)
def test_the_sizes_in_the_file_equal_those_of_the_model_class(name):
    model = next(model for model in published_models() if model.name == name)
    assert shape_by_class(model) == read_json(SHAPES_FILE)["shapes"][name]


def test_the_file_has_one_line_for_each_model_as_the_command_writes_it():
    lines = SHAPES_FILE.read_text(encoding="utf-8").splitlines()
    shapes = read_json(SHAPES_FILE)["shapes"]
    # The first two lines have the versions of torch and transformers.
    assert lines[2:] == shapes_text(shapes).splitlines()[2:]
