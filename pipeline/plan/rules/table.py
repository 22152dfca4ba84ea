"""The rule table: what is known to go wrong, and what is done about it.

Source of docs/rules.md; tests/plan/rules/test_rules.py has a case and a near miss for each.
"""

from pipeline.plan.rules.advice import ADVICE
from pipeline.plan.rules.deepspeed import DEEPSPEED_RULES
from pipeline.plan.rules.model import MODEL_RULES, REQUEST_RULES
from pipeline.plan.rules.offload import OFFLOAD_RULES
from pipeline.plan.rules.rule import Request, Rule, Situation
from pipeline.plan.rules.versions import VERSION_RULES
from pipeline.plan.rules.zero import ZERO_RULES

# Asked before anything is chosen, so that "it does not fit" never hides them.
BEFORE_THE_CHOICE: tuple[Rule[Request], ...] = REQUEST_RULES
OF_THE_CHOICE: tuple[Rule[Situation], ...] = (
    *MODEL_RULES,
    *VERSION_RULES,
    *ZERO_RULES,
    *OFFLOAD_RULES,
    *DEEPSPEED_RULES,
    *ADVICE,
)
RULES: tuple[Rule[Situation], ...] = (*BEFORE_THE_CHOICE, *OF_THE_CHOICE)
