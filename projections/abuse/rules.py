"""The rules as they stand in `rules/*.sql`, each with what its head says, and what settings change of them. Pure."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, TypeVar, get_args

from msgspec import Struct
from msgspec.structs import replace

from events.types import RuleMode

Entity = Literal["token", "grant", "address", "account", "client", "code"]
REVOCABLE: tuple[Entity, ...] = ("token", "grant")
T = TypeVar("T")

MODES: tuple[RuleMode, ...] = get_args(RuleMode)
WINDOW_SECONDS_MAX = 3600  # all uses are kept in memory for the rules at most so long
LONG_SECONDS_MAX = 10_800  # and what is rare: refused requests and scopes, and what people's tokens are used for
_VALUE_MAX = 1e9
_DIRECTORY = Path(__file__).parent / "rules"
_HEAD = re.compile(r"-- (\w+): (.*)")
_PARAMETER = re.compile(r"(\w+) = ([0-9.]+) \((\w+); (.+)\)")


class RuleError(ValueError):
    """A rule that cannot be read, or a change to one that makes no sense. `str()` is fit for a person."""


class Parameter(Struct, frozen=True, kw_only=True):
    """A number that the rule's SQL has as `$name`."""

    name: str
    value: float
    unit: str
    text: str


class Rule(Struct, frozen=True, kw_only=True):
    """A rule. `finds`: what; `spares`: what looks like it and is none. `quiet_seconds`: then a new incident begins."""

    name: str
    version: int
    finds: str
    spares: str
    entity: Entity
    mode: RuleMode
    quiet_seconds: int
    parameters: tuple[Parameter, ...]
    sql: str

    @property
    def values(self) -> dict[str, float]:
        return {parameter.name: parameter.value for parameter in self.parameters}

    @property
    def window_seconds(self) -> float:
        """How far before a use the rule looks at other uses one by one."""
        return self.values.get("seconds", 0)


@functools.cache
def all_rules() -> Mapping[str, Rule]:
    """The rules of the repository by name, with their defaults."""
    return {path.stem: parse(path.stem, path.read_text(encoding="utf-8")) for path in sorted(_DIRECTORY.glob("*.sql"))}


def parse(name: str, text: str) -> Rule:
    """Raises: RuleError."""
    head: dict[str, list[str]] = {}
    key = ""
    lines = text.splitlines()
    body = next((index for index, line in enumerate(lines) if not line.startswith("--")), len(lines))
    for line in lines[:body]:
        found = _HEAD.fullmatch(line)
        if found:
            key = found[1]
            head.setdefault(key, []).append(found[2])
        elif key:
            head[key][-1] += " " + line.removeprefix("--").strip()
    try:
        rule = Rule(
            name=name,
            version=int(head["version"][0]),
            finds=head["finds"][0],
            spares=head["spares"][0],
            entity=_one_of(head["entity"][0], get_args(Entity)),
            mode=_one_of(head["mode"][0], MODES) if "mode" in head else "observe",
            quiet_seconds=int(head["quiet_seconds"][0]),
            parameters=tuple(_parameter(one) for one in head.get("parameter", ())),
            sql="\n".join(lines[body:]).strip(),
        )
    except KeyError as error:
        raise RuleError(f"rule {name} cannot be read: its head has no line `-- {error.args[0]}: …`") from error
    except ValueError as error:
        raise RuleError(f"rule {name} cannot be read: {error} in its head") from error
    unused = set(re.findall(r"\$(\w+)", rule.sql)) ^ (rule.values.keys() | {"from", "until"})
    if unused:
        raise RuleError(f"rule {name}: its SQL and its head do not have the same parameters: {', '.join(unused)}")
    return rule


def _one_of(word: str, words: tuple[T, ...]) -> T:
    found = next((one for one in words if one == word), None)
    if found is None:
        raise ValueError(f"{word!r} is none of {', '.join(map(str, words))}")
    return found


def _parameter(text: str) -> Parameter:
    found = _PARAMETER.fullmatch(text)
    if found is None:
        raise ValueError(f"parameter {text!r}")
    return Parameter(name=found[1], value=float(found[2]), unit=found[3], text=found[4])


def changed(rule: Rule, name: str, value: str) -> Rule:
    """The rule with another `mode` or value of a parameter. Raises: RuleError."""
    if name == "mode":
        if value not in MODES:
            raise RuleError(f"{rule.name}.mode is {value!r} and must be one of {', '.join(MODES)}")
        if value == "revoke" and rule.entity not in REVOCABLE:
            article = "an" if rule.entity[0] == "a" else "a"
            raise RuleError(
                f"{rule.name}.mode cannot be revoke: it finds {article} {rule.entity}, and no token to be ended; "
                "set it to observe or notify"
            )
        return replace(rule, mode=value)
    names = [parameter.name for parameter in rule.parameters]
    if name not in names:
        raise RuleError(f"{rule.name} has no parameter {name!r}: it has mode, {', '.join(names)}{_meant(name, names)}")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number <= _VALUE_MAX:
        raise RuleError(f"{rule.name}.{name} is {value!r} and must be a number above 0, at most {_VALUE_MAX:g}")
    seconds_max = {"seconds": WINDOW_SECONDS_MAX, "long_seconds": LONG_SECONDS_MAX}.get(name)
    if seconds_max is not None and number > seconds_max:
        raise RuleError(f"{rule.name}.{name} must be at most {seconds_max}")
    parameters = tuple(
        replace(parameter, value=number) if parameter.name == name else parameter for parameter in rule.parameters
    )
    return replace(rule, parameters=parameters)


def configured(changes: Iterable[str]) -> dict[str, Rule]:
    """All rules, with changes such as `burst.mode=revoke` and `burst.factor=4`. Raises: RuleError."""
    rules = dict(all_rules())
    given: set[str] = set()
    for change in changes:
        found = re.fullmatch(r"(\w+)\.(\w+)=([\w.+-]+)", change)
        if found is None:
            raise RuleError(f"{change!r} does not read rule.parameter=value")
        name, parameter, value = found.groups()
        if name not in rules:
            raise RuleError(f"there is no rule {name!r}: there are {', '.join(rules)}{_meant(name, rules)}")
        if f"{name}.{parameter}" in given:
            raise RuleError(f"{name}.{parameter} is given twice")
        given.add(f"{name}.{parameter}")
        rules[name] = changed(rules[name], parameter, value)
    return rules


def _meant(name: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(choices), 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""
