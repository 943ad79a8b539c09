"""The notebook runs from top to bottom, and what it holds is small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import assay.run

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tutorial.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_its_outputs_are_small_and_name_no_folder() -> None:
    assert NOTEBOOK.stat().st_size < 50_000
    outputs = json.dumps([cell.get("outputs") for cell in CELLS])
    assert "Traceback" not in outputs
    assert "assay-notebook-" not in outputs


def test_it_shows_all_steps() -> None:
    text = "\n".join(SOURCES)
    steps = ("assay.profile(", "assay.sweep(", "assay.plan(", "assay.compress(", "assay.verify(", "go.Figure(")
    found = [text.index(step) for step in steps]
    assert found == sorted(found)


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells one after another, as a kernel would; the last one is the plot."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, Any] = {}
    for number, source in enumerate(SOURCES):
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
    assert (tmp_path / names["folder"].name / "small" / "assay" / "verdict.json").exists()
    mixed, uniform, measured = names["figure"].data
    assert all(a <= b for a, b in zip(mixed.y, uniform.y, strict=True)), "a mix is predicted no worse than one level that fits"
    assert list(measured.y) == [names["kl"]["measured"]]
    assert assay.run.open_model(names["folder"] / "small").weight_bytes == names["report"]["bytes"]
