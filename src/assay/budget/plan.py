"""The plan: which level every site gets, what that costs, and why; text that a person reads, edits and diffs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from assay.budget.menu import Decision
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
    gap: damage above the proven lower bound, as a share of it.
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

    def to_text(self) -> str:
        """YAML: the header, then one line a site."""
        header = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "choices"}
        header = {k: dict(v) if isinstance(v, Mapping) else v for k, v in header.items()}
        text = "# assay plan: edit the levels below; the figures are computed anew when it is used\n"
        text += yaml.safe_dump(header, sort_keys=False, width=10_000)
        width = max((len(name) for name in self.choices), default=0)
        lines = [
            f"  {name}:{' ' * (width - len(name))} {c.level or 'keep':<18} # {c.nbytes} bytes, {c.damage:.3g} nats; {c.why}"
            for name, c in self.choices.items()
        ]
        return text + "levels:\n" + "\n".join(lines) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan durably."""
        save_text(Path(path), self.to_text())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan. Raises InputError in one line for anything malformed."""
        try:
            value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"no plan at {path}; make one with assay plan") from None
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a plan ({str(error).splitlines()[0]})") from error
        names = {f.name for f in fields(cls)} - {"choices"} | {"levels"}
        if not isinstance(value, dict) or set(value) != names:
            odd = sorted(names ^ set(value if isinstance(value, dict) else ()))
            raise InputError(f"{path}: not a plan (missing or unknown: {', '.join(map(str, odd))})")
        levels = value.pop("levels")
        if not isinstance(levels, dict):
            raise InputError(f"{path}: levels must map each site to a level or keep")
        choices = {str(n): Choice(_level(path, n, text), 0, 0.0, "") for n, text in levels.items()}
        return cls(choices=choices, **value)


def _level(path: str | Path, name: str, text: Any) -> str | None:
    if text == "keep":
        return None
    try:
        return Level.parse(str(text)).name
    except InputError as error:
        raise InputError(f"{path}: {name}: {error}") from None


def validate(plan: Plan, decisions: Sequence[Decision]) -> None:
    """Check a plan's sites and levels against a menu. Raises InputError."""
    known = {site for d in decisions for site in d.sites}
    for name in plan.choices:
        if name not in known:
            near = difflib.get_close_matches(name, known, 2)
            raise InputError(f"the plan names {name}, which this model lacks; near it: {', '.join(near) or 'nothing'}")
    if missing := sorted(known - set(plan.choices)):
        raise InputError(f"the plan lacks {missing[0]}; write a level or keep for it")
    for decision in decisions:
        wanted = {plan.choices[site].level for site in decision.sites}
        if len(wanted) > 1:
            raise InputError(f"{', '.join(decision.sites)} are fused in {plan.engine}: give them one level")
        allowed = {o.level for o in decision.options}
        if not wanted <= allowed:
            choices = ", ".join(o or "keep" for o in sorted(allowed, key=str))
            raise InputError(f"{decision.name}: {plan.engine} or the menu doesn't allow {wanted.pop()}; choose {choices}")
