"""The compression that the page starts: one at a time, another process, followed by the lines that it writes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock, Thread
from time import perf_counter
from typing import Any

from assay.model.errors import InputError
from assay.model.progress import remaining

LINES, MOST_LETTERS = 200, 4096
GRACE, AGAIN = 10.0, 0.5
"""Seconds after an interrupt before a process that doesn't listen is ended, and between interrupts; what is finished stays."""


@dataclass(frozen=True)
class Order:
    """What to compress by which plan, and where to. Raises InputError for what can't be a path."""

    model: str
    plan: str
    out: str
    profile: Path

    def __post_init__(self) -> None:
        for what, text in (("the model", self.model), ("the plan", self.plan), ("the folder of the result", self.out)):
            if not isinstance(text, str) or not text.strip() or "\0" in text or len(text) > MOST_LETTERS:
                raise InputError(f"name {what}")

    @property
    def result(self) -> Path:
        """The folder that will be written."""
        return Path(self.out.strip()).expanduser().absolute()

    @property
    def command(self) -> list[str]:
        """Arguments of `assay`, as a list, for no shell to read. What begins with a dash is no option after all."""
        plan, model = Path(self.plan.strip()).expanduser().absolute(), self.model.strip()
        model = str(Path(model).expanduser()) if model.startswith("~") else model
        options = [f"--plan={plan}", f"--profile={self.profile.absolute()}", f"--output={self.result}"]
        return ["compress", *options, "--progress=lines", "--json", "--", model]


@dataclass(frozen=True)
class Task:
    """A bar: how many of its steps are done, when it began and when the last step was done (seconds of `perf_counter`)."""

    what: str
    done: int
    total: int
    began: float
    at: float

    def to_json(self, now: float) -> dict[str, Any]:
        """left: seconds that the rest takes, None before the first step."""
        left = remaining(self.done, self.total, self.at - self.began, now - self.began)
        return {"what": self.what, "done": self.done, "total": self.total, "seconds": now - self.began, "left": left}


class Job:
    """A running `assay compress`. cancelled: somebody asked it to stop."""

    def __init__(self, order: Order) -> None:
        self.order, self.cancelled, self.began = order, False, perf_counter()
        self._tasks: dict[str, Task] = {}
        self._lines: deque[str] = deque(maxlen=LINES)
        self._said: deque[str] = deque(maxlen=LINES)
        self._answer, self._took, self._lock = "", 0.0, Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "assay", *order.command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, encoding="utf-8", errors="replace", start_new_session=True,
            env=os.environ | {"PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        self._reader = Thread(target=self._follow, daemon=True)
        self._reader.start()

    @property
    def runs(self) -> bool:
        """Whether it hasn't ended yet."""
        return self._reader.is_alive()

    def to_json(self) -> dict[str, Any]:
        """What the page shows. state: running, cancelling, cancelled, done or failed."""
        running = self.runs
        with self._lock:
            now, code = perf_counter(), self._process.returncode
            tasks = [task.to_json(now) for task in self._tasks.values()]
            lines, said, answer = list(self._lines), list(self._said), self._answer
        state = ("cancelling" if self.cancelled else "running") if running else "done" if code == 0 else "failed"
        found = {
            "tasks": tasks if running else [], "lines": lines, "out": str(self.order.result), "report": False, "result": None,
            "seconds": (now - self.began) if running else self._took, "command": shlex.join(["assay", *self.order.command]),
            "error": "",
        }  # fmt: skip
        if state == "done":
            found |= {"result": json.loads(answer), "report": self.page.is_file()}
        elif state == "failed" and self.cancelled:
            state = "cancelled"
        elif state == "failed":
            found["error"] = (said or [f"the process ended with {code}"])[-1].removeprefix("assay: ")
        return found | {"state": state}

    @property
    def page(self) -> Path:
        """The report that lies beside a finished result."""
        return self.order.result / "assay" / "report.html"

    def cancel(self) -> None:
        """Interrupt it, as Ctrl-C would; finished blocks stay. Returns at once."""
        self.cancelled = True
        if self.runs:
            Thread(target=self._interrupt, daemon=True).start()

    def _interrupt(self) -> None:
        """Until it has ended, since libraries swallow an interrupt that meets them in a callback."""
        for _ in range(round(GRACE / AGAIN)):
            self._process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
            self._reader.join(AGAIN)
            if not self.runs:
                return
        self._process.kill()

    def close(self) -> None:
        """Cancel it and wait until it has ended."""
        self.cancel()
        self._reader.join()

    def _follow(self) -> None:
        assert self._process.stderr is not None and self._process.stdout is not None
        for line in self._process.stderr:
            self._take(line.strip())
        with self._process.stdout:
            answer = self._process.stdout.read()
        self._process.stderr.close()
        self._process.wait()
        with self._lock:
            self._answer, self._took = answer, perf_counter() - self.began

    def _take(self, line: str) -> None:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        with self._lock:
            match found:
                case {"task": str(what), "ended": True}:
                    self._tasks.pop(what, None)
                case {"task": str(what), "done": int(done), "total": int(total)}:
                    now = perf_counter()
                    known = self._tasks.get(what, Task(what, done, total, now, now))
                    self._tasks[what] = replace(known, done=done, total=total, at=now)
                case {"line": str(words)}:
                    self._lines.append(words)
                case _:
                    if line:
                        self._said.append(line)


class Desk:
    """Where orders are taken: the job that runs or ran last."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self._lock = Lock()

    def start(self, order: Order) -> None:
        """Raises InputError while another one runs."""
        with self._lock:
            if self.job is not None and self.job.runs:
                raise InputError(f"a compression into {self.job.order.result} is running; cancel it or wait until it is done")
            self.job = Job(order)

    def to_json(self) -> dict[str, Any]:
        """What the page shows; state is idle before the first order."""
        job = self.job
        return {"state": "idle"} if job is None else job.to_json()

    def cancel(self) -> None:
        """Stop what runs, if anything does."""
        if self.job is not None and self.job.runs:
            self.job.cancel()

    def close(self) -> None:
        """Stop what runs and wait for its end."""
        if self.job is not None and self.job.runs:
            self.job.close()
