"""Tables for the terminal, made from the same dictionaries that `--json` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from assay.budget.plan import Plan

Facts = Mapping[str, Any]
UNKNOWN = "-"
RESTORED = 5


def closing(report: Facts, model: str, verdict: Facts | None = None) -> Group:
    """The end of `compress`: what was promised, beside what was measured if it was."""
    table = Table("", "before", "predicted", "after", title=str(report["out"]), title_justify="left")
    source, perplexity = report.get("source_bytes"), (verdict or {}).get("perplexity", {})
    kl = (verdict or {}).get("kl", {})
    promised = span(report.get("predicted"), report.get("predicted_low"), report.get("predicted_high"))
    table.add_row("KL, nats/token", "0", promised, span(kl.get("measured"), kl.get("low"), kl.get("high")))
    if perplexity:
        table.add_row("perplexity", number(perplexity["original"]), "", number(perplexity["compressed"]))
    table.add_row("bytes of the weight files", size(source), "", size(report["bytes"]) + ratio(source, report["bytes"]))
    table.add_row("bits per weight, in the blocks", "", "", number(report["bits"]))
    table.add_row("bits per weight, all", "", "", number(report.get("bits_all")))
    lines = [_counts(report["ledger"]), f"{report['seconds']:.0f} s, peak memory {size(report['peak_rss_bytes'])}"]
    if verdict is None:
        lines.append(f"not measured yet: assay verify {report['out']} --against {model}")
    return Group(table, *lines)


def verdict(found: Facts) -> Group:
    """The end of `verify`: measured beside predicted."""
    kl, perplexity = found["kl"], found["perplexity"]
    table = Table("", "predicted", "measured", title=f"on {found['tokens']} tokens of {found['text']}", title_justify="left")
    predicted = span(kl["predicted"], kl["predicted_low"], kl["predicted_high"])
    table.add_row("KL, nats/token", predicted, span(kl["measured"], kl["low"], kl["high"]))
    if joint := found.get("joint"):
        table.add_row(*_with_cache(joint))
    table.add_row("KL, median and 99%", "", f"{number(kl.get('median'))} and {number(kl.get('p99'))}")
    table.add_row("perplexity", "", f"{number(perplexity['original'])} → {number(perplexity['compressed'])}")
    table.add_row("same top token", "", f"{_value(found['agreement']):.1%}")
    table.add_row("bytes of the weight files", "", size(found["bytes"]))
    table.add_row("bits per weight, in the blocks", "", number(found["bits"]))
    table.add_row("bits per weight, all", "", number(found["bits_all"]))
    undo = [_restorations(found["restore"])] if found.get("restore") else []
    bound = f"the bound of {found['max_loss']} nats" if found.get("max_loss") is not None else "no bound on the loss was set"
    more = [*undo, *_batches(found), *_tasks(found.get("tasks")), *_texts(found.get("texts"))]
    return Group(table, *more, f"{'passed' if found['passed'] else 'missed'}: {bound}")


def _batches(found: Facts) -> list[Any]:
    """The same figures at several batch sizes, and how far they are apart."""
    if not found.get("batches"):
        return []
    table = Table("windows at once", "KL, nats/token", "perplexity", "same top token")
    for row in found["batches"]["runs"]:
        table.add_row(str(row["batch"]), f"{row['kl']:.9f}", f"{row['perplexity']:.7f}", f"{row['agreement']:.3%}")
    apart = found["batches"]["spread"]
    return [table, (
        f"spread in {found['compute']}: KL {apart['kl']:.1e}, perplexity {apart['perplexity']:.1e}, one token's KL at most "
        f"{apart['token_kl']:.1e}; {apart['top_tokens']:.3%} of the top tokens change"
    )]  # fmt: skip


def _with_cache(joint: Facts) -> tuple[str, str, str]:
    """Weights and cache together."""
    if "refused" in joint:
        return f"KL with its cache ({joint['cache']})", "", f"not measured: {joint['refused']}"
    predicted = span(joint["predicted"], joint["predicted_low"], joint["predicted_high"])
    name = f"KL with its cache ({joint['cache']}{', simulated' if joint['simulated'] else ''})"
    alone = f"{number(joint['weights'])} without, on the same {joint['tokens']} tokens"
    return name, predicted, f"{span(joint['measured'], joint['low'], joint['high'])}; {alone}"


def _tasks(found: Mapping[str, Facts] | None) -> list[Table]:
    """Scores on tasks, the difference with its interval."""
    if not found:
        return []
    table = Table("task", "metric", "examples", "original", "compressed", "difference", title="lm-eval", title_justify="left")
    for task, metrics in found.items():
        for metric, row in metrics.items():
            change = span(row["difference"], row["low"], row["high"])
            table.add_row(task, metric, str(row["examples"]), number(row["original"]), number(row["compressed"]), change)
    return [table]


def _restorations(found: Sequence[Facts]) -> Table:
    """What full precision would bring back first, by loss per byte."""
    title = "worth most per byte at full precision (--keep)"
    table = Table("group", "level", "bytes added", "KL expected less", "share", "per MB", title=title, title_justify="left")
    for row in found[:RESTORED]:
        each = number(row["kl"] / row["bytes"] * 1e6)
        table.add_row("\n".join(row["tensors"]), row["level"], size(row["bytes"]), number(row["kl"]), f"{row['share']:.1%}", each)
    return table


def inspection(found: Facts) -> Group:
    """The end of `inspect`: sites by role, and what stays with its reason."""
    sites = Table("role", "matrices", "out x in", "bytes", title=f"{found['family']}: {found['model']}", title_justify="left")
    for role, rows in _by(found["sites"], "role").items():
        shapes = sorted({f"{r['shape'][0]} x {r['shape'][1]}" for r in rows})
        sites.add_row(role, str(len(rows)), ", ".join(shapes), size(sum(r["bytes"] for r in rows)))
    kept = Table("tensors", "stay as they are because")
    for reason, count in Counter(found["kept"].values()).most_common():
        kept.add_row(str(count), reason)
    total = f"{found['blocks']} blocks, {found['parameters']:,} parameters, {size(found['bytes'])}"
    tied = "; head and embedding are tied" if found["tied"] else ""
    return Group(sites, kept, total + tied)


def plan_facts(plan: Plan, path: Path) -> dict[str, Any]:
    """A plan in a few numbers."""
    levels = Counter(choice.level or "keep" for choice in plan.choices.values())
    return {
        "plan": str(path), "bits": plan.bits, "bits_all": plan.bits_all, "levels": dict(sorted(levels.items())),
        "kl": {"predicted": plan.predicted, "predicted_low": plan.predicted_low, "predicted_high": plan.predicted_high},
        "uniform": dict(plan.uniform), "gap": plan.gap, "sentence": plan.sentence, "nbytes": plan.nbytes_tensors,
        "serving": dict(plan.serving), "more": dict(plan.more), "cache": dict(plan.cache),
    }  # fmt: skip


def planned(found: Facts) -> Group:
    """The end of `plan`."""
    table = Table("level", "matrices", title=found["plan"], title_justify="left")
    for level, count in found["levels"].items():
        table.add_row(level, str(count))
    bits = f"{number(found['bits'])} bits per weight in the blocks, {number(found['bits_all'])} over all"
    return Group(
        table,
        bits,
        found["sentence"],
        *_served(found.get("serving")),
        *_alone(found.get("cache")),
        *_more(found.get("more"), found["kl"]),
    )


def _served(serving: Facts | None) -> list[str]:
    """Memory of a plan while it is served, and the engine's flags."""
    if not serving:
        return []
    parts = " + ".join(f"{name} {size(count)}" for name, count in serving["bytes"].items())
    load = f"{serving['batch']} x {serving['context']} tokens, {serving['cache_type']} cache"
    return [f"memory at {load}: {parts} = {size(serving['total'])}", f"run with: {serving['flags']}"]


def _alone(cache: Facts | None) -> list[str]:
    """What one cache type for all layers would have cost in the same memory."""
    if not cache or not cache.get("alone"):
        return []
    found = ", ".join(f"{name} {number(loss)}" for name, loss in cache["alone"].items())
    return [f"in this memory with one cache type for all layers: {found} nats/token"]


def _more(more: Facts | None, kl: Facts) -> list[str]:
    """What some more bytes would buy."""
    if not more:
        return []
    return [
        f"{size(more['bytes'])} more would bring the predicted KL from {number(kl['predicted'])} to {number(more['predicted'])}"
    ]


def preflight(found: Facts) -> Group:
    """What a run will take."""
    table = Table("what it takes", "", title="nothing was written", title_justify="left")
    table.add_row("time", f"{found['seconds']:.0f} s")
    table.add_row("memory", size(found["memory"]))
    table.add_row("memory of a GPU", "none")
    table.add_row("disk, at most", size(found["disk"]))
    table.add_row("bytes of the weight files", size(found["bytes"]) + ratio(found["source_bytes"], found["bytes"]))
    lines = [f"measured on {found['basis']}", *([found["said"]] if found["said"] else []), *found["short"]]
    return Group(table, *lines)


def several(found: Sequence[Facts]) -> Group:
    """Plans for several sizes, one a row."""
    table = Table("plan", "tensors", "bits in blocks", "KL, nats/token", "uniform", title="plans", title_justify="left")
    for row in found:
        kl = span(row["kl"]["predicted"], row["kl"]["predicted_low"], row["kl"]["predicted_high"])
        flat = f"{number(row['uniform']['predicted'])} ({row['uniform']['level'] or 'keep'})"
        table.add_row(row["plan"], size(row["nbytes"]), number(row["bits"]), kl, flat)
    return Group(table)


def frontier(found: Facts) -> Group:
    """Every size with its predicted loss, and the uniform plan that fits in it."""
    title = f"{found['profile']} ({size(found['profile_bytes'])}): {found['method']} for {found['engine']}"
    table = Table(
        "bits in blocks", "tensors", "KL, nats/token", "uniform fits", "its KL", "ratio", title=title, title_justify="left"
    )
    for point in found["points"]:
        flat = point["uniform"]
        kl = span(point["predicted"], point["predicted_low"], point["predicted_high"])
        share = number(point["predicted"] / flat["predicted"]) if flat["predicted"] else UNKNOWN
        level = flat["level"] or f"{flat['levels']} levels"
        row = (
            f"{point['bits']:.3f}",
            size(point["bytes"]),
            kl,
            f"{level}, {flat['bits']:.3f} bits",
            number(flat["predicted"]),
            share,
        )
        table.add_row(*row)
    low, high = found["achievable_bits"]
    return Group(table, f"achievable: {low:.3f} to {high:.3f} bits; the source has {size(found['source_bytes'])}")


def speeds(found: Facts) -> Group:
    """Measured times of one token's products."""
    table = Table("level", "out x in", "microseconds", title=found["machine"], title_justify="left")
    for row in found["rows"]:
        table.add_row(row["level"], f"{row['shape'][0]} x {row['shape'][1]}", f"{1e6 * row['seconds']:.1f}")
    return Group(table)


def profiled(found: Facts) -> Group:
    """The end of `profile`."""
    how = f", chosen by {found['select']}" if found.get("select") else ""
    return Group(
        f"{found['profile']}: {found['family']}, {found['tokens']} tokens of {found['source']}{how}", *_texts(found["target"])
    )


def _texts(found: Facts | None) -> list[str]:
    """What comparing two texts said."""
    if found is None:
        return []
    if found["warning"]:
        return [f"warning: {found['warning']}"]
    return [f"what matters on {found['text']} matters in the calibration text (extra loss {found['extra_loss']:.1%})"]


def methods(rows: Sequence[Facts]) -> Table:
    """The methods, one a row."""
    table = Table("name", "verb", "needs", "formats", "paper")
    for row in rows:
        table.add_row(
            row["name"],
            row["verb"],
            ", ".join(row["needs"]) or UNKNOWN,
            ", ".join(row.get("formats", ())) or UNKNOWN,
            row["paper"],
        )
    return table


def transformed(found: Facts) -> Group:
    """The end of `transform`."""
    lines = [f"{step['name']}: {note}" for step in found["steps"] for note in step["notes"] or ("done",)]
    return Group(f"{found['out']}: {size(found['source_bytes'])} -> {size(found['bytes'])}", *lines)


def facts(found: Facts) -> Group:
    """Plain pairs."""
    return Group(*(f"{name}: {size(value) if name == 'bytes' else value}" for name, value in found.items()))


def span(value: float | None, low: float | None, high: float | None) -> str:
    """A number with its interval."""
    if value is None:
        return UNKNOWN
    return number(value) + (f" ({number(low)} to {number(high)})" if low is not None else "")


def number(value: float | None) -> str:
    """Three significant digits, without an exponent where that can be read."""
    if value is None:
        return UNKNOWN
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def size(count: int | None) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    if count is None:
        return UNKNOWN
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def ratio(before: int | None, after: int) -> str:
    """How many times smaller."""
    return f" ({before / after:.2f} times smaller)" if before and after else ""


def _counts(ledger: Facts) -> str:
    words = ", ".join(f"{ledger[key]} {key.replace('_', ' ')}" for key in ("planned", "done", "fell_back", "copied", "dropped"))
    return f"tensors: {words}"


def _by(rows: Iterable[Facts], key: str) -> dict[str, list[Facts]]:
    groups: dict[str, list[Facts]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _value(measured: Any) -> float:
    return float(measured["measured"] if isinstance(measured, Mapping) else measured)
