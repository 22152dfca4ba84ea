"""Table of all rules (known problems of a run), in the order of docs/rules.md.

tests/plan/rules/rule_cases.py has two contexts for each rule: one to which it applies, and a
similar one to which it does not.
"""

from pipeline.plan.rules.advice import ADVICE
from pipeline.plan.rules.deepspeed import DEEPSPEED_RULES
from pipeline.plan.rules.model import INPUT_RULES, MODEL_RULES
from pipeline.plan.rules.rule import PlanContext, Rule
from pipeline.plan.rules.serving import SERVING_RULES
from pipeline.plan.rules.versions import VERSION_RULES

# Rules whose condition also depends on the chosen layout and the DeepSpeed config. INPUT_RULES
# depend only on settings, model and hardware.
CONTEXT_RULES: tuple[Rule[PlanContext], ...] = (
    *MODEL_RULES,
    *SERVING_RULES,
    *VERSION_RULES,
    *DEEPSPEED_RULES,
    *ADVICE,
)
RULES: tuple[Rule[PlanContext], ...] = (*INPUT_RULES, *CONTEXT_RULES)
