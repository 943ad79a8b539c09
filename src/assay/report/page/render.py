"""Facts as one HTML page: styles, scripts, plots and data are all inside."""

from __future__ import annotations

import base64
import gzip
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from assay.model.files import save_text
from assay.report.page.facts import Facts, cells, read
from assay.report.tables import number, size, span

Curve = Sequence[Mapping[str, Any]]


def page(facts: Facts) -> str:
    """The whole page. Plots need scripts; everything they show stands in a table as well."""
    blocks, roles, found = cells(facts.rows)
    keys = {key: i for i, key in enumerate(found)}
    state, verdict = _verdict(facts)
    curve: Curve = facts.recipe.get("frontier") or ()
    shown = {
        "cells": list(found.values()),
        "ledger": [[e.tensor, e.planned or "keep", e.fate, e.reason, e.bytes_before, e.bytes_after] for e in facts.ledger],
        "frontier": _traces(facts, curve) if curve else [],
    }
    return _template("page.html").substitute(
        title=f"{facts.plan.bits:.2f} bits per weight for {escape(facts.plan.engine)}",
        state=state, verdict=escape(verdict), loss=_loss(facts),
        map=_map(blocks, roles, keys, found),
        frontier=_frontier(facts, curve), counts=escape(_counts(facts)), data=_data(facts),
        again=_again(facts), licence=escape(_licence(facts)), style=_asset("page.css"), script=_asset("page.js"),
        facts=json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c"), plotly=_library() if curve else "",
    )  # fmt: skip


def write(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the page about a result, beside it in `assay/report.html` if nothing else is said. Raises InputError."""
    target = Path(path) if path else Path(folder) / "assay" / "report.html"
    save_text(target, page(read(folder)))
    return target


def _verdict(facts: Facts) -> tuple[str, str]:
    """(good, bad or open, the sentence)."""
    saved = f"{size(facts.after)} instead of {size(facts.before)}"
    plan, found = facts.plan, facts.verdict
    if found is None:
        return "open", f"{saved}; {plan.sentence}. Not measured on test text yet."
    kl = found["kl"]
    measured = f"KL {span(kl['measured'], kl['low'], kl['high'])} nats per token on {found['tokens']:,} tokens"
    inside = kl["predicted_low"] <= kl["measured"] <= kl["predicted_high"]
    promise = f"predicted {span(kl['predicted'], kl['predicted_low'], kl['predicted_high'])}"
    kept = "the promise held" if inside else "outside the promised interval"
    bound = "" if found.get("max_loss") is None else f"; the bound of {found['max_loss']} is {_held(found['passed'])}"
    return "good" if found["passed"] else "bad", f"{saved}; {measured}, {promise}: {kept}{bound}."


def _held(passed: bool) -> str:
    return "kept" if passed else "broken"


def _loss(facts: Facts) -> str:
    kl = (facts.verdict or {}).get("kl", {})
    plan = facts.plan
    predicted = span(plan.predicted, plan.predicted_low, plan.predicted_high)
    rows = [["KL to the original, nats per token", predicted, span(kl.get("measured"), kl.get("low"), kl.get("high"))]]
    if facts.verdict:
        perplexity, agreement = facts.verdict["perplexity"], facts.verdict["agreement"]
        rows.append(["perplexity", number(perplexity["original"]) + " before", number(perplexity["compressed"])])
        rows.append(["same top token", "", f"{agreement:.1%}"])
    rows.append(["bytes of all tensors", size(facts.before) + " before", size(facts.after)])
    rows.append(["bits per weight in the blocks", "", number(plan.bits)])
    rows.append(["bits per weight over all", "", number(plan.bits_all)])
    level, flat = plan.uniform["level"] or "keep", number(plan.uniform["predicted"])
    best = f"Uniform {level}, the best single level of this size: predicted {flat}."
    uniform = f"Uniform {level}." if plan.predicted == plan.uniform["predicted"] else best
    polish = facts.recipe.get("polish")
    more = f"<p>Polished: {escape(json.dumps(polish))}</p>" if polish else ""
    return _table(["", "predicted", "measured"], rows) + f"<p>{escape(uniform)}</p>" + more


def _map(
    blocks: Sequence[str], roles: Sequence[str], keys: Mapping[tuple[str, str], int], found: Mapping[tuple[str, str], Any]
) -> str:
    head = "".join(f'<th scope="col">{escape(role)}</th>' for role in roles)
    lines = [f'<table id="map"><thead><tr><th scope="col">block</th>{head}</tr></thead><tbody>']
    for block in blocks:
        line = f'<tr><th scope="row">{escape(block)}</th>'
        for role in roles:
            cell = found.get((block, role))
            if cell is None:
                line += "<td></td>"
                continue
            line += f'<td tabindex="0" data-cell="{keys[block, role]}">{number(cell["bits"])}</td>'
        lines.append(line + "</tr>")
    return "".join(lines) + "</tbody></table>"


def _traces(facts: Facts, curve: Curve) -> list[dict[str, Any]]:
    plan, kl = facts.plan, (facts.verdict or {}).get("kl")
    sizes, high, low = [p["bytes"] for p in curve], plan.predicted_high - plan.predicted, plan.predicted - plan.predicted_low
    traces: list[dict[str, Any]] = [
        {"name": "best mix", "x": sizes, "y": [p["predicted"] for p in curve], "mode": "lines+markers"},
        {"name": "uniform", "x": [p["uniform"]["bytes"] for p in curve], "y": [p["uniform"]["predicted"] for p in curve],
         "mode": "lines+markers"},
        {"name": "this plan", "x": [plan.nbytes_tensors], "y": [plan.predicted], "mode": "markers",
         "error_y": {"type": "data", "array": [high], "arrayminus": [low]}},
    ]  # fmt: skip
    if kl:
        traces.append({"name": "measured", "x": [plan.nbytes_tensors], "y": [kl["measured"]], "mode": "markers"})
    return traces


def _frontier(facts: Facts, curve: Curve) -> str:
    if not curve:
        one = facts.plan.budget.get("level") or facts.plan.planner == "uniform"
        return _section("<p>One level was asked for, so other sizes were not priced; a budget prices them.</p>") if one else ""
    rows = [
        [f"{p['bits']:.2f}", size(p["bytes"]), number(p["predicted"]), size(u["bytes"]), number(u["predicted"])]
        for p, u in ((p, p["uniform"]) for p in curve)
    ]
    table = _table(["bits", "bytes", "best mix, KL", "uniform, bytes", "uniform, KL"], rows)
    more, now = facts.plan.more, number(facts.plan.predicted)
    buys = (
        f"<p>{size(more['bytes'])} more would take the predicted KL from {now} to {number(more['predicted'])}.</p>"
        if more
        else ""
    )
    return _section(
        f'<div id="plot" role="img" aria-label="Predicted KL against size; the table below holds the same numbers"></div>{buys}'
        f"<details><summary>As a table</summary>{table}</details>"
    )


def _section(inside: str) -> str:
    return f'<section aria-labelledby="h-frontier"><h2 id="h-frontier">Size and quality</h2>{inside}</section>'


def _counts(facts: Facts) -> str:
    fates = Counter(e.fate for e in facts.ledger)
    planned = sum(e.planned is not None for e in facts.ledger)
    said = ", ".join(f"{n} {fate.replace('_', ' ')}" for fate, n in sorted(fates.items()))
    return f"{len(facts.ledger)} tensors: {planned} planned; {said}."


def _data(facts: Facts) -> str:
    calibration, found = facts.recipe["calibration"], facts.verdict
    judged = f"{found['tokens']:,} tokens of {found['text']}" if found else "not yet; run assay verify"
    return _list({
        "calibrated on": f"{calibration['tokens']:,} tokens of {calibration['source']}, in windows of {calibration['window']}",
        "judged on": judged,
    })  # fmt: skip


def _again(facts: Facts) -> str:
    recipe, calibration = facts.recipe, facts.recipe["calibration"]
    file, _, split = calibration["source"].rpartition(":")
    text = f" --calibration {file}" if file != "builtin" and split in ("calibration", "evaluation") else ""
    lines = [
        f"assay profile MODEL -o PROFILE{text} --tokens {calibration['tokens']} --window {calibration['window']}"
        f" --method {recipe['method']}",
        "assay compress MODEL --profile PROFILE --plan RESULT/assay/plan.yaml -o OUT",
        "assay verify OUT --against MODEL",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in recipe["versions"].items())
    return f"<pre>{escape(chr(10).join(lines))}</pre>" + _list({
        "model": recipe["model"], "calibration text": calibration["digest"], "seed": str(recipe["seed"]),
        "engine": recipe["engine"], "method": recipe["method"], "versions": versions,
    })  # fmt: skip


def _licence(facts: Facts) -> str:
    if facts.licence:
        return f"The licence of the original applies to this copy too; it is in {facts.licence}, beside the weights."
    return "The licence of the original applies to this copy too. The folder of the original held no licence file."


def _list(entries: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items()) + "</dl>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _template(name: str) -> Template:
    return Template(_asset(name))


@cache
def _library() -> str:
    """plotly.js, compressed: browsers unpack it themselves, and the page stays under two megabytes."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 6, mtime=0)).decode()
