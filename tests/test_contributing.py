"""The worked example of CONTRIBUTING.md works: one file is a method."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from assay import methods
from assay.methods import base, quantize
from assay.model.level import Level

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
NAME = "refit"
MODULE = f"assay.methods.quantize.{NAME}"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The test function of the page, with the page's method beside the shipped ones."""
    method, test = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "quantize").mkdir()
    (tmp_path / "quantize" / f"{NAME}.py").write_text(method, encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.setattr(quantize, "__path__", [*quantize.__path__, str(tmp_path / "quantize")])
    namespace: dict[str, Any] = {}
    exec(compile(test, "CONTRIBUTING.md", "exec"), namespace)
    yield next(value for name, value in namespace.items() if name.startswith("test_"))
    sys.modules.pop(MODULE, None)
    quantize.__dict__.pop(NAME, None)


def test_the_example_is_found_by_its_file_name(example: Any) -> None:
    assert NAME in base.names()
    assert base.get(NAME).__name__ == "Refit"


def test_the_test_on_the_page_passes(example: Any) -> None:
    example()


@pytest.mark.parametrize("name", ["int2-g64-asym", "int4-g32-sym", "int8-channel-sym"])
def test_it_keeps_the_contract_of_methods(example: Any, name: str) -> None:
    level = Level.parse(name)
    weight = torch.randn(3, 8, 128, generator=torch.Generator().manual_seed(1))
    packed = base.get(NAME)().encode(weight, level, torch.bfloat16, base.Statistics())
    assert [p.level for p in packed] == [level] * 3
    assert all(p.decode().shape == (8, 128) and torch.isfinite(p.decode()).all() for p in packed)


def test_without_the_file_there_is_no_such_method() -> None:
    assert NAME not in base.names()
