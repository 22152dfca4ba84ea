"""A plan as JSON values and as text for a terminal."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.commands import command
from pipeline.plan.choose import Candidate
from pipeline.plan.cost.memory import disk_bytes
from pipeline.plan.given.hardware import GIB
from pipeline.plan.length import length_json, length_texts, longest_text
from pipeline.plan.plan import Plan
from pipeline.plan.rules.rule import PlanContext, Rule


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as the JSON object of `rankzero plan --json`: sizes in bytes, times in seconds."""
    layout, memory, speed, shape = plan.layout, plan.memory, plan.speed, plan.shape
    return {
        "settings": plan.settings.model_dump(mode="json"),
        "model": {
            "parameters": shape.parameters,
            "trainable": plan.trainable,
            "folder": shape.folder,
            "source": shape.source,
            "model_type": shape.model_type,
            "layers": shape.num_layers,
            "training_dtype": layout.training_dtype,
        },
        "hardware": {
            "kind": plan.hardware.kind,
            "name": plan.hardware.name,
            "nodes": layout.nodes,
            "ranks_per_node": layout.ranks_per_node,
            "ranks": layout.world_size,
        },
        "choice": _choice_json(plan),
        "fast_paths": plan.fast_path_states,
        "proof": None if plan.proof is None else asdict(plan.proof),
        "memory": {
            "per_rank": dict(memory.per_rank),
            "peak_bytes": memory.peak_bytes,
            "load_peak_bytes": memory.load_peak_bytes,
            "host_peak_bytes": memory.host_peak_bytes,
            "device_bytes": plan.hardware.device_bytes,
            "fits": plan.fits,
        },
        "length": length_json(plan),
        "longest": longest_text(plan.settings, plan.shape, plan.cluster),
        "speed": {
            "seconds_per_step": speed.seconds_per_step,
            "tokens_per_second": speed.tokens_per_second,
            "terms": speed.terms,
        },
        "answers": None if plan.answers is None else asdict(plan.answers),
        "decompositions": None if plan.decompositions is None else asdict(plan.decompositions),
        "disk": disk_bytes(shape, plan.settings),
        "candidates": [_candidate_json(candidate) for candidate in plan.candidates],
        "rules": [
            {"id": rule.id, "level": rule.level, "message": rule.message, "source": rule.source}
            for rule in plan.rules
        ],
        "deepspeed": plan.deepspeed,
    }


def _choice_json(plan: Plan) -> dict[str, Any]:
    """The layout, with the reasons."""
    layout = plan.layout
    why = dict(plan.why)
    if proof_reason := _proof_reason(plan):
        why["proof"] = proof_reason
    return {
        "zero_stage": layout.zero_stage,
        "micro_batch_size": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.accumulation_steps,
        "global_batch_size": layout.global_batch_size,
        "checkpointed_layers": layout.checkpointed_layers,
        "hpz_partition_size": layout.hpz_partition_size,
        "offload_param": layout.offload_param,
        "sequence_parallel_size": layout.sequence_parallel_size,
        "offload_activations": layout.offload_activations,
        "mlp_tiles": layout.mlp_tiles,
        "why": why,
    }


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    """A candidate (a layout with its predictions): memory in bytes, time in seconds, refusal."""
    return {
        **asdict(candidate.layout),
        "device_bytes": candidate.memory.device_peak_bytes,
        "host_bytes": candidate.memory.host_peak_bytes,
        "seconds_per_step": candidate.speed.seconds_per_step,
        "refusal": candidate.refusal,
    }


def plan_text(plan: Plan) -> str:
    """The plan as lines of text for a terminal."""
    return "\n".join(
        [
            *_summary_lines(plan),
            *_proof_lines(plan),
            *_step_lines(plan),
            *_length_lines(plan),
            *(f"  {key:<28} {text}" for key, text in plan.why.items()),
            *_memory_lines(plan),
            *_memory_terms(plan),
            f"longest    {longest_text(plan.settings, plan.shape, plan.cluster)}",
            *_speed_lines(plan),
            *(_rule_line(rule) for rule in plan.rules),
        ]
    )


def plan_overview(plan: Plan) -> str:
    """The plan as the few lines that a run logs when it starts, and the rules that warn."""
    warnings = (rule for rule in plan.rules if rule.level == "warn")
    return "\n".join(
        [
            *_summary_lines(plan),
            *_step_lines(plan),
            *_length_lines(plan),
            *_memory_lines(plan),
            *map(_rule_line, warnings),
        ]
    )


def _rule_line(rule: Rule[PlanContext]) -> str:
    """The line about a known problem of the run."""
    return f"{rule.level:<10} {rule.message} [{rule.id}]"


def _summary_lines(plan: Plan) -> list[str]:
    """The lines about the model, and about hardware and layout."""
    layout, shape = plan.layout, plan.shape
    share = 100 * plan.trainable / shape.parameters
    nodes = f"{layout.nodes} nodes of " if layout.nodes > 1 else ""
    unit = f" packs of {plan.settings.max_length} tokens" if plan.settings.packing else ""
    ranks = f"{layout.world_size} ranks"
    if layout.sequence_parallel_size > 1:
        groups = layout.data_parallel_size
        ranks = f"{groups} group{'s' if groups > 1 else ''} of ranks"
    return [
        f"model      {shape.folder}: {shape.parameters / 1e6:,.1f} M parameters, "
        f"{plan.trainable / 1e6:,.2f} M trainable ({share:.2f} %)",
        f"run        {nodes}{layout.ranks_per_node} x {plan.hardware.name}, "
        f"ZeRO-{layout.zero_stage}, {layout.training_dtype}, global batch "
        f"{layout.global_batch_size}{unit} = {layout.micro_batch_size} x "
        f"{layout.accumulation_steps} x {ranks}, {layout.savings_text(shape.num_layers)}",
    ]


def _proof_lines(plan: Plan) -> list[str]:
    """The line about the checks of the model's class; none for a class in given/families.py."""
    reason = _proof_reason(plan) if plan.shape.is_from_class else ""
    return [f"proof      {reason}"] if reason else []


def _proof_reason(plan: Plan) -> str:
    """Number of checks of the model's class and their largest error; empty if none has run."""
    if plan.proof is None or not plan.proof.errors:
        return ""
    name, error = max(plan.proof.errors.items(), key=lambda item: item[1])
    return (
        f"{len(plan.proof.errors)} checks of the class of {plan.shape.model_type} on a small copy: "
        f"largest error {error:.1e} ({name})"
    )


def _step_lines(plan: Plan) -> list[str]:
    """The line about the number of steps and the time of the run."""
    if plan.schedule is None or plan.data is None:
        return ["steps      unknown: the training data cannot be read here"]
    schedule, data = plan.schedule, plan.data
    hours = plan.seconds / 3600
    about = "" if data.is_exact else "about "
    note = (
        "" if data.is_exact else f" (estimated from a sample; {command('prepare')} counts exactly)"
    )
    return [
        f"steps      {about}{schedule.total_steps} ({schedule.steps_per_epoch} an epoch), "
        f"{schedule.warmup_steps} of warm-up, {about}{_duration_text(hours)}{note}",
        *_answer_lines(plan),
        *_decomposition_lines(plan),
    ]


def _length_lines(plan: Plan) -> list[str]:
    """The lines about documents that are longer than `max_length`."""
    texts = length_texts(plan.data, plan.settings, plan.shape, plan.cluster)
    return [f"{'' if index else 'length':<10} {text}" for index, text in enumerate(texts)]


def _answer_lines(plan: Plan) -> list[str]:
    """The line about `eval_generate`: answers that the model generates at each evaluation."""
    if (answers := plan.answers) is None:
        return []
    return [
        f"answers    {answers.rows} held-out rows at each evaluation (eval_generate), "
        f"{plan.num_evaluations} times: {answers.passes} forward passes a rank for answers of "
        f"{answers.tokens} tokens, {_duration_text(answers.seconds / 3600)} each time"
    ]


def _decomposition_lines(plan: Plan) -> list[str]:
    """The line about the decompositions of PiSSA, OLoRA and LoftQ."""
    if (made := plan.decompositions) is None:
        return []
    return [
        f"initial    {made.kind} of {made.matrices} weights on rank 0 (init_lora_weights): "
        f"{_duration_text(made.seconds / 3600)}, {_size_text(made.peak_bytes)} for the largest"
    ]


def _memory_lines(plan: Plan) -> list[str]:
    """The line about memory."""
    memory, hardware = plan.memory, plan.hardware
    limit = hardware.usable_bytes(plan.layout.ranks_per_node)
    return [
        f"memory     {_size_text(memory.peak_bytes)} of {_size_text(limit)} a rank, "
        f"at {memory.worst_moment}"
    ]


def _memory_terms(plan: Plan) -> list[str]:
    """The terms of the memory, largest first, and the disk space."""
    memory, hardware = plan.memory, plan.hardware
    lines = []
    for term, size in sorted(memory.per_rank.items(), key=lambda item: -item[1]):
        lines.append(f"  {term:<28} {_size_text(size):>10}")
    disk = disk_bytes(plan.shape, plan.settings)
    return [
        *lines,
        f"  {'while loading':<28} {_size_text(memory.load_peak_bytes):>10}",
        f"  {'host memory of a node':<28} {_size_text(memory.host_peak_bytes):>10}"
        + ("" if hardware.host_bytes else "  (not checked: the node's memory is unknown here)"),
        *(f"  {f'disk: {term}':<28} {_size_text(size):>10}" for term, size in disk.items()),
    ]


def _speed_lines(plan: Plan) -> list[str]:
    """The line about the predicted speed."""
    speed = plan.speed
    largest = ", ".join(f"{term} {seconds:.3g} s" for term, seconds in speed.three_largest())
    return [
        f"speed      predicted: {speed.seconds_per_step:.3g} s/step, "
        f"{speed.tokens_per_second:,.0f} tokens/s; largest terms: {largest}"
    ]


def candidates_text(ranked: Sequence[Candidate]) -> str:
    """A table of all candidates, best first: layout, memory, speed and refusal.

    Columns: `ckpt`: number of checkpointed layers. `split`: ranks that share a sequence. `tiles`:
    tiles of each MLP. `host`: whether inputs of checkpointed layers are in host memory. `hpZ`:
    hpz_partition_size. `offload`: offload_param. `GiB`: needed memory of a rank's device.
    """
    head = "stage  micro  accum    ckpt  split  tiles  host  hpZ  offload     GiB  s/step"
    lines = [head]
    for candidate in ranked:
        layout = candidate.layout
        lines.append(
            f"{layout.zero_stage:>5}  {layout.micro_batch_size:>5}  {layout.accumulation_steps:>5}"
            f"  {layout.checkpointed_layers:>6}  {layout.sequence_parallel_size:>5}"
            f"  {layout.mlp_tiles:>5}  "
            f"{'yes' if layout.offload_activations else 'no':>4}  {layout.hpz_partition_size:>3}  "
            f"{layout.offload_param:>7}  {candidate.memory.device_peak_bytes / GIB:>6.1f}  "
            f"{candidate.speed.seconds_per_step:>6.2f}  {candidate.refusal or ''}".rstrip()
        )
    return "\n".join(lines)


def _size_text(num_bytes: int) -> str:
    if num_bytes < GIB:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / GIB:.2f} GiB"


def _duration_text(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h"
