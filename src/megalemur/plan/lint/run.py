"""From a run file to everything that is wrong with it: what `megalemur lint`, `train` and `plan` call."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megalemur.config.load import examine_run
from megalemur.config.run import RunConfig
from megalemur.plan.lint.catalogue import CONFIG_RULES
from megalemur.plan.lint.finding import Finding, Rule
from megalemur.plan.lint.machine import Site

GPUS_PER_NODE = 8


class LintError(ValueError):
    """A run that would fail, or train something else than was meant."""


def apply(rules: Iterable[Rule], subject: Mapping[str, Any]) -> list[Finding]:
    """What the rules say of a subject, errors first."""
    found = [finding for rule in rules for finding in rule.findings(subject)]
    return sorted(found, key=lambda finding: finding.level)  # "error" comes before "warning"


def lint_config(config: RunConfig, *, gpus_per_node: int = GPUS_PER_NODE) -> list[Finding]:
    """The rules over a run that was loaded."""
    return apply(CONFIG_RULES, {**dict(config), "gpus_per_node": gpus_per_node})


def lint_files(config: RunConfig, site: Site | None = None, *, gpus_per_node: int = GPUS_PER_NODE) -> list[Finding]:
    """The rules over the files that a run names and over this machine."""
    from megalemur.plan.lint.disk_catalogue import FILE_RULES
    from megalemur.plan.lint.files import Files

    subject = {"config": config, "files": Files(config), "site": site or Site.here(), "gpus_per_node": gpus_per_node}
    return apply(FILE_RULES, subject)


def lint_run_file(
    path: Path, overrides: Sequence[str] = (), *, files: bool = False, gpus_per_node: int = GPUS_PER_NODE
) -> list[Finding]:
    """Everything that is wrong with a run file: what loading it refuses, and the rules on whatever is valid of it.

    Args:
        path: the run file.
        overrides: section.key=value.
        files: also look at the files and the machine; done only where the run file can be loaded.
        gpus_per_node: of the cluster.
    """
    parts, problems = examine_run(path, overrides)
    found = [Finding(problem.check, "error", problem.text) for problem in problems]
    # a rule may rely on what a check refuses: its sections then count as invalid
    usable = (
        {**parts, "gpus_per_node": gpus_per_node} if not problems else _without_doubt(parts, gpus_per_node, problems)
    )
    found += apply(CONFIG_RULES, usable)
    if files and not problems:
        found += lint_files(RunConfig(**parts), gpus_per_node=gpus_per_node)
    return sorted(found, key=lambda finding: finding.level)


def _without_doubt(parts: Mapping[str, Any], gpus_per_node: int, problems: Sequence[Any]) -> dict[str, Any]:
    """The sections that no problem names."""
    texts = [problem.text for problem in problems]
    return {
        "gpus_per_node": gpus_per_node,
        **{name: part for name, part in parts.items() if not any(f"{name}." in text for text in texts)},
    }


def refuse(findings: Iterable[Finding]) -> None:
    """Raise where there is an error.

    Raises:
        LintError: lists every error.
    """
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        raise LintError("\n".join(f"{finding.rule}: {finding.text}" for finding in errors))
