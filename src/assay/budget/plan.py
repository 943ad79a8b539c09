"""The plan: which level every site gets, what that costs, and why; text to read, edit and diff."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from assay.budget.menu import Decision
from assay.budget.size import LIMITS, Budget
from assay.model.errors import InputError
from assay.model.files import save_text
from assay.model.level import Level


@dataclass(frozen=True)
class Choice:
    """A site's level (None: keep), bytes, expected damage in nats per token, and the reason."""

    level: str | None
    nbytes: int
    damage: float
    why: str


@dataclass(frozen=True)
class Plan:
    """What to do with every site of one model for one engine.

    bits: average inside the blocks with all overhead; bits_all: over all weights of the model; predicted:
    KL in nats per token with its 95% interval; uniform: the best single level in the same budget;
    gap: damage above the proven lower bound, as a share of it; serving: memory at the budget's context, with the
    engine's flags; more: what some more bytes would buy, by the same planner; cache: how each layer's keys and values are
    stored, and the loss of weights and cache together, where caches were priced.
    """

    model: str
    profile: str
    engine: str
    method: str
    budget: Mapping[str, Any]
    choices: Mapping[str, Choice]
    nbytes_tensors: int
    bits: float
    bits_all: float
    predicted: float
    predicted_low: float
    predicted_high: float
    uniform: Mapping[str, Any]
    gap: float
    sentence: str
    serving: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    cache: Mapping[str, Any] = field(default_factory=dict)
    planner: str = "lagrange"

    @property
    def cache_type(self) -> str | None:
        """How keys and values will be stored; None where nothing says so."""
        return self.serving.get("cache_type") or self.budget.get("cache")

    @property
    def levels(self) -> dict[str, Level]:
        """Of what is compressed, by site."""
        return {name: Level.parse(choice.level) for name, choice in self.choices.items() if choice.level}

    def to_text(self) -> str:
        """YAML: the header, then one line a site."""
        header = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "choices"}
        header = {k: dict(v) if isinstance(v, Mapping) else v for k, v in header.items()}
        text = "# assay plan: edit the levels below; the figures are computed anew when it is used\n"
        text += yaml.safe_dump(header, sort_keys=False, width=10_000)
        keys = {name: _key(name) for name in self.choices}
        width = max((len(key) for key in keys.values()), default=0)
        lines, group = ["levels:" if self.choices else "levels: {}"], None
        for name, choice in self.choices.items():
            if group not in (None, _group(name)):
                lines.append("")
            group = _group(name)
            lines.append(
                f"  {keys[name]}:{' ' * (width - len(keys[name]))} {choice.level or 'keep':<18} "
                f"# {choice.nbytes} bytes, {choice.damage:.3g} nats; {choice.why}"
            )
        return text + "\n".join(lines) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan durably."""
        save_text(Path(path), self.to_text())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan. Raises InputError in one line for anything malformed."""
        try:
            value = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
        except FileNotFoundError:
            raise InputError(f"no plan at {path}; make one with assay plan") from None
        except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: not a plan ({_reason(error)})") from error
        names = {f.name for f in fields(cls)} - {"choices"} | {"levels"}
        needed = names - {f.name for f in fields(cls) if (f.default, f.default_factory) != (MISSING, MISSING)}
        if not isinstance(value, dict) or not needed <= set(value) <= names:
            given = set(value if isinstance(value, dict) else ())
            odd = sorted(map(str, needed - given | given - names))
            raise InputError(f"{path}: not a plan (missing or unknown: {', '.join(odd)})")
        levels = value.pop("levels")
        if not isinstance(levels, dict):
            raise InputError(f"{path}: levels must map each site to a level or keep")
        _check_header(path, value)
        choices = {str(n): Choice(_level(path, n, text), 0, 0.0, "") for n, text in levels.items()}
        return cls(choices=choices, **value)


class _Loader(yaml.SafeLoader):
    """safe_load that refuses a key written twice, instead of dropping the first, and references, which can multiply."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="a reference; write it out", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _reason(error: Exception) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem and mark:
        return f"line {mark.line + 1}: {problem}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _check_header(path: str | Path, header: Mapping[str, Any]) -> None:
    wanted: dict[str, tuple[type | tuple[type, ...], str]] = {
        "str": (str, "text"), "int": (int, "a whole number"), "float": ((int, float), "a number"),
        "Mapping[str, Any]": (dict, "a mapping"),
    }  # fmt: skip
    for own in fields(Plan):
        kind, words = wanted.get(str(own.type), (object, ""))
        value = header.get(own.name)
        if own.name in header and (not isinstance(value, kind) or isinstance(value, bool)):
            raise InputError(f"{path}: {own.name} must be {words}, not {value!r}")
    try:
        Budget(**header["budget"])
    except TypeError:
        raise InputError(f"{path}: budget must be one of {', '.join(LIMITS)}, and context, batch, cache and evict") from None
    except InputError as error:
        raise InputError(f"{path}: budget: {error}") from None


def _level(path: str | Path, name: str, text: Any) -> str | None:
    if text == "keep":
        return None
    try:
        return Level.parse(str(text)).name
    except InputError as error:
        raise InputError(f"{path}: {name}: {error}") from None


def _key(name: str) -> str:
    """A site's name as YAML reads it back, quoted only where it must be."""
    try:
        plain = yaml.safe_load(f"{name}: keep") == {name: "keep"}
    except (yaml.YAMLError, ValueError):
        plain = False
    return name if plain else yaml.safe_dump(name, default_style='"', width=10_000).rstrip("\n")


def _group(name: str) -> str:
    """What comes before the name's second part that follows a block's number: one block is one paragraph."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[: number + 1])


def validate(plan: Plan, decisions: Sequence[Decision]) -> None:
    """Check a plan's sites and levels against a menu. Raises InputError."""
    known = {site for d in decisions for site in d.sites}
    for name in plan.choices:
        if name not in known:
            near = difflib.get_close_matches(name, known, 2)
            nearest = ", ".join(near) or "nothing"
            raise InputError(f"the plan names {name}, which this model lacks; near it: {nearest}")
    if missing := sorted(known - set(plan.choices)):
        raise InputError(f"the plan lacks {missing[0]}; write a level or keep for it")
    for decision in decisions:
        wanted = {plan.choices[site].level for site in decision.sites}
        if len(wanted) > 1:
            raise InputError(f"{', '.join(decision.sites)} are fused in {plan.engine}: give them one level")
        allowed = {o.level for o in decision.options}
        if not wanted <= allowed:
            choices = ", ".join(o or "keep" for o in sorted(allowed, key=str))
            level = wanted.pop()
            refused = f"{plan.engine} or the menu doesn't allow {level}"
            raise InputError(f"{decision.name}: {refused}; choose {choices}")
