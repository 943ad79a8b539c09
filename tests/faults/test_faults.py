"""What happens to a step, whatever happens: the same result in the end, or a word on what to remove.

`benchmarks/faults.py` runs the same trials at many random moments.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from assay.model import sums
from assay.model.errors import InputError
from assay.model.lock import alone, made_alone
from faults.trials import MOUNTS, can_mount

TRIALS = [
    ("SIGKILL", "solve"), ("SIGINT", "profile"), ("SIGTERM", "solve"), ("SIGTERM", "export"), ("disk full", "export"),
    ("file too large", "profile"), ("read-only folder", "export"), ("shard changes", "export"),
    ("bit of unfinished work", "profile"), ("bit of an input", "export"), ("two at once", "profile"),
    ("two at once", "export"), ("clock", "profile"), ("little memory", "export"), ("worker dies", "solve"),
]  # fmt: skip
Try = Callable[[str, str, int], str]


@pytest.fixture(scope="module")
def attempt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Try]:
    folder = tmp_path_factory.mktemp("faults")
    paths = os.pathsep.join(sys.path)
    settings = os.environ | {
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "faults.trials", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL, env=settings,
    )  # fmt: skip

    def ask(kind: str, step: str, number: int) -> str:
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(f"{kind}\t{step}\t{number}\n")
        server.stdin.flush()
        return server.stdout.readline().strip()

    yield ask
    server.communicate()


@pytest.mark.parametrize(("kind", "step"), TRIALS)
def test_nothing_is_lost(attempt: Try, kind: str, step: str, tmp_path: Path) -> None:
    if kind in MOUNTS and not can_mount(tmp_path):
        pytest.skip("this machine lets no one mount")
    assert attempt(kind, step, 0).startswith("ok ")


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    with alone(tmp_path / "work") as fresh:
        assert fresh
        with pytest.raises(InputError, match="another assay is at work there"), alone(tmp_path / "work"):
            pass
        (tmp_path / "work" / "block").write_text("")
    with alone(tmp_path / "work") as fresh:
        assert not fresh
    assert (tmp_path / "work" / "block").exists()
    with pytest.raises(InputError, match="exists and is a file"), alone(tmp_path / "work" / "block"):
        pass


def test_a_folder_that_was_only_held_goes_again(tmp_path: Path) -> None:
    with alone(tmp_path / "a" / "work"):
        pass
    assert not (tmp_path / "a" / "work").exists()


def test_what_a_dead_process_held_is_free_and_what_it_left_goes(tmp_path: Path) -> None:
    stale = tmp_path / ".out.partial"
    (stale / "assay").mkdir(parents=True)
    (stale / "assay" / "plan.yaml").write_text("half")
    held = os.open(stale, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another assay"), made_alone(stale):
        pass
    assert (stale / "assay" / "plan.yaml").exists()
    os.close(held)
    with made_alone(stale):
        assert not list(stale.iterdir())


def test_threads_that_race_for_a_folder_never_hold_it_together(tmp_path: Path) -> None:
    inside, most, told = [0], [0], [0]

    def work() -> None:
        for _ in range(200):
            try:
                with alone(tmp_path / "work"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
            except InputError:
                told[0] += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and told[0] < 800


@pytest.mark.parametrize("change", ["weights", "notes", "gone", "more weights", "the sums"])
def test_a_result_that_changed_is_refused(tmp_path: Path, change: str) -> None:
    (tmp_path / "assay").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "assay" / "ledger.json").write_text("[]")
    sums.check(tmp_path)
    sums.write(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "assay" / "verdict.json").write_text("{}")
    sums.check(tmp_path)
    done = subprocess.run(["sha256sum", "--check", "--quiet", sums.SUMS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    match change:
        case "weights":
            (tmp_path / "model.safetensors").write_bytes(b"weighty")
        case "notes":
            (tmp_path / "assay" / "ledger.json").write_text("{}")
        case "gone":
            (tmp_path / "assay" / "ledger.json").unlink()
        case "more weights":
            (tmp_path / "other.safetensors").write_bytes(b"")
        case _:
            (tmp_path / sums.SUMS).write_text((tmp_path / sums.SUMS).read_text().replace("a", "b"))
    with pytest.raises(InputError, match="not as it was written"):
        sums.check(tmp_path)
    if change in ("weights", "more weights"):
        sums.check(tmp_path, notes_only=True)
