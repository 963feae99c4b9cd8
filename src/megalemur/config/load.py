"""From YAML and overrides to a RunConfig, with every problem reported at once and named as the user wrote it."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from megalemur.config.checks import Problem, named_problems
from megalemur.config.plain_files import read_plain
from megalemur.config.presets import PRESETS
from megalemur.config.run import RunConfig

_MAX_BYTES = 1 << 20
"""Largest run file: a thousand sources have a tenth of it, and the YAML reader takes a second for all of it."""

_MAX_DEPTH = 20  # sections, lists, their items: a run file has four levels


class ConfigError(ValueError):
    """A run file or an override that cannot be used. `problems` holds one sentence each."""

    def __init__(self, origin: str, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__(f"{origin}:\n" + "\n".join(f"  - {problem}" for problem in problems))


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.1 without its surprises: duplicate keys are errors, 1e-4 is a number, on/off/yes/no are strings."""

    _depth = 0

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: int) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases are not used in run files", self.peek_event().start_mark
            )
        if self._depth == _MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", self.peek_event().start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _resolvers() -> dict[str, list[tuple[str, Any]]]:
    """What plain text may mean beside text: null, true, false and decimal numbers. 010 is no octal, 1:30 not 90, and
    2024-01-01 no date."""
    prefix = "tag:yaml.org,2002:"
    own = {prefix + kind for kind in ("bool", "int", "float", "timestamp")}
    table = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in own]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    boolean = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
    whole = re.compile(r"^[-+]?(?:0|[1-9][\d_]*)$")
    number = re.compile(r"^[-+]?(?:(?:0|[1-9][\d_]*)(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][-+]?\d+)?$")
    for first in "tTfF":
        table.setdefault(first, []).append((prefix + "bool", boolean))
    for first in "-+.0123456789":
        table.setdefault(first, []).extend([(prefix + "int", whole), (prefix + "float", number)])
    return table


_StrictLoader.yaml_implicit_resolvers = _resolvers()


class _CarefulDumper(yaml.SafeDumper):
    """Quotes every text that our loader or another YAML reader would take for something else, such as 1e3 and yes."""


_CarefulDumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *rules]
    for first, rules in _StrictLoader.yaml_implicit_resolvers.items()
}


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        said = ", ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(origin, [f"{where}{said}"]) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: numbers and dates that YAML spells and Python has not
        raise ConfigError(origin, [" ".join(str(error).split())]) from None


def parse_settings(text: str, origin: str) -> Any:
    """Plain YAML that another program wrote, read as strictly as a run file.

    Raises:
        ConfigError: no YAML, or YAML with tags, aliases or duplicate keys.
    """
    return _parse(text, origin)


def _apply_override(values: dict[str, Any], override: str) -> str | None:
    """Write one `section.key=value` into `values`; returns the problem, if there is one."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        return f"{override}: an override is written section.key=value"
    try:
        value = _parse(text, override)
    except ConfigError as error:
        return error.problems[0]
    here: Any = values
    for key in keys[:-1]:
        if isinstance(here, dict) and here.get(key) is None:
            here[key] = {}  # not given, or empty: `profiler: null` is how a resolved run writes what it has not
        here = here[key] if isinstance(here, dict) else _list_item(here, key)
        if not isinstance(here, (dict, list)):
            return f"{override}: {key} holds no settings"
    if isinstance(here, list):
        return f"{override}: name a setting of an item, as in data.sources.0.weight"
    here[keys[-1]] = value
    return None


def _list_item(items: Any, key: str) -> Any:
    return items[int(key)] if isinstance(items, list) and key.isdigit() and int(key) < len(items) else None


def _fields_at(model: type[BaseModel], path: Iterable[Any]) -> dict[str, Any]:
    """Names that are allowed where `path` points; indices of lists are passed over."""
    fields: dict[str, Any] = model.model_fields
    for key in path:
        if isinstance(key, int):
            continue
        inner = _section_in(fields[key].annotation) if key in fields else None
        if inner is None:
            return {}
        fields = inner.model_fields
    return fields


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _section_in(part)
        if found is not None:
            return found
    return None


def _sentence(error: Any) -> str:
    """One pydantic error as a sentence that starts with the setting's name."""
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        *parents, key = error["loc"]
        near = difflib.get_close_matches(str(key), _fields_at(RunConfig, parents), n=1, cutoff=0.5)
        names = ", ".join(_fields_at(RunConfig, parents))
        hint = f"did you mean {'.'.join([*map(str, parents), near[0]])}?" if near else f"there are {names}"
        return f"{where}: no such setting; {hint}"
    if error["type"] == "missing":
        return f"{where}: not given, and it has no default"
    message = error["msg"].removeprefix("Value error, ")
    if message.startswith("Input "):
        message = f"i{message[1:]}"
    given = error.get("input")
    if given is None:
        message += " (given: nothing)"
    elif isinstance(given, bool):
        message += f" (given: {str(given).lower()})"
    elif isinstance(given, (str, int, float)):
        message += f" (given: {given!r})"
    return f"{where}: {message}"


def _without(values: Any, unknown: Iterable[Sequence[Any]]) -> Any:
    """A copy of a section's values without the settings at the given paths."""
    if isinstance(values, list):
        keyed: Iterable[tuple[Any, Any]] = enumerate(values)
    elif isinstance(values, dict):
        keyed = values.items()
    else:
        return values
    here = {path[0] for path in unknown if len(path) == 1}
    kept = {
        key: _without(value, [path[1:] for path in unknown if len(path) > 1 and path[0] == key])
        for key, value in keyed
        if key not in here
    }
    return kept if isinstance(values, dict) else list(kept.values())


def _read_section(name: str, section: type[BaseModel], values: Any) -> tuple[BaseModel | None, list[str]]:
    """The section, if its known settings are all right, and its problems.

    An unknown key alone does not keep the others from being checked against the rest of the run: one pass shows both.
    """
    try:
        return section.model_validate(values), []
    except ValidationError as error:
        items = error.errors()
    problems = [_sentence({**item, "loc": (name, *item["loc"])}) for item in items]
    if any(item["type"] != "extra_forbidden" for item in items):
        return None, problems
    return section.model_validate(_without(values, [item["loc"] for item in items])), problems


class Examined(NamedTuple):
    """A run file as far as it can be used."""

    parts: Mapping[str, Any]
    """The sections that are valid by themselves."""
    problems: list[Problem]
    """Everything that `parse_run` would refuse."""


def _examine(values: dict[str, Any]) -> Examined:
    """Validate part by part, so that problems inside one part do not hide those between others."""
    problems: list[str] = []
    parts: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        section = _section_in(field.annotation)
        assert section is not None
        if name not in values and not field.is_required():
            parts[name] = field.get_default()
            continue
        read, found = _read_section(name, section, {} if values.get(name) is None else values[name])
        problems += found
        if read is not None:
            parts[name] = read
    problems += [
        _sentence({"type": "extra_forbidden", "loc": (key,)}) for key in values if key not in RunConfig.model_fields
    ]
    return Examined(parts, [*(Problem("settings", text) for text in problems), *named_problems(parts)])


def _values(text: str, overrides: Sequence[str], origin: str) -> dict[str, Any]:
    """YAML text with its overrides applied, not validated."""
    values = _parse(text, origin)
    if not isinstance(values, dict):
        raise ConfigError(origin, ["a run file is a mapping of sections: run, model, parallel, data …"])
    written = dict(values["model"]) if isinstance(values.get("model"), dict) else {}
    bad = [problem for override in overrides if (problem := _apply_override(values, override))]
    bad += _deaf_preset(written, values.get("model"))
    if bad:
        raise ConfigError(origin, bad)
    return values


def parse_run(text: str, overrides: Sequence[str] = (), origin: str = "run file") -> RunConfig:
    """RunConfig from YAML text and `section.key=value` overrides.

    Raises:
        ConfigError: anything wrong with either; the message lists every problem.
    """
    parts, problems = _examine(_values(text, overrides, origin))
    if problems:
        raise ConfigError(origin, [problem.text for problem in problems])
    return RunConfig(**parts)


def _deaf_preset(written: dict[str, Any], now: Any) -> list[str]:
    """An override of model.preset that the run file's own fields would leave without effect but for the name."""
    preset = now.get("preset") if isinstance(now, dict) else None
    if preset == written.get("preset") or not isinstance(preset, str) or preset not in PRESETS:
        return []
    kept = [key for key, value in PRESETS[preset].items() if key in written and now[key] == written[key] != value]
    if not kept:
        return []
    return [
        f"model.preset={preset} fills in only what the run file leaves out, and it gives "
        f"{', '.join(f'{key}={written[key]}' for key in kept)}; take them out of the file, or override them too"
    ]


def parse_resolved(text: str) -> dict[str, Any]:
    """The plain values of a run file that a checkpoint carries: as strict as YAML goes, no schema.

    Raises:
        ConfigError: it is no mapping, or no YAML that we would have written.
    """
    values = _parse(text, "run file")
    if not isinstance(values, dict):
        raise ConfigError("run file", ["a run file is a mapping of sections"])
    return values


def _read(path: Path) -> str:
    try:
        return read_plain(Path(path), _MAX_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """RunConfig from a run file.

    Raises:
        ConfigError: no such file, or anything that `parse_run` refuses.
    """
    return parse_run(_read(path), overrides, origin=str(path))


def examine_run(path: Path, overrides: Sequence[str] = ()) -> Examined:
    """A run file as far as it can be used: for whoever has more to say about it than what is refused.

    Never raises ConfigError: a file that is no run file at all has no parts, and its problems.
    """
    try:
        return _examine(_values(_read(path), overrides, str(path)))
    except ConfigError as error:
        return Examined({}, [Problem("settings", text) for text in error.problems])


def dump_run(config: RunConfig) -> str:
    """The resolved run as YAML that `parse_run` reads back to an equal RunConfig."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_CarefulDumper, sort_keys=False, width=120)


def run_schema() -> dict[str, Any]:
    """JSON schema of a run file, for editors."""
    return RunConfig.model_json_schema()
