"""Publishing of a run's adapter or merged model on the Hugging Face hub.

The files are gathered in a folder and checked for secrets before anything is sent. No text of a row
is among them: scores without answers, and the audit of the data as counts.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any

from pipeline.adapter.adapter_file import read_config
from pipeline.adapter.merge_output import TOKENIZER_FILES
from pipeline.config.hub import HubSplit
from pipeline.config.settings import RunSettings
from pipeline.errors import RankZeroError, UserError
from pipeline.files import dump_json, read_json_or_empty
from pipeline.model.packed_files import dequantising_config
from pipeline.plan.rules.serving import SERVING_RULES

_CARD = "README.md"
_TAG = "rankzero"  # in the metadata of a card
_LEFT_OUT = {"trained_on.json", "rankzero_merge.json", _CARD}  # have paths of this machine
# Files of earlier publications, which a new one replaces as a whole. Other files stay.
_PUBLISHED = (
    "*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json",
    "generation_config.json", "score.json", "plan.json", "audit.json",
    *(f"{name}/*" if "." not in name else name for name in TOKENIZER_FILES),
)  # fmt: skip
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Forms of access tokens and private keys.
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
_SHORTEST_SECRET = 8
# Counts of the audit that are published. Its reasons and examples may quote rows.
_COUNTS = (
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

    `name`: of the repository on the hub. `base_model`: the name of the base on the hub.
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


def base_model_name(settings: RunSettings, named: str | None) -> str:
    """The hub name of the base. UserError if the run has a local folder and none is named."""
    name = named or settings.model
    if named is None and (Path(name).exists() or not _HUB_NAME.fullmatch(name)):
        raise UserError(
            f"model: {name} is a folder of this machine; name the base on the hub with "
            "--base-model ORG/NAME"
        )
    return require_hub_name("--base-model", name)


def require_hub_name(option: str, name: str) -> str:
    """The name, if it is ORG/NAME; else UserError."""
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"{option}: {name!r} is not a name on the hub; expected ORG/NAME")
    return name


def gather_files(publication: Publication, folder: Path) -> None:
    """Copy the files to publish into an empty folder, and write the card, scores, plan and audit.

    Raises UserError if one has a secret or a path of the user's home.
    """
    for path in sorted(publication.source.rglob("*")):
        name = path.relative_to(publication.source)
        if path.is_dir() or name.name in _LEFT_OUT or name.name.startswith("."):
            continue
        if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}:
            raise UserError(f"{path}: only safetensors are published; remove this file")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    config = folder / "adapter_config.json"
    if config.is_file():
        named = {"base_model_name_or_path": publication.base_model}
        config.write_text(dump_json(read_config(config, "adapter") | named), encoding="utf-8")
    run = publication.run_folder
    scores = _scores(run / "score.json")
    records = {"score.json": scores, "plan.json": _plan(run), "audit.json": _audit(run)}
    for name_of_record, record in records.items():
        if record:
            (folder / name_of_record).write_text(dump_json(record), encoding="utf-8")
    (folder / _CARD).write_text(card(publication, scores), encoding="utf-8")
    require_no_secrets(folder)


def _scores(path: Path) -> dict[str, Any]:
    """The scores of each model, without the answers, which are texts of rows."""
    record = read_json_or_empty(path)
    models = record.get("models")
    if not isinstance(models, dict) or "outdated" in record:
        return {}
    numbers = {
        str(name): {key: value for key, value in each.items() if isinstance(value, int | float)}
        for name, each in models.items()
        if isinstance(each, dict)
    }
    return {"rows": record.get("rows"), "models": numbers}


def _plan(run: Path) -> dict[str, Any]:
    """The plan without paths: hyperparameters, layout, memory and speed."""
    plan = read_json_or_empty(run / "plan.json")
    settings = plan.get("settings") or {}
    record: dict[str, Any] = {
        "settings": {key: settings[key] for key in _HYPERPARAMETERS if key in settings}
    }
    return record | {key: plan[key] for key in ("choice", "memory", "speed") if key in plan}


def _audit(run: Path) -> dict[str, Any]:
    """Counts of the data audit by split."""
    audit = read_json_or_empty(run / "data" / "audit.json")
    return {
        split: {key: counts[key] for key in _COUNTS if isinstance(counts.get(key), int | float)}
        for split, counts in audit.items()
        if split in ("train", "eval") and isinstance(counts, dict)
    }


def card(publication: Publication, scores: Mapping[str, Any]) -> str:
    """The model card, with metadata that huggingface_hub accepts."""
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

    path = base / _CARD
    if not path.is_file():
        return None
    try:
        name = ModelCard.load(path).data.to_dict().get("license")
    except (OSError, ValueError):
        return None
    return name if isinstance(name, str) else None


def _card_body(publication: Publication, scores: Mapping[str, Any]) -> str:
    settings, base = publication.settings, publication.base_model
    kind = "Merged model" if publication.is_merged else "LoRA adapter"
    lines = [
        f"# {kind} of `{base}`",
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
    """The lines of Python that load the adapter with its base, dequantised if it is packed."""
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
    """Messages of the run's plan about servers that refuse or ignore a part of the adapter."""
    ids = {rule.id for rule in SERVING_RULES}
    rules = read_json_or_empty(run / "plan.json").get("rules") or []
    return [str(rule.get("message")) for rule in rules if rule.get("id") in ids]


def require_no_secrets(folder: Path) -> None:
    """Raise UserError if a file has an access token, or a path in the user's home.

    Of safetensors only the header can hold text. The message never shows the secret.
    """
    home = Path.home()
    homes = {os.fsencode(str(path).rstrip("/") + "/") for path in (home, home.resolve())}
    known = {name: os.fsencode(os.environ.get(name, "")) for name in _SECRET_VARIABLES}
    known["token of huggingface_hub"] = os.fsencode(_saved_token())
    for path, content in _contents(folder):
        name = path.relative_to(folder)
        for kind, pattern in _SECRETS.items():
            if pattern.search(content):
                raise UserError(f"{name} has what looks like a secret ({kind}); nothing was sent")
        for source, value in known.items():
            if len(value) >= _SHORTEST_SECRET and value in content:
                raise UserError(f"{name} has the value of {source}; nothing was sent")
        if any(len(path) > 1 and path in content for path in homes):
            raise UserError(
                f"{name} has a path in the home folder {home}; nothing was sent; use paths "
                "relative to the run file, and merge or train again"
            )


def _saved_token() -> str:
    from huggingface_hub import get_token

    return get_token() or ""


def _contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                yield path, file.read(int.from_bytes(file.read(8), "little"))
            else:
                yield path, file.read()


def _published_in(files: Iterable[str]) -> list[str]:
    """The files of a repository that a publication would replace; `*` matches no slash."""
    return [
        path
        for path in files
        if any(
            fnmatchcase(path, each) and path.count("/") == each.count("/") for each in _PUBLISHED
        )
    ]


def upload(folder: Path, name: str, *, is_private: bool) -> str:
    """Create the repository if it is missing, send the folder in one commit; return its address.

    The commit also deletes files of an earlier publication that are not in the folder.

    Raises UserError if the repository exists and is public although a private one is asked for, or
    if it has a model that was not published with RankZero.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        api = HfApi()
        api.create_repo(name, private=is_private, exist_ok=True)
        info = api.model_info(name)
        if is_private and not info.private:  # create_repo left an existing one
            raise UserError(f"--private: {name} exists and is public; nothing was sent")
        earlier = _published_in(each.rfilename for each in info.siblings or ())
        if earlier and _TAG not in (info.tags or ()):
            raise UserError(
                f"--to: {name} has a model that was not published with RankZero ({earlier[0]}); "
                "nothing was sent; name another repository, or remove its files"
            )
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Published with RankZero",
            delete_patterns=[escape(path) for path in earlier],
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
