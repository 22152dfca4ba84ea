"""Publish a run's adapter or merged model on the Hugging Face hub.

The files are copied to a folder and checked for secrets before anything is sent. They contain no
text of the training rows: scores are sent without answers, and of the data audit only counts.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any

from pipeline.adapter.adapter_file import read_config
from pipeline.adapter.merge_output import MARKER, TOKENIZER_FILES
from pipeline.adapter.serving import bnb_arguments
from pipeline.adapter.trained_on import corrects_quantisation
from pipeline.cluster.progress import show_progress
from pipeline.config.hub import HubSplit
from pipeline.config.settings import RunSettings
from pipeline.errors import RankZeroError, UserError, first_few
from pipeline.files import dump_json, read_json_or_empty
from pipeline.model.quantised_files import dequantising_config
from pipeline.plan.rules.serving import SERVING_RULES

logger = logging.getLogger(__name__)

_CARD = "README.md"
_TAG = "rankzero"  # in the metadata of a model card; marks a repository as published from here
_NOT_PUBLISHED = {"trained_on.json", "rankzero_merge.json", _CARD}  # contain paths of this machine
# Patterns of files that a publication writes. Such files of an earlier publication are deleted from
# the repository if the new one lacks them. Other files stay.
_PUBLISHED_FILES = (
    "*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json",
    "generation_config.json", "score.json", "plan.json", "audit.json",
    *(f"{name}/*" if "." not in name else name for name in TOKENIZER_FILES),
)  # fmt: skip
_DATA_SUFFIXES = {".jsonl", ".parquet", ".arrow", ".csv", ".tsv"}  # may have rows of the training
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Forms of access tokens and private keys: name for the message -> pattern.
_SECRETS = {
    "Hugging Face": re.compile(rb"\b(?:hf_|api_org_)[A-Za-z0-9]{30,}"),
    "Weights & Biases": re.compile(rb"(?i)wandb[^\n]{0,40}?\b[0-9a-f]{40}\b|\bwandb_v\d_\w{20,}"),
    "GitHub": re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "OpenAI or Anthropic": re.compile(rb"\bsk-[A-Za-z0-9_-]{20,}"),
    "AWS": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    "private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
_SECRET_VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY",
    "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN",
)  # fmt: skip
_MIN_SECRET_LENGTH = 8  # shorter values would occur in a file by chance
# Counts of the data audit that are published. The audit's reasons and examples may quote rows.
_AUDIT_COUNTS = (
    "rows_read", "rows_used", "rows_dropped", "duplicate_rows", "documents", "tokens",
    "supervised_tokens", "supervised_share", "truncated_rows", "split_rows", "tokens_lost",
)  # fmt: skip
_HYPERPARAMETERS = (
    "max_length", "packing", "train_on", "seed", "lora_r", "lora_dropout", "use_rslora", "use_dora",
    "load_in_4bit", "load_in_8bit", "epochs", "lr", "lr_scheduler_type", "weight_decay",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Publication:
    """The adapter or the merged model of a run, to be published.

    `name`: name of the repository on the hub. `base_model`: name of the base on the hub.
    """

    name: str
    run_folder: Path
    settings: RunSettings
    base_model: str
    is_merged: bool

    @property
    def source(self) -> Path:
        """The folder with the weights."""
        return self.run_folder / ("merged" if self.is_merged else "adapter")


def base_model_name(settings: RunSettings, option: str | None) -> str:
    """The hub name of the base: the value of the option --base-model, or the setting `model`.

    Raises UserError if there is no option and `model` is a local folder.
    """
    name = option or settings.model
    if option is None and (Path(name).exists() or not _HUB_NAME.fullmatch(name)):
        raise UserError(
            f"model: {name} is a folder of this machine; name the base on the hub with "
            "--base-model ORG/NAME"
        )
    return require_hub_name("--base-model", name)


def require_hub_name(option: str, name: str) -> str:
    """Return a name of the form ORG/NAME; raise UserError for another name.

    `option`: command-line option with the name, for the message.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    reason = "" if _HUB_NAME.fullmatch(name) else "expected ORG/NAME"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = reason or str(error)
    if reason:
        raise UserError(f"{option}: {name!r} is not a name on the hub; {reason}")
    return name


def gather_files(publication: Publication, folder: Path) -> None:
    """Copy the files to publish into an empty folder, and write the card, scores, plan and audit.

    Raises UserError if a file contains a secret or a path of the user's home folder.
    """
    for path in _files_to_publish(publication):
        name = path.relative_to(publication.source)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    config = folder / "adapter_config.json"
    if config.is_file():
        values = read_config(config, "adapter")
        values["base_model_name_or_path"] = publication.base_model
        config.write_text(dump_json(values), encoding="utf-8")
    run_folder = publication.run_folder
    scores = _public_scores(run_folder)
    records = {
        "score.json": scores,
        "plan.json": _public_plan(run_folder),
        "audit.json": _public_audit(run_folder),
    }
    for file_name, record in records.items():
        if record:
            (folder / file_name).write_text(dump_json(record), encoding="utf-8")
    (folder / _CARD).write_text(model_card(publication, scores), encoding="utf-8")
    require_no_secrets(folder)


def _files_to_publish(publication: Publication) -> list[Path]:
    """The files in the source folder that RankZero wrote; logs the names of other files.

    The files of a merged model are in the record of the merge. Some are copies from the folder of
    the base, which may also have data.
    """
    source = publication.source
    written = set(read_json_or_empty(source / MARKER).get("files") or ())
    files: list[Path] = []
    others: list[Path] = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if path.is_dir() or path.name in _NOT_PUBLISHED or path.name.startswith("."):
            continue
        is_written = name in written if written else _is_published_file(name)
        (files if is_written and path.suffix not in _DATA_SUFFIXES else others).append(path)
    if others:
        names = first_few([str(path.relative_to(source)) for path in others])
        logger.warning("not sent, because they may not belong to the model: %s", names)
    return files


def _public_scores(run_folder: Path) -> dict[str, Any]:
    """The scores of each model, without the answers, which quote rows; empty if outdated."""
    record = read_json_or_empty(run_folder / "score.json")
    models = record.get("models")
    if not isinstance(models, dict) or "outdated" in record:
        return {}
    numbers = {
        str(model): {name: value for name, value in scores.items() if _is_number(value)}
        for model, scores in models.items()
        if isinstance(scores, dict)
    }
    return {"rows": record.get("rows"), "models": numbers}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _public_plan(run_folder: Path) -> dict[str, Any]:
    """The plan without paths: hyperparameters, layout, memory and speed."""
    plan = read_json_or_empty(run_folder / "plan.json")
    settings = plan.get("settings") or {}
    record: dict[str, Any] = {
        "settings": {key: settings[key] for key in _HYPERPARAMETERS if key in settings}
    }
    return record | {key: plan[key] for key in ("choice", "memory", "speed") if key in plan}


def _public_audit(run_folder: Path) -> dict[str, Any]:
    """Counts of the data audit: split -> name of the count -> number."""
    audit = read_json_or_empty(run_folder / "data" / "audit.json")
    return {
        split: {name: counts[name] for name in _AUDIT_COUNTS if _is_number(counts.get(name))}
        for split, counts in audit.items()
        if split in ("train", "eval") and isinstance(counts, dict)
    }


def model_card(publication: Publication, scores: Mapping[str, Any]) -> str:
    """The model card, with metadata that huggingface_hub accepts.

    `scores`: content of the published score.json.
    """
    from huggingface_hub import ModelCard, ModelCardData

    settings = publication.settings
    splits = [HubSplit.parse(source.path) for source in settings.train_sources]
    data = ModelCardData(
        base_model=publication.base_model,
        library_name="transformers" if publication.is_merged else "peft",
        pipeline_tag="text-generation",
        tags=["lora", _TAG],
        license=base_license(settings.model_folder),
        datasets=sorted({split.name for split in splits if split is not None}) or None,
    )
    body = _card_body(publication, scores)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def base_license(base: Path) -> str | None:
    """The license in the model card of the base; None if the folder has no card or no license."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    path = base / _CARD
    if not path.is_file():
        return None
    try:
        card = ModelCard.load(path, ignore_metadata_errors=True)
        name = card.data.to_dict().get("license")
    except (OSError, ValueError, TypeError, YAMLError):  # TypeError: a key that is not a text
        return None
    return name if isinstance(name, str) else None


def _card_body(publication: Publication, scores: Mapping[str, Any]) -> str:
    """The model card without metadata: title, hyperparameters, scores, and how to load it."""
    settings, base = publication.settings, publication.base_model
    title = "Merged model" if publication.is_merged else "LoRA adapter"
    lines = [
        f"# {title} of `{base}`",
        "",
        f"Trained with RankZero: r {settings.lora_r}, alpha {settings.alpha:g}, learning rate "
        f"{settings.lr:g}, at most {settings.max_length} tokens a sequence, seed {settings.seed}.",
        "`plan.json` has the layout, `audit.json` the counts of the training data.",
    ]
    if models := scores.get("models"):
        lines += ["", f"Scores on {scores['rows']} held-out rows:", ""]
        columns = list(next(iter(models.values())))
        lines += [f"| model | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name, numbers in models.items():
            cells = (f"{numbers[column]:.4g}" if column in numbers else "" for column in columns)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    if not publication.is_merged:
        lines += ["", "```python", *_loading_lines(publication), "```"]
        lines += ["", *(f"- {note}" for note in _serving_notes(publication.run_folder))]
    return "\n".join([*lines, ""])


def _loading_lines(publication: Publication) -> list[str]:
    """The lines of Python that load the adapter with its base.

    If the base is stored in 4 or 8 bits, they dequantise it. If the adapter corrects a 4-bit base
    (LoftQ), they quantise the base as in training.
    """
    if corrects_quantisation(publication.source):
        plan = read_json_or_empty(publication.run_folder / "plan.json")
        dtype = str((plan.get("model") or {}).get("training_dtype", "bfloat16"))
        return [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import BitsAndBytesConfig",
            "",
            f"base_config = BitsAndBytesConfig({bnb_arguments(publication.settings, dtype)})",
            "model = AutoPeftModelForCausalLM.from_pretrained(",
            f'    "{publication.name}", quantization_config=base_config',
            ")",
        ]
    config_class = dequantising_config(publication.settings.model_folder)
    if not config_class:
        return [
            "from peft import AutoPeftModelForCausalLM",
            "",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{publication.name}")',
        ]
    return [
        "from peft import PeftModel",
        f"from transformers import AutoModelForCausalLM, {config_class}",
        "",
        "base = AutoModelForCausalLM.from_pretrained(",
        f'    "{publication.base_model}", quantization_config={config_class}(dequantize=True)',
        ")",
        f'model = PeftModel.from_pretrained(base, "{publication.name}")',
    ]


def _serving_notes(run: Path) -> list[str]:
    """Messages of the run's plan about inference servers that refuse or ignore adapter options."""
    ids = {rule.id for rule in SERVING_RULES}
    rules = read_json_or_empty(run / "plan.json").get("rules") or []
    return [str(rule.get("message")) for rule in rules if rule.get("id") in ids]


def require_no_secrets(folder: Path) -> None:
    """Raise UserError if a file contains an access token, or a path in the user's home folder.

    Of a safetensors file only the header is searched. The message never shows the secret.
    """
    home = Path.home()
    home_paths = {os.fsencode(str(path).rstrip("/") + "/") for path in (home, home.resolve())}
    known_secrets = {name: os.fsencode(os.environ.get(name, "")) for name in _SECRET_VARIABLES}
    known_secrets["token of huggingface_hub"] = os.fsencode(_saved_token())
    for path, content in _searched_contents(folder):
        name = path.relative_to(folder)
        for kind, pattern in _SECRETS.items():
            if pattern.search(content):
                raise UserError(f"{name} has what looks like a secret ({kind}); nothing was sent")
        for source, value in known_secrets.items():
            if len(value) >= _MIN_SECRET_LENGTH and value in content:
                raise UserError(f"{name} has the value of {source}; nothing was sent")
        if any(len(home_path) > 1 and home_path in content for home_path in home_paths):
            raise UserError(
                f"{name} has a path in the home folder {home}; nothing was sent; use paths "
                "relative to the run file, and merge or train again"
            )


def _saved_token() -> str:
    from huggingface_hub import get_token

    return get_token() or ""


def _searched_contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Path and content of each file; only the header of a safetensors file."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                yield path, file.read(int.from_bytes(file.read(8), "little"))
            else:
                yield path, file.read()


def _is_published_file(path: str) -> bool:
    """Whether a publication writes files of this name; `*` in a pattern matches no slash."""
    return any(
        fnmatchcase(path, pattern) and path.count("/") == pattern.count("/")
        for pattern in _PUBLISHED_FILES
    )


def upload(folder: Path, name: str, *, is_private: bool) -> str:
    """Create the repository if it is missing, and send the folder; return the commit's address.

    The commit also deletes files of an earlier publication that are not in the folder. Raises
    UserError if a private repository is requested and the existing one is public, or if the
    repository has a model that was not published with RankZero.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        api = HfApi()
        api.create_repo(name, private=is_private, exist_ok=True)
        info = api.model_info(name)
        if is_private and not info.private:  # create_repo does not change an existing repository
            raise UserError(
                f"--private: {name} exists and is public; nothing was sent; name another "
                "repository, or make this one private on the hub"
            )
        names = [file.rfilename for file in info.siblings or ()]
        earlier_files = [file for file in names if _is_published_file(file)]
        if earlier_files and _TAG not in (info.tags or ()):
            raise UserError(
                f"--to: {name} has a model that was not published with RankZero "
                f"({earlier_files[0]}); nothing was sent; name another repository, or remove its "
                "files"
            )
        with show_progress("uploading"):
            commit = api.upload_folder(
                repo_id=name, folder_path=folder, commit_message="Published with RankZero",
                delete_patterns=[escape(file) for file in earlier_files],
            )  # fmt: skip
    except UserError:
        raise
    except LocalTokenNotFoundError as error:
        raise UserError(f"{name}: no access token; run `hf auth login`: {error}") from None
    except Exception as error:  # the hub's answers, and the errors of its HTTP library
        reason = " ".join(str(error).split())
        raise RankZeroError(
            f"{name}: the hub refused the upload or cannot be reached; log in with `hf auth "
            f"login` if it asks for a token: {reason}"
        ) from error
    return str(commit.commit_url)
