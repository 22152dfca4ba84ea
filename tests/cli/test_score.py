"""The table of scores on the terminal."""

import pytest

from pipeline.cli.score import print_table

pytestmark = pytest.mark.unit


def test_the_table_shows_the_whole_names_of_models_wider_than_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    scores = {"loss": 1.25, "loss_interval": [1.1, 1.4], "perplexity": 3.49, "seconds": 2.0}
    # [/r16] would be markup for the library that prints the table.
    names = [f"/data/someone/experiments/{'deep/' * 10}{end} adapter" for end in ("r8", "[/r16]")]
    print_table({"rows": 4, "models": dict.fromkeys(names, scores)})
    table_lines = capsys.readouterr().out.split("\n")
    rows = table_lines[4:-2]  # without the title, the heading and the lower border
    first_column = [row.split("│")[1].strip() for row in rows]  # each name on several lines
    assert "".join(first_column).replace(" ", "") == "".join(names).replace(" ", "")
