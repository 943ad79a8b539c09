"""How fast the explorer follows a drag, and how heavy the report is.

python benchmarks/explore.py [--groups 10000] [--blocks 100]

The profile is that of --model with its blocks repeated, prices scattered, until it has so many matrices, each a group of
its own and, unless --experts is given, a cell of the map. A plan answer is one request over HTTP to a server in another
process. A drag is a real mouse event in Chromium, one each time the figures of the one before were painted; it ends with
the frame that shows them, plot and map included. The report is that of a result of --model with its blocks repeated.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
from _harness import arguments, machine, table, work_folder, write

import assay
from assay.measure.profile import Profile
from assay.model.files import save_note
from assay.report.page.facts import Facts, read
from assay.report.page.render import page

BOUND_MS, BOUND_BYTES = 100, 5_000_000
ANSWERS, MOVES, LOADS = 200, 120, 7
PAINTED = """
const bits = document.getElementById("f-bits");
window.taken = [];
let since = null;
document.addEventListener("input", (event) => { since = event.timeStamp; }, true);
new MutationObserver(() => {
  const from = since;
  // once in the frame after the change, once more behind it: then the change is on the screen
  requestAnimationFrame(() => setTimeout(() => { if (from !== null) taken.push(performance.now() - from); }));
}).observe(bits, { childList: true, characterData: true, subtree: true });
"""


def enlarged(profile: Profile, groups: int, experts: bool, folder: Path) -> Path:
    """A profile with at least `groups` matrices in blocks, made of those of another one."""
    chance, index = np.random.default_rng(0), dict(profile.index)
    inside = [row for row in index["rows"] if row["block"] is not None]
    rows, prices, names = ([r for r in index["rows"] if r["block"] is None], dict(index["prices"]), dict(index["names"]))
    cells = 7 * 48 if experts else groups
    for i in range(-(-groups // len(inside)) * len(inside)):
        row = inside[i % len(inside)]
        block = i // 7 % (cells // 7) if experts else i // 7
        name = f"model.layers.{block}.{i}.{row['role']}"
        rows.append(row | {"name": name, "block": block})
        scale = 10 ** chance.uniform(-2, 2)
        prices[name] = {level: {k: v * scale for k, v in of.items()} for level, of in index["prices"][row["name"]].items()}
        names[name] = row["stored_bytes"]
    gone = {row["name"] for row in inside}
    index |= {
        "rows": rows,
        "prices": {n: p for n, p in prices.items() if n not in gone},
        "names": {n: b for n, b in names.items() if n not in gone},
    }
    index |= {"file_bytes": sum(index["names"].values()), "parameters": sum(r["shape"][0] * r["shape"][1] for r in rows)}
    folder.mkdir()
    save_note(folder / "profile.json", index)
    return folder


def deep(facts: Facts, blocks: int) -> Facts:
    """The facts of a result with its blocks repeated."""
    own = 1 + max(row.block for row in facts.rows if row.block is not None)

    def renamed(name: str, block: int) -> str:
        return ".".join(str(block) if part.isdecimal() else part for part in name.split("."))

    rows = [r for r in facts.rows if r.block is None]
    ledger = [e for e in facts.ledger if not any(p.isdecimal() for p in e.tensor.split("."))]
    for block in range(blocks):
        rows += [dataclasses.replace(r, block=block, site=renamed(r.site, block)) for r in facts.rows if r.block == block % own]
        ledger += [
            dataclasses.replace(e, tensor=renamed(e.tensor, block)) for e in facts.ledger if f".{block % own}." in e.tensor
        ]
    return dataclasses.replace(facts, rows=rows, ledger=ledger)


def answers(address: str) -> tuple[list[float], list[float]]:
    """Milliseconds of plans at budgets that differ, and of the setting behind a pin that is new each time."""

    def ask(name: str, state: dict[str, Any]) -> float:
        started = time.perf_counter()
        with urlopen(f"{address}{name}?{urlencode({'state': json.dumps(state)})}") as answer:
            answer.read()
        return 1000 * (time.perf_counter() - started)

    start = {"engine": "transformers", "context": 2048}
    ask("plan", start | {"bits": 4.25})
    budgets = np.random.default_rng(1).uniform(2.5, 8, ANSWERS)
    plans = [ask("plan", start | {"bits": round(float(b), 2)}) for b in budgets]
    pins = [ask("setting", start | {"bits": 4.25, "pins": [[str(i), "attn.q", "int4-g64-asym"]]}) for i in range(20)]
    return plans, pins


def chromium() -> Any:
    """A headless browser."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,900"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def drag(address: str) -> tuple[list[float], float]:
    """Milliseconds from each mouse event to the frame with its figures, and seconds until the page was ready."""
    browser, started = chromium(), time.perf_counter()
    try:
        browser.get(address)
        until(lambda: browser.execute_script("return document.body.dataset.ready") == "yes")
        ready = time.perf_counter() - started
        browser.execute_script(PAINTED)
        at = browser.execute_script(
            "const r = document.getElementById('slide').getBoundingClientRect(); return [r.x, r.y, r.width, r.height]"
        )

        def mouse(kind: str, share: float) -> None:
            event = {
                "type": kind,
                "x": at[0] + share * at[2],
                "y": at[1] + at[3] / 2,
                "button": "left",
                "buttons": 1,
                "clickCount": 1,
            }
            browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)

        mouse("mousePressed", 0.1)
        for i in range(MOVES):
            count = browser.execute_script("return taken.length")
            mouse("mouseMoved", 0.1 + 0.4 * (i + 1) / MOVES)
            until(lambda count=count: browser.execute_script("return taken.length") > count)
        mouse("mouseReleased", 0.5)
        return browser.execute_script("return taken")[-MOVES:], ready
    finally:
        browser.quit()


def paint(path: Path) -> list[float]:
    """Milliseconds to the first contentful paint of a page, several times."""
    browser, script = chromium(), "return performance.getEntriesByName('first-contentful-paint').map((e) => e.startTime)[0]"
    try:
        found = []
        for _ in range(LOADS):
            browser.get("about:blank")
            browser.get(path.as_uri())
            until(lambda: browser.execute_script(script) is not None)
            found.append(float(browser.execute_script(script)))
        return found
    finally:
        browser.quit()


def until(condition: Any, seconds: float = 120) -> None:
    """Wait for a condition."""
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            raise TimeoutError
        time.sleep(0.005)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--groups", type=int, default=10_000)
    parser.add_argument("--blocks", type=int, default=100)
    parser.add_argument("--experts", action="store_true", help="48 blocks with many matrices in a cell, as of experts")
    options = parser.parse_args()
    folder = work_folder(options.out)
    work = folder / f"explore-{os.getpid()}"
    work.mkdir()
    try:
        small = assay.profile(options.model, work / "small", tokens=4096)
        large = enlarged(small, options.groups, options.experts, work / "large")
        command = [sys.executable, "-m", "assay", "explore", str(large)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
            assert server.stderr is not None
            address = server.stderr.readline().strip()
            plans, pins = answers(address)
            drags, ready = drag(address)
            server.terminate()
        assay.compress(options.model, work / "out", bits=4.25, profile=small.folder)
        html = page(deep(read(work / "out"), options.blocks))
        (work / "report.html").write_text(html)
        paints = paint(work / "report.html")
    finally:
        shutil.rmtree(work)
    rows = [
        ("one plan, server", *spread(plans), f"{BOUND_MS} ms"),
        ("drag, event to painted figures", *spread(drags), f"{BOUND_MS} ms"),
        ("new pin: menu, frontier and all", *spread(pins), "-"), ("page ready", "-", f"{1000 * ready:.0f} ms", "-", "-"),
        (f"report of {options.blocks} blocks, first paint", *spread(paints), "-"),
        (f"report of {options.blocks} blocks, bytes", "-", f"{len(html.encode()):,}", "-", f"{BOUND_BYTES:,}"),
    ]  # fmt: skip
    text = f"{machine(options.threads)}; {options.groups} groups\n\n" + table(["what", "least", "median", "95%", "bound"], rows)
    figures = {"plans": plans, "pins": pins, "drags": drags, "ready": ready, "paints": paints, "bytes": len(html.encode())}
    write(folder, "explore", text, figures)


def spread(values: list[float]) -> tuple[str, str, str]:
    """Least, median and 95th percentile of milliseconds."""
    return f"{min(values):.0f} ms", f"{np.median(values):.0f} ms", f"{np.percentile(values, 95):.0f} ms"


if __name__ == "__main__":
    main()
