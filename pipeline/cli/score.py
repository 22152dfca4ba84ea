"""Score models side by side on the same rows, with 95 % intervals.

{command} RUN_FOLDER                       base, adapter and merged model, held-out rows
{command} RUN_FOLDER --data FILE           on other rows
{command} RUN_FOLDER RUN_FOLDER MODEL ...  several runs and models, rows of the first run
deepspeed {script} RUN_FOLDER                    every GPU scores a part of the rows
{command} RUN_FOLDER --tasks NAMES         with lm-evaluation-harness

Writes RUN_FOLDER/score.json, which the report shows. With several models or with --data, it writes
scores.json in the current folder. After a stop, the same command resumes. {docs}/scoring.md
explains the scores.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.cli.arguments import Parser, count
from pipeline.cluster.devices import set_up_rank
from pipeline.cluster.exits import run_main
from pipeline.cluster.placement import from_environment
from pipeline.cluster.progress import show_progress
from pipeline.cluster.session import Session
from pipeline.errors import RankZeroError, UserError
from pipeline.evaluate.harness import run_harness
from pipeline.evaluate.measures import parse_pattern
from pipeline.evaluate.model_specs import model_specs
from pipeline.evaluate.rows import examples_of_file, held_out_examples
from pipeline.files import dump_json, write_text

# Keys of the scores in score.json -> headings of the printed table.
_COLUMNS = {
    "loss": "loss", "perplexity": "perplexity", "exact_match": "exact match",
    "regex_match": "regex match", "valid_json": "valid JSON",
}  # fmt: skip
_FORMATS = {"loss": "{:.4f}", "perplexity": "{:.4g}"}
_SHARES = ("exact_match", "regex_match", "valid_json")  # shares of rows, shown in per cent


def score() -> None:
    """Parse the command line, score, write the results and print a table. Collective."""
    args = _parser().parse_intermixed_args()
    words = args.run_folder  # run folders, models and overrides
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    names = [word for word in words if word not in overrides]  # of run folders and models
    if not names:
        raise UserError("run_folder: name a run folder or a model; --help lists the arguments")
    pattern = None if args.regex is None else parse_pattern(args.regex)
    if args.tasks is not None:
        if from_environment(os.environ, allow_single_process=True).world_size > 1:
            raise UserError("--tasks: lm-evaluation-harness runs in one process; use python")
        run_harness(model_specs(names, overrides, args.data), args.tasks, _output_file(args, names))
        return
    let_waiting_threads_sleep()
    placement, hardware, _missing_gpus = set_up_rank(os.environ, allow_single_process=True)
    specs = model_specs(names, overrides, args.data)
    out, settings = _output_file(args, names), specs[0].settings
    if args.data is None and not specs[0].adapter:
        raise UserError(
            f"{names[0]}: is a model, which has no held-out rows; name rows with --data"
        )
    if pattern is None and settings.eval_regex is not None:
        pattern = parse_pattern(settings.eval_regex)
    examples = (
        held_out_examples(Path(names[0]).expanduser(), settings)
        if args.data is None
        else examples_of_file(args.data, settings)
    )
    with show_progress("importing PyTorch"):
        from pipeline.evaluate.score import ScoreOptions, score_models

    options = ScoreOptions(
        rows=args.rows,
        max_new_tokens=args.max_new_tokens,
        pattern=pattern,
        answers=out.with_name(f"{out.stem}-answers"),
    )
    with Session(placement, hardware) as session:
        scores = score_models(specs, examples, options, session)
        if session.is_rank_zero:
            _write(out, scores)
            print_table(scores)
            print(f"scores and answers: {out}")


def let_waiting_threads_sleep() -> None:
    """Make idle OpenMP threads sleep; call this function before torch is imported.

    By default an idle thread occupies its core in a busy loop. When other programs use the machine
    too, this takes cores from the threads that compute: scoring took 8 times as long on 2 busy
    cores (docs/log.md, 2026-11-30).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _parser() -> Parser:
    parser = Parser("score", help_template=__doc__)
    parser.add_argument(
        "run_folder",
        nargs="+",
        metavar="RUN_FOLDER|MODEL",
        help="output_dir of a run, model folder, or cached hub model; key=value: a setting for "
        "this command only, such as load_in_4bit=true",
    )
    parser.add_argument(
        "--data", metavar="FILE", help="rows to score on, instead of the held-out rows of the run"
    )
    parser.add_argument(
        "--rows", type=count, default=200, metavar="N", help="the first N rows (200)"
    )
    parser.add_argument(
        "--regex",
        metavar="PATTERN",
        help="also compare what this pattern extracts from expected and generated answer: the "
        "first group, or else the whole, of its last match",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=count,
        metavar="N",
        help="longest answer in tokens (default: the longest expected answer, plus 8)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON file to write (default: RUN_FOLDER/score.json)",
    )
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help="run these tasks of lm-evaluation-harness instead, separated by commas",
    )
    parser.add_local_rank()
    return parser


def _output_file(args: argparse.Namespace, names: list[str]) -> Path:
    """The JSON file to write.

    RUN_FOLDER/score.json has the scores of one run on its own held-out rows; all other scores go to
    scores.json in the current folder.
    """
    if args.out is not None:
        out: Path = args.out
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise UserError(f"--out: {out} is not a file in an existing folder")
        return out
    folder = Path(names[0]).expanduser()
    is_one_run = len(set(names)) == 1 and (folder / "run.yaml").is_file()
    return folder / "score.json" if is_one_run and args.data is None else Path("scores.json")


def _write(out: Path, scores: dict[str, Any]) -> None:
    try:
        write_text(out, dump_json(scores))
    except OSError as error:
        raise RankZeroError(
            f"{out}: {error.strerror}; an earlier file is unchanged, and the answers are kept: "
            "start again to write it"
        ) from None


def print_table(scores: dict[str, Any]) -> None:
    """Print a row for each model, with each score that any model has, and its interval.

    `scores`: the contents of score.json.
    """
    models: dict[str, dict[str, Any]] = scores["models"]
    columns = [
        key for key in _COLUMNS if any(key in model_scores for model_scores in models.values())
    ]
    table = Table(title=f"{scores['rows']} rows, with 95 % intervals")
    for name in ("", *(_COLUMNS[key] for key in columns)):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    for name, model_scores in models.items():
        table.add_row(name, *(_cell(model_scores, key) for key in columns))
    Console(markup=False).print(table)  # a name may contain brackets
    # These are shares of the rows whose expected answer has a match or is JSON.
    for key in ("regex_match", "valid_json"):
        row_counts = {
            model_scores[f"{key}_rows"] for model_scores in models.values() if key in model_scores
        }
        if row_counts and row_counts != {scores["rows"]}:
            print(f"{_COLUMNS[key]}: {max(row_counts)} of the rows have one in the expected answer")


def _cell(model_scores: dict[str, Any], key: str) -> str:
    """Text of a score of a model, with the bounds of its interval on a second line."""
    value, interval = model_scores.get(key), model_scores.get(f"{key}_interval")
    if value is None:
        return "-"
    is_share = key in _SHARES
    number_format, unit, factor = ("{:.1f}", " %", 100) if is_share else (_FORMATS[key], "", 1)
    text = number_format.format(factor * value) + unit
    if interval is None or None in interval:
        return text
    low, high = (number_format.format(factor * bound) for bound in interval)
    return f"{text}\n{low} to {high}"


def main() -> None:
    """Run this command and end the process with its exit code."""
    run_main(score)


if __name__ == "__main__":
    main()
