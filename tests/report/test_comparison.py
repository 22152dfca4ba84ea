"""The comparison lists what differs, and the run with the lowest held-out loss first."""

import json
import re

import pytest
import yaml

from pipeline.report.comparison import write_comparison
from tests.messages import refused
from tests.report.folders import (
    FILES,
    HOSTILE_TEXT,
    build_hostile_run,
    build_run,
    metrics,
    write_metrics,
)
from tests.report.test_page import Page

pytestmark = pytest.mark.unit


def build_sweep(tmp_path, losses, **settings):
    """Write a run for each name and last held-out loss; return their folders.

    `losses`: name -> loss; None for a run without evaluations. The runs differ in the setting `lr`.
    Each run has a lower held-out loss, 0.01, at step 40.
    """
    folders = []
    for i, (name, loss) in enumerate(losses.items()):
        folder = build_run(tmp_path / name, without=("score.json",))
        values = FILES["run.yaml"] | {"lr": 1e-4 * (i + 1), "output_dir": name} | settings
        (folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        lines = [line for line in metrics() if "eval_loss" not in line]
        if loss is not None:
            lines += [{"step": 40, "eval_loss": 0.01}, {"step": 80, "eval_loss": loss}]
        write_metrics(folder, lines)
        folders.append(folder)
    return folders


def comparison_page(folders):
    path = write_comparison(folders)
    return Page(path.read_text(encoding="utf-8"))


def order_of_results(page, names):
    """The names in the order of the table of results."""
    results = page.text.split("Results")[1].split("Sorted by")[0]
    return re.findall("|".join(names), results)


def test_runs_are_sorted_by_the_held_out_loss_of_their_last_evaluation(tmp_path):
    losses = {"first": 0.3, "second": None, "third": 0.1, "fourth": 0.2}
    page = comparison_page(build_sweep(tmp_path, losses))
    assert (tmp_path / "comparison.html").is_file()
    assert order_of_results(page, losses) == ["third", "fourth", "first", "second"]
    charts = {chart["name"]: chart["series"] for chart in page.curves["charts"]}
    assert [series["label"] for series in charts["eval_loss"]] == ["first", "third", "fourth"]
    assert [series["label"] for series in charts["loss"]] == list(losses)
    assert len({series["colour"] for series in charts["loss"]}) == 4


def test_a_run_that_keeps_the_best_adapter_counts_with_its_lowest_loss(tmp_path):
    page = comparison_page(build_sweep(tmp_path, {"a": 0.5, "b": 0.4}, keep_best=True))
    assert page.text.count("0.0100 40") == 2  # in both rows: lowest loss, and its step


def test_only_the_settings_that_differ_are_listed(tmp_path):
    page = comparison_page(build_sweep(tmp_path, {"a": 0.5, "b": 0.4}))
    different = page.text.split("Settings that differ")[1].split("Results")[0]
    assert "lr 1e-4 2e-4" in different
    assert not {"lora_r", "output_dir", "seed"} & set(different.split())
    assert "not comparable" not in page.text


def test_a_difference_in_plan_or_versions_is_listed(tmp_path):
    folders = build_sweep(tmp_path, {"a": 0.5, "b": 0.4})
    plan = FILES["plan.json"] | {"choice": FILES["plan.json"]["choice"] | {"zero_stage": 3}}
    (folders[1] / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    page = comparison_page(folders)
    assert "plan: zero_stage 2 3" in page.text


def test_losses_on_other_held_out_rows_are_marked_as_not_comparable(tmp_path):
    folders = build_sweep(tmp_path / "x", {"a": 0.5})
    folders += build_sweep(tmp_path / "y", {"a": 0.4}, eval_data="other.jsonl")
    page = comparison_page(folders)
    assert "not comparable where eval_data differs" in page.text
    assert order_of_results(page, ["x/a", "y/a"]) == ["y/a", "x/a"]


def test_names_with_markup_stay_text(tmp_path):
    page = comparison_page([build_hostile_run(tmp_path), build_run(tmp_path / "plain")])
    assert " ".join(HOSTILE_TEXT.replace("/", "|").split()) in page.text
    assert [tag for tag, _ in page.tags].count("script") == 3  # data, uPlot, charts.js


def test_the_same_run_twice_and_a_folder_that_is_not_a_run_are_refused(tmp_path):
    run = build_run(tmp_path / "run")
    with refused("twice", run):
        write_comparison([run, tmp_path / "run/../run"])
    with refused("not a run folder"):
        write_comparison([run, tmp_path])
