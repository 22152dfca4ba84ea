"""Assembly of the training state: model, engine, checkpoints, and the progress to resume from."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import torch
from peft import PeftModel

from pipeline.adapter.gather import MOMENTS, OptimizerState, gather_weights, restore
from pipeline.adapter.initial import read_initial_adapter
from pipeline.adapter.initial_weights import initial_weights
from pipeline.cluster.heartbeat import HASHING_PHASE, LOADING_PHASES
from pipeline.cluster.progress import show_progress
from pipeline.cluster.session import Session
from pipeline.config.settings import RunSettings
from pipeline.data.dataset.reader import DataIndex, Split, open_split
from pipeline.data.order.batches import Batch, build_batch
from pipeline.data.order.order import global_batch
from pipeline.errors import UserError
from pipeline.model.adapter import attach_adapter, frozen_checksum
from pipeline.model.base import load_base
from pipeline.model.input_directions import set_input_directions
from pipeline.model.loftq import correct_quantisation
from pipeline.model.proof import require_proof
from pipeline.model.split_base import split_base
from pipeline.plan.given.class_proof import Proof
from pipeline.plan.plan import Plan
from pipeline.train.checkpoint import (
    Checkpoints,
    Progress,
    computation_changes,
    read_initial,
    read_progress,
    read_tensors,
)
from pipeline.train.context import RunContext
from pipeline.train.display import ProgressDisplay
from pipeline.train.engine import Engine
from pipeline.train.folder import RunFolder, write_run
from pipeline.train.metrics import MetricsFile, PeakBytes
from pipeline.train.questions import held_out_questions
from pipeline.train.state import TrainingState
from pipeline.train.writer import CheckpointWriter

logger = logging.getLogger(__name__)


def assemble(context: RunContext, folder: RunFolder, index: DataIndex) -> TrainingState:
    """Build the training state, restore the checkpoint if there is one, open the run folder.

    Collective: every rank.
    """
    session, heartbeat = context.session, context.heartbeat
    path = session.rank_zero_first(lambda: None if folder.resumed is None else str(folder.resumed))
    checkpoint = None if path is None else Path(path)
    # Rank 0 compares our loss and attention with those of the model's own class on a small copy.
    with show_progress("checking the model's class"):
        proof = Proof(**session.rank_zero_first(lambda: asdict(require_proof(context.plan))))
    plan = context.plan = context.plan.with_proof(proof)
    if folder.checkpoints is not None:  # on rank 0
        folder.checkpoints.metadata = {
            **folder.checkpoints.metadata,
            "fast_paths": plan.fast_path_states,
        }
        if checkpoint is not None:
            _log_changes(checkpoint, folder.checkpoints, context.settings)
    peak = PeakBytes(session.device, is_watched=session.is_rank_zero)
    loading, creating, restoring = LOADING_PHASES  # names of phases
    heartbeat.beat(loading)
    with show_progress("loading the model"):
        sequences = _sequences(plan, open_split(index.train))
        model, initial = build_model(plan, session, checkpoint, sequences)
        heartbeat.beat(creating)
        group = session.sequence_group(plan.layout.sequence_parallel_size)
        engine = Engine(model, plan, heartbeat.beat, group)
    if folder.checkpoints is not None:
        folder.checkpoints.initial = initial
    progress = Progress()
    if checkpoint is not None:
        heartbeat.beat(restoring)
        progress = read_progress(checkpoint)
        with show_progress("restoring the checkpoint"):
            _restore(engine, checkpoint, progress)
        logger.info("resuming from step %d (%s)", progress.step, checkpoint)
        _reset_unusable_best(context, folder, progress, index)
    elif context.settings.init_adapter is not None:
        heartbeat.beat(restoring)
        with show_progress("loading the initial adapter"):
            load_initial_adapter(engine, plan)
        logger.info("starting from the adapter %s", context.settings.init_adapter_folder)
    progress.eval_key = _eval_key(index)
    questions = held_out_questions(plan, index, session)
    heartbeat.beat(HASHING_PHASE)
    session.rank_zero_first(lambda: folder.open(progress.step))
    heartbeat.beat(creating)
    is_own_checkpoint = checkpoint is not None and checkpoint.parent == folder.path / "checkpoints"
    writer, metrics = None, None
    if folder.checkpoints is not None:  # on rank 0
        writer = CheckpointWriter(
            folder.checkpoints, lambda: _restore_folder(folder, context), folder.record_saved
        )
        metrics = MetricsFile(folder.path / "metrics.jsonl", progress.step)
        folder.wait_for_writes = writer.wait_at_most
    return TrainingState(
        context=context,
        folder=folder,
        engine=engine,
        train_split=open_split(index.train),
        eval_split=None if index.eval is None else open_split(index.eval),
        progress=progress,
        saved=replace(progress) if is_own_checkpoint else None,
        display=ProgressDisplay(plan, progress.step, is_shown=session.is_rank_zero),
        peak=peak,
        writer=writer,
        metrics=metrics,
        questions=questions,
        frozen_checksum=frozen_checksum(engine.deepspeed.module) if context.is_debug else None,
    )


def build_model(
    plan: Plan, session: Session, checkpoint: Path | None, sequences: Iterable[Batch] = ()
) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """The base with its adapter, and the initial LoRA weights A0 and B0 of PiSSA and OLoRA.

    PiSSA and OLoRA start from parts A0 and B0 of the base's weights and subtract B0 A0 from them;
    A0 and B0 are returned on rank 0. The result is empty for other adapters and on other ranks.
    `checkpoint`: the checkpoint that the run resumes from. `sequences`: training sequences, whose
    inputs of layers are the initial values of EVA. Collective.
    """
    model = attach_adapter(load_base(plan, session.device), plan)
    if plan.settings.corrects_quantisation and checkpoint is None:
        correct_quantisation(model, plan, session)
    if plan.settings.initialises_from_inputs and checkpoint is None:
        set_input_directions(model, plan, session, sequences)
    if not plan.settings.initialises_from_base:
        return model, {}
    stored = None if checkpoint is None else read_initial(checkpoint)
    return model, split_base(model, plan, session, stored)


def _sequences(plan: Plan, split: Split) -> Iterator[Batch]:
    """The sequences of the training steps in order, each as a batch of its own."""
    size, seed = plan.layout.global_batch_size, plan.settings.seed
    for step in count():
        for sequence in global_batch(step, split.sequences, seed=seed, global_batch_size=size):
            yield build_batch(split, [int(sequence)])


def _log_changes(checkpoint: Path, checkpoints: Checkpoints, settings: RunSettings) -> None:
    """Log why the results of a resumed run will not be bitwise those of an uninterrupted one.

    `checkpoint`: the resumed one. `checkpoints`: those that this run will write.
    """
    has_dropout = settings.lora_dropout > 0
    if changes := computation_changes(checkpoint, checkpoints.metadata, has_dropout=has_dropout):
        logger.info(
            "the results will not be bitwise those of an uninterrupted run, because the "
            "computation changed: %s",
            "; ".join(changes),
        )


def load_initial_adapter(engine: Engine, plan: Plan) -> None:
    """Set the weights of a new engine to those of `init_adapter`. Collective: every rank."""
    untrained = gather_weights(engine.parameters, keep=True)
    weights = initial_weights(read_initial_adapter(plan), plan, untrained)
    zeros = {
        f"{key}/{moment}": torch.zeros_like(t) for key, t in weights.items() for moment in MOMENTS
    }
    state = OptimizerState(moments=zeros, step=0)
    restore(engine.deepspeed, engine.parameters, weights, state)


def _restore(engine: Engine, checkpoint: Path, progress: Progress) -> None:
    """Restore the weights and Adam's moments of a checkpoint. Collective: every rank."""
    weights, moments = read_tensors(checkpoint)
    if differing := weights.keys() ^ engine.parameters.keys():
        raise UserError(
            f"{checkpoint}: its adapter has other tensors than this run, such as {min(differing)}; "
            "restore the settings of the adapter, or set another output_dir"
        )
    state = OptimizerState(
        moments=moments, step=progress.optimizer_step, loss_scaler=progress.loss_scaler
    )
    restore(engine.deepspeed, engine.parameters, weights, state)


def _reset_unusable_best(
    context: RunContext, folder: RunFolder, progress: Progress, index: DataIndex
) -> None:
    """Forget the lowest held-out loss if its adapter is missing or the held-out rows changed.

    `progress`: read from the checkpoint, and changed in place. Collective: every rank.
    """

    def reason() -> str | None:
        if not _has_same_eval_data(progress, index):
            return "eval_data changed, so earlier losses cannot be compared with later ones"
        assert folder.checkpoints is not None, "on rank 0"
        if context.settings.keep_best and not folder.checkpoints.has_best(progress):
            return "the best adapter so far is missing"
        return None

    if progress.best_step and (text := context.session.rank_zero_first(reason)):
        progress.best_loss, progress.best_step, progress.evaluations_since_best = None, 0, 0
        logger.info("%s; earlier steps no longer count for the best adapter", text)


def _has_same_eval_data(progress: Progress, index: DataIndex) -> bool:
    """Whether the checkpoint's held-out loss, if any, was measured on this run's documents."""
    before, now = progress.eval_key, _eval_key(index)
    if before is None:
        return True
    if now is None:
        return False
    if ":" in before and ":" in now:
        return before == now
    return before.split(":")[0] == now.split(":")[0]  # earlier versions recorded no digest


def _eval_key(index: DataIndex) -> str | None:
    """Key of the held-out documents and, if recorded, their digest: "KEY:DIGEST"."""
    split = index.eval
    if split is None:
        return None
    return f"{split.key}:{split.content}" if split.content else split.key


def _restore_folder(folder: RunFolder, context: RunContext) -> None:
    """Write run.yaml and the plans again if the run folder was deleted during the run."""
    if not (folder.path / "run.yaml").is_file():
        write_run(folder.path, context.plan, is_debug=context.is_debug)
