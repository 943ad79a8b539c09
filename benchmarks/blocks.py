"""llama.cpp's block formats on pebble: KL of every kind by method, and of planned mixes at the sizes of llama.cpp's own files.

python benchmarks/blocks.py [--kinds q4_k iq2_xs] [--methods clip ggml] [--no-mixes]
python benchmarks/blocks.py --report     (the tables again, from the figures of the last run)

The head and the embedding are kept. clip is what llama.cpp's quantizer does with an importance matrix: scales searched
and codes rounded to nearest, both weighted by the diagonal of H. llama.cpp's own figures are of its quantizer with an
importance matrix from the same calibration text, read back and judged in the same way.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from _harness import CALIBRATION_TEXT, JUDGE_TEXT, MODEL, ROOT, machine, table, work_folder, write

import assay
from assay.model.ggml import KINDS

METHODS = ("nearest", "clip", "gptq", "two_sided", "ggml")
LEFT_OUT = ("f16", "bf16", "tq1_0", "mxfp4")
LLAMA_CPP = {
    "q4_K_M": (4.69, 0.00754), "iq4_XS": (4.25, 0.00943), "q3_K_M": (3.87, 0.02141), "iq3_XXS": (3.02, 0.0534),
    "q2_K": (2.94, 0.0788), "iq2_XS": (2.33, 0.152),
}  # fmt: skip
"""Of its files of pebble: bits per weight of the blocks' matrices, KL (llama-cpp-python 0.3.36)."""


def judged(folder: Path, profile: Path, tokens: int, **wanted: Any) -> dict[str, float]:
    """Compress once and judge."""
    out = folder / "out"
    done = assay.compress(MODEL, out, profile=profile, engine="assay", threads=torch.get_num_threads(), **wanted)
    verdict = assay.verify(out, MODEL, text=JUDGE_TEXT, tokens=tokens)
    shutil.rmtree(out)
    kl = verdict["kl"]
    return {"bits": verdict["bits"], "kl": kl["measured"], "low": kl["low"], "high": kl["high"], "seconds": done["seconds"]}


def kind_table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """A line a kind, a column a method."""
    header = ("kind", "bits", *METHODS, "ggml / clip", "95% of ggml")
    return table(header, (_line(kind, found) for kind, found in sorted(rows.items(), key=lambda r: -KINDS[r[0]].bits)))


def _line(kind: str, found: dict[str, dict[str, float]]) -> list[str]:
    cells = [f"{found[m]['kl']:.5f}" if m in found else "" for m in METHODS]
    if not {"clip", "ggml"} <= found.keys():
        return [kind, f"{KINDS[kind].bits:.3f}", *cells, "", ""]
    ours = found["ggml"]
    ratio = f"{ours['kl'] / found['clip']['kl']:.2f}"
    return [kind, f"{KINDS[kind].bits:.3f}", *cells, ratio, f"{ours['low']:.5f} to {ours['high']:.5f}"]


def mix_table(rows: dict[str, dict[str, float]]) -> str:
    """Our plan at each of llama.cpp's sizes."""
    lines = []
    for name, found in rows.items():
        bits, kl = LLAMA_CPP[name]
        ours = f"{found['kl']:.5f} [{found['low']:.5f}, {found['high']:.5f}]"
        lines.append([name, f"{bits:.2f}", f"{kl:.5f}", f"{found['bits']:.3f}", ours, f"{found['kl'] / kl:.2f}"])
    return table(("llama.cpp's file", "bits", "its KL", "our bits", "our KL [95%]", "ratio"), lines)


def report(figures: dict[str, Any]) -> str:
    """All tables as markdown."""
    parts = [
        figures["machine"],
        figures["settings"],
        "## Mixes planned by assay at llama.cpp's sizes",
        mix_table(figures["mixes"]),
    ]
    return "\n\n".join([*parts, "## One kind for all matrices (KL)", kind_table(figures["kinds"])])


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=[k for k in KINDS if k not in LEFT_OUT])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--no-mixes", action="store_true")
    parser.add_argument("--tokens", type=int, default=8192, help="of the calibration text")
    parser.add_argument("--judge-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out")
    return parser.parse_args()


def main() -> None:
    """Measure, and write after every trial what is known."""
    given = options()
    folder = work_folder(given.out)
    if given.report:
        figures = json.loads((folder / "blocks.json").read_text())
        return write(folder, "blocks", report(figures), figures)
    torch.set_num_threads(given.threads)
    figures: dict[str, Any] = {"machine": machine(given.threads), "mixes": {}, "kinds": {}}
    figures["settings"] = f"Calibrated on {given.tokens} tokens, judged on {given.judge_tokens}; windows of 256."
    with tempfile.TemporaryDirectory() as name:
        place, profile = Path(name), Path(name) / "profile"
        assay.profile(MODEL, profile, calibration=CALIBRATION_TEXT, tokens=given.tokens, methods=("ggml",), levels=given.kinds)
        for file in {} if given.no_mixes else LLAMA_CPP:
            figures["mixes"][file] = judged(place, profile, given.judge_tokens, bits=LLAMA_CPP[file][0], method="ggml")
            print(file, figures["mixes"][file], flush=True)
            (folder / "blocks.json").write_text(json.dumps(figures))
        for kind in given.kinds:
            for method in given.methods:
                found = judged(place, profile, given.judge_tokens, level=kind, method=method)
                figures["kinds"].setdefault(kind, {})[method] = found
                print(kind, method, found, flush=True)
                (folder / "blocks.json").write_text(json.dumps(figures))
    write(folder, "blocks", report(figures), figures)


if __name__ == "__main__":
    main()
