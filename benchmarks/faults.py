"""Faults at random moments of every step: signals, full disks, flipped bits, two at once and more. Nothing may be lost.

    python benchmarks/faults.py --trials 40 [--only SIGKILL clock]

After each fault the same command must come to the result that it has undisturbed, bit for bit, or say what to remove and
then do so. Disks and folders of their own need the right to mount. The table is in FAULTS.md.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from _harness import arguments, table, work_folder
from faults.trials import ALL, MOUNTS, Bench, Lost, can_mount


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--trials", type=int, default=40, help="of each kind and step")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--steps", nargs="*")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        bench, mounts = Bench(Path(folder)), can_mount(Path(folder))
        rows = []
        for kind, (_, steps) in ALL.items():
            if (given.only and kind not in given.only) or (kind in MOUNTS and not mounts):
                continue
            outcomes, start = Counter[str](), time.perf_counter()
            for step in steps:
                for number in range(given.first, given.first + given.trials) if step in (given.steps or steps) else ():
                    try:
                        outcomes[bench.trial(kind, step, number)] += 1
                    except Lost as error:
                        outcomes["LOST"] += 1
                        lost += 1
                        print(f"{kind}, {step}, {number}: {error}", flush=True)
            told = "; ".join(f"{what}: {n}" for what, n in sorted(outcomes.items()) if what != "LOST")
            rows.append((kind, ", ".join(steps), outcomes.total(), told, outcomes["LOST"]))
            print(rows[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
            header = ("fault", "steps", "trials", "what came of them", "lost")
            (work_folder(given.out) / "faults.md").write_text(table(header, rows) + "\n")
    print(table(header, rows))
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
