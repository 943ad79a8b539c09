"""docs/chains.md is what its script finds today: a part of it is run again."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("chains", ROOT / "scripts" / "chains.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.quiet()
    yield module
    logging.disable(logging.NOTSET)


def table(script: ModuleType) -> list[tuple[str, ...]]:
    text = script.PAGE.read_text(encoding="utf-8")
    return [tuple(line.strip("| ").split(" | ")) for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize(
    ("family", "engines"), [("llama", ("gptq", "vllm", "awq")), ("gpt2", ("gptq", "assay")), ("qwen3_moe", ("vllm",))]
)
def test_a_part_of_the_page_run_again_says_the_same(
    script: ModuleType, tmp_path: Path, family: str, engines: tuple[str, ...]
) -> None:
    chains = [chain for chain in script.CHAINS if chain.engine in engines][:4]
    found = script.rows([family], chains, tmp_path)
    assert found and set(found) <= set(table(script)), "run: PYTHONPATH=src:tests python scripts/chains.py"


def test_blocks_of_fp8_run_again_say_the_same(script: ModuleType, tmp_path: Path) -> None:
    found = script.rows(["llama"], script.BLOCKS, tmp_path, script.WIDE)
    assert len(found) == 5 and set(found) <= set(table(script)), "run: PYTHONPATH=src:tests python scripts/chains.py"
    assert {row[-1] for row in found} == {"exact", "below 1e-05", "fits"}


def test_the_page_has_every_family_engine_and_reader(script: ModuleType) -> None:
    rows = [row for row in table(script) if len(row) == len(script.HEADER)]
    assert set(script.FAMILIES) <= {row[0] for row in rows}
    pairs = {(row[0], row[1]) for row in rows}
    assert {(f, chain.engine) for f in script.FAMILIES for chain in script.CHAINS} <= pairs
    assert all(row[-1].startswith("refused: ") == (row[4] == "-") for row in rows if row[0] in script.FAMILIES)
    wide = {(row[0], row[1]) for row in rows if row[2] == "tile8-g128"}
    assert wide == {(f, chain.engine) for f in script.WIDE for chain in script.BLOCKS}
    wrong = [row for row in rows if row[4] == script.RULES and row[-1] != "fits"]
    assert not wrong


def test_a_reader_that_differs_stops_the_script(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(script.LIMITS, script.KERNELS, -1.0)
    with pytest.raises(RuntimeError, match=r"assay.load differs by"):
        script.rows(["llama"], [chain for chain in script.CHAINS if chain.engine == "awq"], tmp_path)
