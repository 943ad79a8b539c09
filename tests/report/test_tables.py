"""Tables say every number that the JSON has, whatever is unknown."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from assay.report import tables

REPORT: dict[str, Any] = {
    "out": "small", "bytes": 3_210_000, "bits": 3.49, "bits_all": 4.51, "predicted": 0.0123, "predicted_low": 0.01,
    "predicted_high": 0.0151, "source_bytes": 11_540_000, "seconds": 61.2, "peak_rss_bytes": 900_000_000,
    "ledger": {"planned": 40, "done": 39, "fell_back": 1, "copied": 14, "dropped": 0},
}  # fmt: skip
VERDICT: dict[str, Any] = {
    "bytes": 3_210_000, "bits": None, "bits_all": None, "perplexity": {"original": 9.0, "compressed": 9.5}, "agreement": 0.912,
    "kl": {"measured": 0.013, "low": 0.012, "high": 0.014, "predicted": None, "predicted_low": None, "predicted_high": None},
    "text": "builtin:evaluation", "tokens": 30720, "passed": True, "max_loss": None,
}  # fmt: skip


def shown(view: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(view)
    return stream.getvalue()


def test_the_closing_table_puts_the_promise_beside_the_measurement() -> None:
    text = shown(tables.closing(REPORT, "model", VERDICT))
    row = next(line for line in text.splitlines() if "KL" in line)
    assert "0.0123 (0.01 to 0.0151)" in row
    assert "0.013 (0.012 to 0.014)" in row
    for part in ("11.54 MB", "3.21 MB (3.60 times smaller)", "3.49", "4.51", "9.50", "40 planned, 39 done, 1 fell back"):
        assert part in text


def test_without_a_verdict_the_closing_table_says_how_to_get_one() -> None:
    assert "assay verify small --against org/model" in shown(tables.closing(REPORT, "org/model"))


def test_a_verdict_without_a_prediction() -> None:
    text = shown(tables.verdict(VERDICT))
    assert "91.2%" in text
    assert "no bound" in text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (2_500_000, "2.50 MB"), (7 * 10**9, "7.00 GB")],
)
def test_sizes(count: int | None, text: str) -> None:
    assert tables.size(count) == text


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.0, "0"), (0.01234, "0.0123"), (3.456, "3.46"), (120.0, "120.00")])
def test_numbers(value: float | None, text: str) -> None:
    assert tables.number(value) == text
