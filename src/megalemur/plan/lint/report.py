"""Findings for people and for programs, and the table of docs/lint.md."""

import json
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from megalemur.plan.lint.finding import Finding, Rule


def count(findings: Sequence[Finding]) -> str:
    """`1 error, 2 warnings`."""
    errors = sum(finding.level == "error" for finding in findings)
    warnings = len(findings) - errors
    return f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"


def table(findings: Sequence[Finding]) -> Table:
    """One row a finding."""
    result = Table(title=count(findings), title_justify="left", box=None, padding=(0, 2), show_header=False)
    result.add_column(no_wrap=True)
    result.add_column(overflow="fold", ratio=1)
    for finding in findings:
        colour = "red" if finding.level == "error" else "yellow"
        result.add_row(f"[{colour}]{finding.level}[/]", f"{escape(finding.text)} [dim]({finding.rule})[/]")
    return result


def as_json(findings: Sequence[Finding]) -> str:
    """{"findings": [{"rule", "level", "text"}]}."""
    return json.dumps({"findings": [finding._asdict() for finding in findings]}, indent=1, ensure_ascii=False)


def documentation(rules: Sequence[Rule]) -> str:
    """The table of docs/lint.md."""
    rows = [("rule", "level", "fires on", "threads"), ("---", "---", "---", "---")]
    for rule in rules:
        links = ", ".join(f"[{_short(url)}]({url})" for url in rule.threads) or "measured here"
        rows.append((f"`{rule.name}`", rule.level, rule.says.removesuffix("."), links))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _short(url: str) -> str:
    """owner/name#number of a thread on GitHub."""
    parts = url.split("/")
    return f"{parts[3]}/{parts[4]}#{parts[6]}" if len(parts) > 6 else url
