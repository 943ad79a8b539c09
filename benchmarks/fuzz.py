"""Damaged and hostile inputs for everything that assay parses, many of them: what comes out other than one line for the user?

    python benchmarks/fuzz.py --inputs 100000 --jobs 2

The inputs are numbered; those of one number are the same in every run. The tests run the first ones of each kind
(`tests/fuzz`). What is done is kept in `fuzz.json` beside `fuzz.md`, and a second run goes on from there: with `--inputs 34000`
first for some kinds, more later. The table is in FAULTS.md.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests"), str(Path(__file__).resolve().parents[1] / "benchmarks")]
os.environ["HF_HUB_OFFLINE"] = "1"

from _harness import arguments, table, work_folder  # noqa: E402
from fuzz import subjects  # noqa: E402

from assay.model.errors import AssayError  # noqa: E402

CHUNK = 2000
_ready: dict[str, subjects.Subject] = {}
_valid: dict[str, bytes] = {}


class Outcome(NamedTuple):
    """What came of the inputs from `first` on. slowest: seconds; seconds: of processor time; bugs: how often, and the
    first number, by place."""

    kind: str
    first: int
    read: int
    refused: int
    slowest: float
    seconds: float
    bugs: dict[str, tuple[int, int, str]]


def prepare(folder: str) -> None:
    """Makes this process's own valid inputs."""
    place = Path(folder) / str(os.getpid())
    place.mkdir()
    logging.disable(logging.CRITICAL)
    _ready.update(subjects.prepare(place))
    _valid.update({kind: subject.place.read_bytes() for kind, subject in _ready.items()})
    for kind, subject in _ready.items():
        subject.take(_valid[kind])


def trial(task: tuple[str, int, int]) -> Outcome:
    """The inputs of one kind from one number up to another."""
    kind, first, last = task
    subject, valid = _ready[kind], _valid[kind]
    read, refused, slowest, bugs = 0, 0, 0.0, dict[str, tuple[int, int, str]]()
    start = time.process_time()
    for number in range(first, last):
        begun = time.perf_counter()
        try:
            subject.take(subject.damage(number, valid))
            read += 1
        except AssayError as error:
            refused += 1
            if "\n" in str(error) or not str(error).strip():
                bugs["not one line"] = (bugs.get("not one line", (0, 0, ""))[0] + 1, number, str(error)[:80])
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            where = _where(error)
            bugs[where] = (bugs.get(where, (0, 0, ""))[0] + 1, number, str(error)[:80])
        slowest = max(slowest, time.perf_counter() - begun)
    subject.place.write_bytes(valid)
    return Outcome(kind, first, read, refused, slowest, time.process_time() - start, bugs)


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    last = next((f for f in reversed(frames) if "/assay/" in f.filename), frames[-1])
    return f"{type(error).__name__} at {last.filename.rpartition('/assay/')[2]}:{last.lineno} {(last.line or '')[:60]}"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="of each kind")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="kinds")
    given = parser.parse_args()
    kinds = given.only or list(subjects.KINDS)
    note = work_folder(given.out) / "fuzz.json"
    outcomes = {kind: [] for kind in subjects.KINDS} | _done(note)
    known = {(o.kind, o.first) for found in outcomes.values() for o in found}
    tasks = ((kind, n, min(n + CHUNK, given.inputs)) for n in range(0, given.inputs, CHUNK) for kind in kinds)
    chunks = [task for task in tasks if task[:2] not in known]
    with tempfile.TemporaryDirectory() as folder, get_context("spawn").Pool(given.jobs, prepare, (folder,)) as pool:
        for outcome in pool.imap_unordered(trial, chunks):
            outcomes[outcome.kind].append(outcome)
            for where, (count, number, what) in outcome.bugs.items():
                print(f"{outcome.kind} {number}: {count} x {where} ({what!r})", flush=True)
            note.write_text(json.dumps(outcomes))
            note.with_suffix(".md").write_text(report(outcomes) + "\n")
    print(report(outcomes))


def _done(note: Path) -> dict[str, list[Outcome]]:
    """What an earlier run has kept."""
    found = json.loads(note.read_text()) if note.exists() else {}
    return {kind: [Outcome(*one) for one in many] for kind, many in found.items()}


def report(outcomes: dict[str, list[Outcome]]) -> str:
    """One line a kind."""
    rows = []
    for kind, found in outcomes.items():
        if not found:
            continue
        places = Counter(where for o in found for where in o.bugs)
        bugs = sum(count for o in found for count, _, _ in o.bugs.values())
        read, refused = sum(o.read for o in found), sum(o.refused for o in found)
        each = 1000 * sum(o.seconds for o in found) / (read + refused + bugs)
        rows.append((kind, read + refused + bugs, read, refused, bugs, len(places), f"{each:.1f}",
                     f"{max(o.slowest for o in found):.2f}"))  # fmt: skip
    header = ("kind", "inputs", "read", "refused in one line", "anything else", "at so many places", "ms each", "slowest, s")
    return table(header, rows)


if __name__ == "__main__":
    main()
