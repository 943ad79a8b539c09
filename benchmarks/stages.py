"""Where the main job's processor time goes: one command, stage by stage.

python benchmarks/stages.py [--method gptq] [--plan uniform] [--sequential] [--threads 1] [--windows 64]
"""

from __future__ import annotations

import time

BEGAN = time.process_time()

import functools  # noqa: E402
import importlib  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import assay.run  # noqa: E402

IMPORTED = time.process_time() - BEGAN
from _harness import CALIBRATION_TEXT, CALIBRATION_WINDOWS, WINDOW, arguments, machine, table  # noqa: E402

BITS = 4.3125
STAGES = (
    ("survey of the model", "assay.run:StreamedModel", "assay.contest:StreamedModel"),
    ("text", "assay.profiling:_texts"),
    ("forward sweep, H", "assay.measure.profile:_forward"),
    ("labels and the head", "assay.measure.profile:_tail"),
    ("backward sweep, G", "assay.measure.profile:_backward"),
    ("prices", "assay.budget.probe:price_model", "assay.profiling:spreads"),
    ("rehearsal", "assay.budget.probe:rehearse"),
    ("probes", "assay.budget.probe:probe"),
    ("plan, twin, frontier", "assay.budget.plans:make", "assay.budget.plans:outlook", "assay.handover:_frontier"),
    ("solving", "assay.execute:_solve_block"),
    (
        "both models side by side",
        *(f"assay.measure.pair:Pair.{name}" for name in ("original", "met", "pass_by")),
    ),
    ("measuring plan and twin", "assay.contest:_HeldOut.kl"),
    ("writing", "assay.engines.write:write", "assay.handover:_ledger", "assay.run:write_page"),
    ("reading back", "assay.engines.reopen:compare"),
)
"""What a row counts: functions, less those of other rows that they call."""


@dataclass
class Clock:
    """Processor seconds by stage, each moment in the innermost one that is running."""

    seconds: dict[str, float] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    since: float = 0.0

    def switch(self) -> None:
        """Book the time since the last switch."""
        now = time.process_time()
        if self.running:
            self.seconds[self.running[-1]] = self.seconds.get(self.running[-1], 0.0) + now - self.since
        self.since = now

    def watched(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is booked to a stage."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self.running.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.running.pop()

        return timed


def watch(clock: Clock) -> None:
    """Put the clock around every function of `STAGES`."""
    for stage, *functions in STAGES:
        for address in functions:
            module, _, path = address.partition(":")
            *owners, name = path.split(".")
            owner = functools.reduce(getattr, owners, importlib.import_module(module))
            setattr(owner, name, clock.watched(stage, getattr(owner, name)))


def main() -> None:
    """Compress once and print the table."""
    parser = arguments(__doc__)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--plan", choices=("uniform", "mixed"), default="uniform")
    parser.add_argument("--sequential", action="store_true")
    parser.add_argument("--windows", type=int, default=CALIBRATION_WINDOWS, help="calibration windows of 256 tokens")
    given = parser.parse_args()
    clock = Clock()
    watch(clock)
    with tempfile.TemporaryDirectory() as folder:
        clock.watched("the rest", assay.run.compress)(
            given.model, Path(folder) / "out", calibration=CALIBRATION_TEXT, tokens=given.windows * WINDOW, window=WINDOW,
            bits=BITS, method=given.method, engine="assay" if given.method == "best" else "transformers",
            uniform=given.plan == "uniform", threads=given.threads, sequential=given.sequential,
        )  # fmt: skip
    rows = [(name, f"{clock.seconds.get(name, 0.0):.2f}") for name in (*(stage for stage, *_ in STAGES), "the rest")]
    total = ("all but imports", f"{sum(clock.seconds.values()):.2f}")
    print(machine(given.threads), table(("stage", "processor s"), [("imports", f"{IMPORTED:.2f}"), *rows, total]), sep="\n\n")


if __name__ == "__main__":
    main()
