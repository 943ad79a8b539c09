"""Generated pages are those that their scripts make today."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import assay
from assay.model.level import Level

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_table", ROOT / "scripts" / "methods_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_methods_is_up_to_date(script: ModuleType) -> None:
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.page(text) == text, "run: PYTHONPATH=src python scripts/methods_table.py"


def test_every_method_has_a_line_and_a_test_that_names_it(script: ModuleType) -> None:
    lines = {line.split("`")[1]: line for line in script.table().splitlines() if line.startswith("| `")}
    assert list(lines) == [m["name"] for m in assay.list_methods()]
    for name, line in lines.items():
        test = ROOT / line.split("`")[-2]
        assert test.name == f"test_{name}.py" or f'"{name}"' in test.read_text(encoding="utf-8"), f"no test names {name}"


def test_a_stale_table_is_noticed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = assay.list_methods()[1:]
    monkeypatch.setattr(assay, "list_methods", lambda: fewer)
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.page(text) != text


def test_levels_are_summed_up(script: ModuleType) -> None:
    levels = ["int4-g64-asym", "int3-channel-sym", "nf4-g64"]
    assert script.summary([Level.parse(x) for x in levels]) == "int 3, 4 bits; nf 4 bits; groups: 64, row"
    levels = ["lut3-channel", "lut3-channel+sparse0.005"]
    assert script.summary([Level.parse(x) for x in levels]) == "lut 3 bits; groups: row; with 0.50% exact or nothing"
