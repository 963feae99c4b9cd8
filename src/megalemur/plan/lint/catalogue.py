"""Every rule over a run file alone."""

from megalemur.config.checks import CHECKS
from megalemur.plan.lint import blend, precision, running, shape
from megalemur.plan.lint.finding import Check, Level, Rule


def rules_of(*tables: tuple[tuple[str, Check], ...]) -> tuple[Rule, ...]:
    """The rules of the tables at the ends of their files."""
    levels: dict[str, Level] = {"error": "error", "warning": "warning"}
    return tuple(Rule(levels[level], check) for table in tables for level, check in table)


REFUSED_AT_LOAD = tuple(Rule("error", check) for check in CHECKS)
"""What config/checks.py refuses whenever a run file is loaded."""

CONFIG_RULES = rules_of(shape.RULES, precision.RULES, blend.RULES, running.RULES)
