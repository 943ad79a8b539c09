"""Whether two texts agree about which weight matrices matter."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assay.budget.plan import Plan
from assay.budget.prices import price
from assay.budget.probe import probed_level
from assay.budget.spread import noise, of_weight
from assay.measure.curvatures import Curvatures
from assay.measure.profile import Profile, measure
from assay.measure.stream import StreamedModel, read_weight
from assay.measure.text import Windows
from assay.model.progress import Progress

BITS = 3
TOKENS = 4_096
"""Of the other text that are read."""
LIMIT = 0.015
"""Extra loss above which two texts disagree. On pebble and the built-in model samples of one text were at 0.000 to 0.007
from 4,096 tokens on (0.014 with half of that); Wikipedia, Python's library and random letters at 0.017 to 0.07."""


def extra_loss(prices: Mapping[str, float], others: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """By how much a plan made from `prices` loses more where `others` hold than one made from these, as a share.

    prices, others: nats per token for the same rounding of each matrix; counts: its weights. Where bits are divided
    best, every weight costs the same, so the loss of a plan is the geometric mean of the prices by weight, and with
    another text's plan their ratio's arithmetic mean over its geometric mean times that: 0 where all ratios agree.
    """
    known = [n for n in prices if prices[n] > 0 and others.get(n, 0) > 0]
    total = sum(counts[n] for n in known)
    if not total:
        return 0.0
    ratios = {n: others[n] / prices[n] for n in known}
    mean = sum(counts[n] * ratios[n] for n in known) / total
    return mean / math.exp(sum(counts[n] * math.log(ratios[n]) for n in known) / total) - 1


@dataclass(frozen=True)
class Reference:
    """Prices of the matrices in the blocks on one text: 3 bits, rounded to nearest, nats per token.

    noise: what `extra_loss` is larger by because they come from a sample of the text; source: its name.
    """

    prices: Mapping[str, float]
    noise: float
    source: str

    @classmethod
    def of(cls, profile: Profile) -> Reference:
        """On the calibration text."""
        rows = [row for row in profile.index["rows"] if row["block"] is not None and row["name"] in profile.prices]
        prices = {r["name"]: profile.prices[r["name"]][probed_level(r["shape"][1], BITS).name]["nearest"] for r in rows}
        counts = {r["name"]: r["shape"][0] * r["shape"][1] for r in rows}
        return cls(prices, noise(profile.index["spread"], counts), _name(profile.index["calibration"]["source"]))

    @classmethod
    def measured(cls, model: StreamedModel, text: Windows, progress: Progress) -> Reference:
        """On the first tokens of any text: two sweeps over the model."""
        first = Windows(text.ids[: max(1, TOKENS // text.ids.shape[1])], text.source)
        prices, parts = {}, {}
        with tempfile.TemporaryDirectory(prefix="assay-") as folder:
            measure(model, first, Path(folder), 0, progress)
            for block in range(len(model.blocks)):
                curvatures = Curvatures(Path(folder), block, first.tokens)
                for site in model.anatomy.block_sites(block):
                    if (curvature := curvatures.get(site.name)) is not None:
                        weight, level = read_weight(model, site), probed_level(site.shape[1], BITS)
                        prices[site.name] = price(weight, curvature, [level])[level.name]["nearest"]
                        parts[site.name] = of_weight(weight, curvature) if curvature.parts else []
        counts = {site.name: site.count for site in model.anatomy.sites.values()}
        return cls(prices, noise(parts, counts), _name(text.source))


def compared(model: StreamedModel, known: Reference, text: Windows, progress: Progress) -> dict[str, Any]:
    """What profiles and verdicts say of another text than that of calibration.

    `text`: its name; `extra_loss`: see there, without what chance explains; `warning`: a sentence where that is above
    `LIMIT`, else None.
    """
    counts, other = {site.name: site.count for site in model.anatomy.sites.values()}, Reference.measured(model, text, progress)
    extra = max(0.0, extra_loss(known.prices, other.prices, counts) - known.noise - other.noise)
    said = warning(known.source, other.source, extra) if extra > LIMIT else None
    return {"text": other.source, "extra_loss": extra, "warning": said}


def of_result(model: StreamedModel, recipe: Mapping[str, Any], text: Windows, progress: Progress) -> dict[str, Any] | None:
    """`compared` for a result's recipe; None where the result was made from a transform of the model."""
    if recipe["model"] != model.checkpoint.fingerprint:
        return None
    return compared(model, Reference(**recipe["reference"]), text, progress)


def _name(source: str) -> str:
    """The text of `Windows.source`."""
    return source.rpartition(":")[0] or source


def noted(profile: Profile, plan: Plan) -> Plan:
    """The plan with the profile's warning, if it has one, in its sentence."""
    found = (profile.index["target"] or {}).get("warning")
    return replace(plan, sentence=f"{plan.sentence}; {found}") if found else plan


def warning(calibration: str, text: str, extra: float) -> str:
    """The sentence for a person."""
    return (
        f"{calibration} and {text} disagree about what matters: bits divided by the first are expected to lose "
        f"{extra:.1%} more on the second than bits divided by itself (samples of one text stay below {LIMIT:.1%}); "
        f"profile with --calibration {text}, or with --select dsir --target {text}"
    )
