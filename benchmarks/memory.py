"""Peak memory and time of `assay compress`: a 1.1-billion-parameter model, and a curve over depth.

python benchmarks/memory.py [--part large curve] [--depths 4 8 16 32] [--hidden 512] [--threads 4]
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _harness import CALIBRATION_TEXT, MIB, arguments, machine, table, work_folder, write
from _process import Usage, run
from _random_llama import TINY_LLAMA, Shape, build, narrow

HEADER = (
    "model",
    "parameters M",
    "weights MiB",
    "peak RSS MiB",
    "without mapped files MiB",
    "over idle MiB",
    "seconds",
)
IDLE = "import assay, torch, transformers; from assay import run; transformers.AutoModelForCausalLM"


def compress(model: Path, out: Path, bits: str, threads: int) -> Usage:
    """Run the command line on a model; the result stays in `out`.

    One uniform plan from few tokens: more of either takes more time, not more memory (activations lie on disk).
    """
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(f".{out.name}.assay"), ignore_errors=True)
    command = [sys.executable, "-m", "assay", "compress", str(model), "--bits", bits]
    command += ["-o", str(out), "--threads", str(threads), "--uniform", "--tokens", "4096"]
    usage = run(command, threads, out.with_suffix(".log"))
    if usage.returncode:
        raise SystemExit(f"assay compress failed: {usage.last_line}")
    return usage


def measure(name: str, shape: Shape, given: Any, idle: Usage) -> dict[str, Any]:
    """Build one random model, compress it, delete both. Bytes and seconds."""
    model, out = given.out / f"random-{name}", given.out / f"random-{name}-packed"
    build(shape, model, CALIBRATION_TEXT)
    usage = compress(model, out, given.bits, given.threads)
    for folder in (model, out):
        shutil.rmtree(folder)
    return {
        "name": name,
        "shape": asdict(shape),
        "parameters": shape.parameters,
        "peak_rss_bytes": usage.peak_rss_bytes,
        "peak_anonymous_bytes": usage.peak_anonymous_bytes,
        "over_idle_bytes": usage.peak_rss_bytes - idle.peak_rss_bytes,
        "seconds": usage.seconds,
    }


def line(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    sizes = ("peak_rss_bytes", "peak_anonymous_bytes", "over_idle_bytes")
    return [
        row["name"],
        f"{row['parameters'] / 1e6:.1f}",
        f"{2 * row['parameters'] / MIB:.0f}",
        *(f"{row[key] / MIB:.0f}" for key in sizes),
        f"{row['seconds']:.0f}",
    ]


def shapes(given: Any) -> Iterable[tuple[str, Shape]]:
    """The models to build, by name."""
    if "curve" in given.part:
        for layers in given.depths:
            yield f"hidden {given.hidden}, {layers} layers", narrow(given.hidden, layers)
    if "large" in given.part:
        yield "TinyLlama shape", TINY_LLAMA


def main() -> None:
    """Measure what is asked for on the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--part", nargs="+", choices=("large", "curve"), default=["curve", "large"])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--bits", default="4")
    given = parser.parse_args()
    folder = work_folder(given.out)
    idle = run([sys.executable, "-c", IDLE], given.threads, folder / "idle.log")
    rows = []
    for name, shape in shapes(given):
        rows.append(measure(name, shape, given, idle))
        note = f"Idle (imports only): {idle.peak_rss_bytes / MIB:.0f} MiB."
        text = [machine(given.threads), note, table(HEADER, [line(row) for row in rows])]
        write(folder, "memory", "\n\n".join(text), rows)


if __name__ == "__main__":
    main()
