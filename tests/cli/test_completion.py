"""What the shell completes, and that a key that is pressed doesn't wait for torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import assay
from assay import engines
from assay.budget import planners
from assay.cli import completion
from assay.methods import base

SOURCE = Path(assay.__file__).parents[1]


def python(code: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SOURCE)} | environment, check=False
    )
    assert done.stderr == ""
    return done.stdout


def completed(words: str) -> list[str]:
    """What bash would offer behind the words."""
    found = python(
        "from assay.cli.main import main; main()", _ASSAY_COMPLETE="complete_bash", COMP_WORDS=words,
        COMP_CWORD=str(len(words.split(" ")) - 1),
    )  # fmt: skip
    return found.split()


def test_names_are_those_that_the_commands_take() -> None:
    assert completion.methods("") == ["auto", "best", *base.names()]
    assert completion.planners("") == planners.names()
    assert completion.transforms("") == base.names("transform")
    assert completion.engines("") == list(engines.NAMES)


def test_nothing_heavy_is_imported_for_it() -> None:
    code = "from assay.cli import completion as c; c.methods(''), c.planners(''), c.engines(''), c.transforms('')\n"
    code += "import sys; print([m for m in ('torch', 'transformers', 'numpy', 'rich') if m in sys.modules])"
    assert python(code) == "[]\n"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("assay comp", {"compress"}),
        ("assay compress --method two", {"two_sided"}),
        ("assay explore p --engine llama.cpp-", {"llama.cpp-all"}),
        ("assay plan p --planner lag", {"lagrange"}),
        ("assay transform m --with norm", {"norm_fold"}),
    ],
)
def test_bash_is_offered_commands_and_names(words: str, wanted: set[str]) -> None:
    assert set(completed(words)) == wanted


def test_the_script_for_a_shell_is_shown_and_installed(tmp_path: Path) -> None:
    run = "from assay.cli.main import main; main()"
    shown = python(run, "--show-completion", "bash", SHELL="/bin/bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_ASSAY_COMPLETE" in shown
    told = python(
        run, "--install-completion", "bash", HOME=str(tmp_path), _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    )  # fmt: skip
    assert "installed" in told and "_ASSAY_COMPLETE" in (tmp_path / ".bash_completions" / "assay.sh").read_text()
