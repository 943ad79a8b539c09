"""Every command and snippet of the documentation runs, prints what it shows, and names options that exist."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import typer
from snippets import DATA, ROOT, RUN, Snippet, absent, masked, pages, run, snippets, synopses

import assay.budget.agreement
import assay.profiling
import assay.run
from assay.cli.main import app
from assay.engines.serving import SERVERS

FIRST = "tutorial"
PROGRAM = typer.main.get_command(app)
COMMANDS = PROGRAM.commands  # type: ignore[attr-defined]
ALIASES = {"convert": "export"}
FEW = 512
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


def options(command: str) -> set[str]:
    """Long options of a command."""
    return {o for p in COMMANDS[command].params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")} - {"--help"}


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens where a page leaves their number to the default; sandboxes may forbid the AMX that llama.cpp finds."""
    for module in (assay.run, assay.profiling):
        monkeypatch.setattr(module, "TOKENS", 2 * FEW)
    monkeypatch.setattr(assay.profiling, "PROBE_TOKENS", FEW)
    monkeypatch.setattr(assay.run, "JUDGE_TOKENS", 2 * FEW)
    monkeypatch.setattr(assay.budget.agreement, "TOKENS", FEW)
    if importlib.util.find_spec("llama_cpp"):
        import llama_cpp

        defaults = llama_cpp.llama_model_default_params

        def plain() -> object:
            given = defaults()
            given.use_extra_bufts = False
            return given

        monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", plain)
        monkeypatch.setattr(llama_cpp, "llama_model_default_params", plain)


@pytest.mark.slow
def test_every_snippet_runs(
    cheap: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tutorial starts in an empty folder; every other page goes on in the one that it leaves."""
    wrong, ran, left = [], 0, 0
    for page in pages():
        folder = tmp_path / page.stem
        if page.stem == FIRST:
            folder.mkdir()
        else:
            shutil.copytree(tmp_path / FIRST, folder)
        monkeypatch.chdir(folder)
        names: dict[str, object] = {}
        for snippet in snippets(page):
            if snippet.language in DATA:
                continue
            ran, left = ran + snippet.count * (not snippet.left), left + snippet.count * snippet.left
            if snippet.runs and (problem := run(snippet, names)) is not None:
                wrong.append(problem)
                break
    with capsys.disabled():
        print(f"\nsnippets of the documentation: {ran} executed, {left} left out with a reason")
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("page", pages(), ids=lambda p: p.stem)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    for snippet in snippets(page):
        assert snippet.language in RUN + DATA, f"{snippet.place}: neither console, python nor data"
        if snippet.language == "console":
            assert snippet.steps, f"{snippet.place}: no command"
        if snippet.runner is not None:
            text = (ROOT / snippet.runner).read_text(encoding="utf-8")
            assert page.name in text, f"{snippet.place}: {snippet.runner} does not read this page"
    for block in synopses(page):
        assert block.startswith("assay "), f"{page.name}: an indented block that is no synopsis of a command:\n{block}"


@pytest.mark.parametrize("page", pages(), ids=lambda p: p.stem)
def test_options_on_a_page_exist(page: Path) -> None:
    """In a command's line those of that command, in a page's text those of any or of an engine's server."""
    for line in commands(page):
        name = line.split()[1]
        assert name in COMMANDS, f"{page.name}: no such command: {line}"
        assert (unknown := set(OPTION.findall(line)) - options(name)) == set(), f"{page.name}: {unknown} in {line}"
    everything = set().union(*(options(name) for name in COMMANDS), *(p.opts for p in PROGRAM.params))
    everything |= {flag for server in SERVERS.values() for flag in OPTION.findall(server.flags)}
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"^(?:run with:|\$ (?!assay )|│).*", "", text, flags=re.MULTILINE)
    assert set(OPTION.findall(text)) - everything == set()


def commands(page: Path) -> list[str]:
    """Whole lines of assay on a page: of synopses, with their continuations, and of console blocks."""
    found = [re.sub(r"\n +", " ", block) for block in synopses(page)]
    lines = [line.split("  #")[0] for block in found for line in block.splitlines()]
    typed = [step for s in snippets(page) if s.language == "console" for step, _ in s.steps]
    return [line for line in lines + typed if line.startswith("assay ") and not line.startswith("assay --")]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_is_on_the_page_of_its_command(name: str) -> None:
    text = (ROOT / "docs" / f"{ALIASES.get(name, name)}.md").read_text(encoding="utf-8")
    assert options(name) - set(OPTION.findall(text)) == set()


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - set(ALIASES)))
def test_every_page_of_a_command_has_an_example(name: str) -> None:
    page = ROOT / "docs" / f"{name}.md"
    typed = [step for s in snippets(page) if s.language == "console" for step, _ in s.steps]
    assert any(step.startswith(f"assay {name}") for step in typed)


def test_output_is_compared_but_for_numbers_units_and_frames() -> None:
    printed = "┃ KL │ 0.05 (0.04 to 0.06) │\n12 s, peak memory 736.66 MB\nsmall: 8.4e-05"
    assert absent(["│ KL ┃ 1.5 (1 to 2) │", "...", "3 s, peak memory 1.2 GB"], printed) is None
    assert absent(["12 s, peak disk 736.66 MB"], printed) is not None
    assert absent(["12 s, peak memory 1 MB", "│ KL │ 0.05 (0.04 to 0.06) │"], printed) is not None, "in this order only"
    assert absent(["12 s, peak ..."], printed) is None
    assert absent(["13 s, peek ..."], printed) is not None
    assert masked("predicted -1.2e-05 nats") == "predicted # nats"


def test_a_wrong_snippet_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def of(language: str, text: str) -> str | None:
        return run(Snippet(ROOT / "README.md", 1, language, text), {})

    assert of("console", "$ assay methods --nonsense\n") is not None
    assert of("console", "$ assay methods --nonsense\nassay: No such option\n...\n$ echo $?\n2\n") is not None
    assert of("console", "$ assay methods --nonsense\n$ echo $?\n2\n") is None
    assert of("console", "$ assay methods\nno such line\n") is not None
    assert of("python", "import assay\nassay.nothing\n") is not None
    assert of("python", "import assay\n") is None
