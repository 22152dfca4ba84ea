"""Rules about what a user's own JSON would move to host memory or disk."""

from pipeline.plan.rules.rule import PlanContext, Rule, issue

_DEEPSPEED = "deepspeedai/DeepSpeed"
_ZERO = "DeepSpeed 0.19.8 runtime/zero"


def _device(s: PlanContext, key: str) -> str:
    return str(s.block("zero_optimization", key).get("device") or "none")


def _offloads_optimizer(s: PlanContext) -> bool:
    return _device(s, "offload_optimizer") != "none" or bool(s.zero.get("cpu_offload"))


def _offloads_base(s: PlanContext) -> bool:
    return s.settings.offload_param == "cpu" or _device(s, "offload_param") != "none"


OFFLOAD_RULES: tuple[Rule[PlanContext], ...] = (
    Rule(
        id="offload-param-without-zero3",
        level="refuse",
        applies=lambda s: _offloads_base(s) and not s.layout.is_sharded,
        reason="offload_param: only ZeRO-3 can keep the base in host memory",
        remedy="set zero_stage: 3, or leave offload_param out",
        source="https://www.deepspeed.ai/docs/config-json/#parameter-offloading",
    ),
    Rule(
        id="nvme-4bit",
        level="refuse",
        applies=lambda s: s.settings.load_in_4bit and _device(s, "offload_param") == "nvme",
        reason="zero_optimization.offload_param to nvme with load_in_4bit: its buffers have the "
        "training type, the packed weights are uint8",
        remedy='use "cpu", or leave it out',
        source=f"{_ZERO}/partition_parameters.py:1820",
    ),
    Rule(
        id="nvme-not-yet",
        level="refuse",
        applies=lambda s: not s.settings.load_in_4bit and _device(s, "offload_param") == "nvme",
        reason="zero_optimization.offload_param to nvme: its memory and speed cannot be planned "
        "yet",
        remedy='use "cpu", or leave it out',
        source="pipeline/plan/cost/memory.py",
    ),
    Rule(
        id="cpu-offload-param",
        level="refuse",
        applies=lambda s: (
            bool(s.zero.get("cpu_offload_param")) or bool(s.zero.get("cpu_offload_use_pin_memory"))
        ),
        reason="zero_optimization.cpu_offload_param and cpu_offload_use_pin_memory are old names "
        "that the plan does not follow",
        remedy="set offload_param: cpu in the run file",
        source=f"{_ZERO}/config.py:189",
    ),
    Rule(
        id="offload-optimizer",
        level="refuse",
        applies=_offloads_optimizer,
        reason="zero_optimization.offload_optimizer: an adapter's optimizer is 12 bytes a "
        "trainable parameter, divided over the ranks; moving it slows every step and compiles an "
        "optimizer at start-up",
        remedy="leave it out",
        source=issue(_DEEPSPEED, 6550, 5241) + "; DeepSpeed 0.19.8 runtime/engine.py:2342",
    ),
    Rule(
        id="zenflow",
        level="refuse",
        applies=lambda s: (
            s.zero.get("zenflow") is not None
            or bool(s.block("zero_optimization", "offload_optimizer").get("super_offload"))
        ),
        reason="zenflow and super_offload are offload schemes for full fine-tuning; zenflow "
        "transposes every gathered weight",
        remedy="leave them out",
        source=f"{_ZERO}/parameter_offload.py:545",
    ),
)
