"""Bars live on a terminal only, and nest."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import save, text_file

import assay
from assay.cli.progress import Bars, Lines
from assay.model.files import load_tensors, save_tensors


def bars(terminal: bool) -> tuple[Bars, io.StringIO]:
    stream = io.StringIO()
    return Bars(Console(file=stream, force_terminal=terminal, width=100)), stream


def work(listener: Bars) -> None:
    with listener.task("blocks", 2) as advance:
        for _ in range(2):
            with listener.task("matrices", 3) as inner:
                inner()
                inner(2)
            listener.log("one block: [4 bits]")
            advance()


def test_nothing_is_written_where_nobody_looks() -> None:
    listener, stream = bars(terminal=False)
    work(listener)
    assert stream.getvalue() == ""


def test_a_terminal_shows_bars_and_lines_as_they_are() -> None:
    listener, stream = bars(terminal=True)
    work(listener)
    work(listener)
    assert stream.getvalue().count("one block: [4 bits]") == 4
    assert "matrices" in stream.getvalue()


def test_a_failure_inside_a_task_ends_the_bars() -> None:
    listener, _ = bars(terminal=True)
    with pytest.raises(ValueError, match="x"), listener.task("blocks", 2):
        raise ValueError("x")
    work(listener)


def test_a_program_gets_the_figures_of_each_block_and_the_ledger_says_where_damping_rose(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One H gets an eigenvalue below zero, which shrinkage and the usual damping don't mend."""
    model = save("llama", tmp_path / "m")
    assay.profile(model, tmp_path / "p", calibration=text_file(tmp_path), tokens=1024, window=32)
    place, name = tmp_path / "p" / "block-0001.H.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = load_tensors(place)
    key = max((k for k, t in tensors.items() if t.ndim == 2 and t.shape[0] == t.shape[1] == 96), key=len)
    tensors[key] = tensors["n|" + key] * (2 * torch.ones(96, 96) - torch.eye(96))
    save_tensors(place, tensors)
    assay.plan(tmp_path / "p", bits=4.7, method="gptq").save(tmp_path / "plan.yaml")
    capfd.readouterr()
    assay.compress(model, tmp_path / "out", plan=tmp_path / "plan.yaml", profile=tmp_path / "p", progress=Lines())
    told = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"line"' in line]
    blocks = {one["block"]: one for one in told if "block" in one}
    assert blocks[0]["damping"] == 0.01 and 0.95 < blocks[1]["damping"] < 2
    assert f"damping {blocks[1]['damping']:.2g}, " in blocks[1]["line"]
    assert blocks[0]["loss"] > 0 and blocks[0]["seconds"] > 0 and blocks[0]["tokens"] == [1024, 1024]
    reasons = {e["tensor"]: e["reason"] for e in json.loads((tmp_path / "out" / "assay" / "ledger.json").read_text())}
    assert [n for n, why in reasons.items() if "damping" in why] == [name]
    assert reasons[name] == f"gptq; damping {blocks[1]['damping']:.2g}"
