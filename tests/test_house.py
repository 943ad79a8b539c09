"""The house rules that a reader can't see from one file: directions, sizes, words, and no traces of a machine."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import assay

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "assay"
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST = 400
FLOORS = {
    "model": 0, "builtin": 0,
    "measure": 1, "engines": 1, "runtime": 1,
    "methods": 2, "prove": 2,
    "budget": 3,
    "execute": 4, "profiling": 4, "transforming": 4, "attaching": 4, "caching": 4, "prompted": 4, "reranking": 4,
    "relu_tuning": 4, "report": 4, "calibrated": 4,
    "handover": 5, "polish": 5, "evolving": 5, "exporting": 5, "preflight": 5, "cache_pricing": 5, "cached": 5, "contest": 5,
    "explore": 5,
    "run": 6, "": 6,
    "cli": 7, "__main__": 8,
}  # fmt: skip
MODULES = {".".join(("assay", *f.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): f for f in FILES}


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def imported(module: str) -> Iterator[str]:
    """Modules of assay that a module imports, at its top or inside a function, but not for type checking only."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    typing_only = {
        id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "assay")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "assay":
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"assay"}))
def test_imports_point_down(module: str) -> None:
    assert room(module) in FLOORS, f"{module} is in a room without a floor; give it one here and in ARCHITECTURE.md"
    for target in imported(module):
        down = FLOORS[room(target)] < FLOORS[room(module)]
        assert down or room(target) == room(module), f"{module} imports {target}, which is not on a floor below"


def test_no_imports_in_a_circle() -> None:
    graph = {module: set(imported(module)) - {module} for module in MODULES if module != "assay"}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module in done:
            return
        for target in graph.get(module, ()):
            visit(target, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_are_short_and_say_what_they_hold(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST, f"longer than {LONGEST} lines; split it"
    tree = ast.parse(text)
    if not tree.body:
        return
    assert ast.get_docstring(tree), "the file doesn't say what it holds"
    bare = [
        node.name for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]  # fmt: skip
    assert not bare, f"no docstring: {', '.join(bare)}"


def tracked_texts() -> Iterator[tuple[Path, str]]:
    """Every text file that is or would be committed."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
        ).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix != ".safetensors" and path.name != "tokenizer.json":
            yield path, path.read_text(encoding="utf-8", errors="replace")


def test_no_paths_of_a_machine_and_no_hosts_of_registries() -> None:
    folders = "|".join(("work", "home", "root", "Users", "opt", "tmp"))
    hosts = "|".join(("py" + "pi", "pytorch", "pythonhosted", "anaconda")) + r")\.(?:org|com|io"
    pattern = re.compile(rf"(?<![\w.}}~$*-])/(?:{folders})/[\w.]+|\b[\w.-]*(?:{hosts})\b")
    found = [f"{path.relative_to(ROOT)}: {m[0]}" for path, text in tracked_texts() for m in pattern.finditer(text)]
    assert not found, "\n".join(found)


def test_the_readme_shows_the_job_itself() -> None:
    source = (SOURCE / "run.py").read_text(encoding="utf-8")
    job = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "job")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert f"{ast.get_source_segment(source, job)}\n" in blocks, "copy `job` from run.py into README.md"


def test_no_public_function_is_named_like_a_room() -> None:
    """Importing anything from a room puts it in the place of the function: `assay.name` would be a module by then."""
    assert set(assay.__all__) & {path.stem for path in SOURCE.iterdir()} == set()


def test_every_command_has_a_page() -> None:
    commands = {p.stem for p in (SOURCE / "cli").glob("*.py") if "@command(" in p.read_text(encoding="utf-8")}
    pages = {p.stem for p in (ROOT / "docs").glob("*.md")}
    assert commands - {"answer"} <= pages
    assert len(commands) >= 7


@pytest.mark.parametrize("made", ["demo-out", ".demo-out.assay", "build", "dist", ".venv"])
def test_what_the_makefile_leaves_behind_is_not_committed(made: str) -> None:
    try:
        done = subprocess.run(["git", "check-ignore", "-q", f"{made}/file"], cwd=ROOT, check=False)
    except OSError:
        pytest.skip("git is absent")
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.returncode == 0


@pytest.mark.parametrize("script", sorted((*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("scripts/*.py"))), ids=lambda p: p.name)
def test_what_scripts_import_of_assay_is_there(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "assay":
            module = importlib.import_module(str(node.module))
            gone = [a.name for a in node.names if not hasattr(module, a.name) and f"{node.module}.{a.name}" not in MODULES]
            assert not gone, f"{script.name}: {node.module} has no {gone[0]}"
