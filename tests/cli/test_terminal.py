"""What a person sees in terminals of several widths, and what a pipe gets instead."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from tiny import save, text_file

import assay
from assay.model.progress import remaining

if sys.platform == "win32":
    pytest.skip("pseudo-terminals are a thing of POSIX", allow_module_level=True)

from cli.terminals import lines, run

COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-9]|4[0-9]|9[0-7])(?:;[0-9;]*)?m")


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments of a compression that takes no time."""
    folder = tmp_path_factory.mktemp("terminal")
    model = save("llama", folder / "m")
    measured = assay.profile(model, folder / "p", calibration=text_file(folder), tokens=1024, window=32)
    assay.plan(measured.folder, bits=5.0).save(folder / "plan.yaml")
    return ("compress", str(model), "--profile", str(measured.folder), "--plan", str(folder / "plan.yaml"), "--threads", "1")


@pytest.mark.parametrize("columns", [40, 80])
def test_every_width_shows_bars_a_line_a_block_and_a_table(planned: tuple[str, ...], tmp_path: Path, columns: int) -> None:
    code, shown, _ = run(columns, *planned, "-o", tmp_path / "out")
    seen = lines(shown)
    assert code == 0 and COLOUR.search(shown)
    bars = [line for line in seen if line.startswith("compressing") and "left" in line]
    assert bars and all(len(line) <= columns for line in bars)
    assert any(re.search(r" \d/3 (\d:\d\d:\d\d )?left (\d:\d\d:\d\d|-:--:--)$", line) for line in bars), bars
    assert all(("━" in line) == (columns >= 80) for line in bars)
    told = [line for line in seen if line.startswith("block-")]
    assert [line.partition(":")[0] for line in told] == ["block-0000", "block-0001"]
    bits = r"\d\.\d\d bits \((int\S+|\d levels)\)"
    one = rf"block-\d{{4}}: {bits}, loss \d\.\d{{5}}, [\d,]+ tokens, damping 0\.01, \d+\.\d s, \d+\.\d\d GB"
    assert all(re.fullmatch(one, line) for line in told), told
    table = seen[seen.index(str(tmp_path / "out")) if str(tmp_path / "out") in seen else len(seen) - 25 :]
    assert all(len(line) <= columns for line in table)
    assert "…" not in "".join(table) and "tensors: " in "".join(table)


def test_a_pipe_gets_the_result_and_nothing_else_and_no_colour_where_none_is_wanted(
    planned: tuple[str, ...], tmp_path: Path
) -> None:
    code, shown, out = run(80, *planned, "-o", tmp_path / "out", "--json", piped=True, NO_COLOR="1")
    assert code == 0 and json.loads(out)["out"] == str(tmp_path / "out")
    assert "\x1b" not in out
    assert "block-0001" in shown and not COLOUR.search(shown)


def test_what_is_left_is_told_by_the_pace_of_all_steps() -> None:
    assert remaining(0, 4, 0.0, 9.0) is None
    assert remaining(1, 4, 60.0, 60.0) == 180.0
    assert remaining(1, 4, 60.0, 90.0) == 150.0
    assert remaining(1, 4, 60.0, 500.0) == 120.0
    assert remaining(4, 4, 100.0, 101.0) == 0.0


def test_slow_steps_have_a_time_too() -> None:
    """rich alone forgets steps older than half a minute, and then says nothing."""
    import io

    from rich.console import Console
    from rich.progress import Task

    from assay.cli.progress import _Left

    clock = [0.0]
    task = Task(0, "slow", 10, 4.0, _get_time=lambda: clock[0], fields={"at": 400.0})
    task.start_time, clock[0] = 0.0, 450.0
    stream = io.StringIO()
    Console(file=stream, width=40).print(_Left().render(task))
    assert stream.getvalue() == "left 0:09:10\n"
