"""Every rule over the files and the machine; apart from the others because it imports numpy."""

from megalemur.plan.lint import checkpoints, environment, sources
from megalemur.plan.lint.catalogue import rules_of

FILE_RULES = rules_of(sources.RULES, checkpoints.RULES, environment.RULES)
