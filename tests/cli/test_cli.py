"""The command line: help, typos, exit codes, one line per failure, one JSON document per `--json`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from cli.calls import call, one_line

import assay
from assay.cli import answer
from assay.cli.main import main
from assay.model.errors import InputError, ShortfallError

COMMANDS = ("inspect", "transform", "profile", "plan", "compress", "verify", "export", "methods", "explore")
SOURCE = Path(assay.__file__).parents[1]


def run_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "assay", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(capfd: pytest.CaptureFixture[str], command: str) -> None:
    code, out, err = call(capfd, command, "--help")
    assert code == 0
    assert command in out
    assert err == ""


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_program_lists_its_commands(capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    code, out, err = call(capfd, *arguments)
    assert (code, err) == (0, "")
    assert all(command in out for command in COMMANDS)


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert call(capfd, "--version") == (0, f"assay {assay.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compres", "m"), "did you mean compress?"),
        (("verfy",), "did you mean verify?"),
        (("frobnicate",), "see assay --help"),
        (("compress", "m", "--bit", "3"), "did you mean --bits?"),
        (("compress", "m", "--max_loss", "3"), "did you mean --max-loss?"),
        (("compress", "m", "--claibration", "x"), "did you mean --calibration?"),
        (("verify", "m", "--agianst", "x"), "did you mean --against?"),
        (("plan", "p", "--zzz"), "see assay plan --help"),
        (("--versoin",), "did you mean --version?"),
        (("inspect",), "Missing argument"),
        (("inspect", "a", "b"), "unexpected extra argument"),
        (("compress", "m"), "Missing option"),
        (("transform", "m", "-o", "x"), "Missing option"),
        (("compress", "m", "-o", "x", "--bits", "many"), "--bits"),
        (("compress", "m", "-o", "x", "--bits"), "requires an argument"),
        (("compress", "m", "-o", "x"), "give --plan or one budget"),
        (("compress", "m", "-o", "x", "--bits", "3", "--size", "1GB"), "--size and --bits"),
        (("compress", "m", "-o", "x", "--bits", "3", "--plan", "p"), "exclude each other"),
        (("compress", "m", "-o", "x", "--bits", "3", "--tokens", "some"), "--tokens some"),
        (("compress", "m", "-o", "x", "--bits", "3", "--tokens", "0"), "above zero"),
        (("compress", "m", "-o", "x", "--bits", "3", "--threads", "0"), "--threads"),
    ],
)
def test_wrong_usage_is_one_line_with_a_way_out(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capfd, *arguments)
    assert (code, out) == (2, "")
    assert words in one_line(err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "absent/folder/here"), "absent/folder/here"),
        (("inspect", "{here}"), "not a model folder"),
        (("profile", "{here}", "-o", "p"), "not a model folder"),
        (("plan", "absent", "--bits", "3", "-o", "plan"), "absent"),
        (("plan", "absent", "--bits", "3", "-o", "{here}"), "exists"),
        (("plan", "absent", "--bits", "3", "-o", "no/such/plan"), "does not exist"),
        (("compress", "{here}", "--bits", "3", "-o", "out"), "not a model folder"),
        (("compress", "builtin", "--bits", "3", "-o", "{here}"), "exists"),
        (("compress", "builtin", "--bits", "3", "-o", "no/such/out"), "does not exist"),
        (("compress", "builtin", "--size", "3 bananas", "-o", "out"), "bananas"),
        (("compress", "builtin", "--bits", "-1", "-o", "out"), "above zero"),
        (("compress", "builtin", "--bits", "3", "--method", "gtpq", "-o", "out"), "did you mean gptq?"),
        (("compress", "builtin", "--bits", "3", "--engine", "vlm", "-o", "out"), "did you mean vllm?"),
        (("compress", "builtin", "--bits", "3", "--calibration", "absent.txt", "-o", "out"), "absent.txt"),
        (("compress", "builtin", "--plan", "absent.yaml", "-o", "out"), "absent.yaml"),
        (("verify", "absent/folder/here", "--against", "builtin"), "absent/folder/here"),
        (("transform", "builtin", "--with", "rotat", "-o", "out"), "did you mean rotate?"),
        (("transform", "builtin", "--with", "awq", "-o", "out"), "give a profile of this model"),
        (("transform", "builtin", "--with", "rotate", "-o", "{here}"), "exists"),
        (("transform", "{here}", "--with", "rotate", "-o", "out"), "not a model folder"),
        (("export", "absent/folder/here", "--to", "plain", "-o", "out"), "absent/folder/here"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capfd, *(a.format(here=here) for a in arguments))
    assert (code, out) == (2, "")
    assert words in one_line(err)
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_transform_says_what_it_did(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "turned"
    code, shown, _ = call(capfd, "transform", "builtin", "--with", "rotate", "--with", "rotate_heads", "-o", out, "--seed", "3")
    assert code == 0
    assert "rotate_heads: done" in shown
    code, printed, _ = call(capfd, "transform", out, "--with", "norm_fold", "-o", tmp_path / "folded", "--json")
    assert (code, [s["name"] for s in json.loads(printed)["steps"]]) == (0, ["norm_fold"])


def test_methods_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capfd, "methods", "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert {"gptq", "nearest", "two_sided"} <= {row["name"] for row in rows}
    assert all({"name", "verb", "paper", "needs"} <= row.keys() for row in rows)


def test_methods_and_inspect_as_tables(capfd: pytest.CaptureFixture[str]) -> None:
    assert "two_sided" in call(capfd, "methods")[1]
    code, out, _ = call(capfd, "inspect", "builtin")
    assert code == 0
    assert "mlp.down" in out
    assert "6 blocks" in out


VERDICT = {
    "bytes": 10, "bits": 3.5, "bits_all": 4.0, "perplexity": {"original": 9.0, "compressed": 9.5},
    "kl": {"measured": 0.2, "low": 0.1, "high": 0.3, "predicted": 0.2, "predicted_low": 0.1, "predicted_high": 0.3},
    "agreement": 0.9, "text": "some", "tokens": 100, "max_loss": 0.1, "passed": False,
}  # fmt: skip


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("passed", [True, False])
def test_a_missed_bound_exits_1_and_still_says_everything(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, passed: bool, as_json: bool
) -> None:
    verdict = VERDICT | {"passed": passed}
    monkeypatch.setattr(assay, "verify", lambda *_, **__: verdict, raising=False)
    code, out, err = call(capfd, "verify", "out", "--against", "m", *(["--json"] if as_json else []))
    assert (code, err) == (0 if passed else 1, "")
    if as_json:
        assert json.loads(out) == verdict
    else:
        assert ("passed" if passed else "missed") in out


def raising(error: BaseException) -> Any:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("wrong\nin two lines"), 2, "wrong in two lines"),
        (ShortfallError("less than asked"), 1, "less than asked"),
        (KeyboardInterrupt(), 130, "the same command continues"),
        (OSError(28, "No space left on device", "out/model.safetensors"), 2, "No space left"),
        (PermissionError(13, "Permission denied", "out"), 2, "Permission denied"),
    ],
)
def test_every_failure_has_its_code_and_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    monkeypatch.setattr(assay, "compress", raising(error), raising=False)
    found, out, err = call(capfd, "compress", "m", "--bits", "3", "-o", "out", "--json")
    assert (found, out) == (code, "")
    assert words in one_line(err)


def test_a_bug_is_not_dressed_up_as_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assay, "inspect", raising(ZeroDivisionError()), raising=False)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "m"])


def test_what_libraries_print_does_not_reach_stdout(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def chatty(*_: object, **__: object) -> list[Any]:
        print("a library says hello")
        return []

    monkeypatch.setattr(assay, "list_methods", chatty, raising=False)
    code, out, err = call(capfd, "methods", "--json")
    assert (code, json.loads(out), err) == (0, [], "a library says hello\n")


def test_numbers_that_json_lacks_are_null(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assay, "list_methods", lambda: [{"a": float("nan"), "b": [float("inf"), 1.5]}], raising=False)
    assert json.loads(call(capfd, "methods", "--json")[1]) == [{"a": None, "b": [None, 1.5]}]


def test_help_starts_without_torch() -> None:
    code = "import sys, assay.cli.main; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SOURCE)}, check=True
    )
    assert done.stdout == "[]\n"


def test_as_a_program_the_streams_and_the_code_are_right() -> None:
    done = run_process("inspect", "builtin", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["blocks"] == 6
    wrong = run_process("inspekt")
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", "assay: No such command 'inspekt'; did you mean inspect?\n")


def test_fail_joins_lines(capfd: pytest.CaptureFixture[str]) -> None:
    stop = answer.fail("a\n  b", 2)
    assert isinstance(stop, typer.Exit)
    assert stop.exit_code == 2
    assert capfd.readouterr().err == "assay: a b\n"
