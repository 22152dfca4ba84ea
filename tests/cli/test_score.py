"""The table of scores on the terminal."""

import pytest

from pipeline.cli.score import print_table

pytestmark = pytest.mark.unit


def test_the_table_shows_every_name_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    scores = {"loss": 1.25, "loss_interval": [1.1, 1.4], "perplexity": 3.49, "seconds": 2.0}
    names = [f"/data/someone/experiments/{'deep/' * 10}{end} adapter" for end in ("r8", "[/r16]")]
    print_table({"rows": 4, "models": dict.fromkeys(names, scores)})
    lines = [line.split("│")[1].strip() for line in capsys.readouterr().out.split("\n")[4:-2]]
    assert "".join(lines).replace(" ", "") == "".join(names).replace(" ", "")
