"""The rule table: what is known to go wrong, and what is done about it.

Source of docs/rules.md; tests/plan/rules/test_rules.py has a case and a near miss for each.
"""

from pipeline.plan.rules.advice import ADVICE
from pipeline.plan.rules.deepspeed import DEEPSPEED_RULES
from pipeline.plan.rules.model import INPUT_RULES, MODEL_RULES
from pipeline.plan.rules.offload import OFFLOAD_RULES
from pipeline.plan.rules.rule import PlanContext, Rule
from pipeline.plan.rules.versions import VERSION_RULES
from pipeline.plan.rules.zero import ZERO_RULES

CONTEXT_RULES: tuple[Rule[PlanContext], ...] = (
    *MODEL_RULES,
    *VERSION_RULES,
    *ZERO_RULES,
    *OFFLOAD_RULES,
    *DEEPSPEED_RULES,
    *ADVICE,
)
RULES: tuple[Rule[PlanContext], ...] = (*INPUT_RULES, *CONTEXT_RULES)
