"""GGUF files of ours beside those of llama.cpp's own quantizer, at the same sizes, read by llama.cpp itself.

Both get the same statistics: llama.cpp an importance matrix that is exported from the profile that ours is planned on.

python benchmarks/gguf_files.py [--types Q4_K_M IQ2_XS] [--profile FOLDER] [--threads 1]
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _harness import (
    CALIBRATION_TEXT,
    CALIBRATION_WINDOWS,
    JUDGE_TEXT,
    JUDGE_WINDOWS,
    MIB,
    ROOT,
    WINDOW,
    arguments,
    machine,
    table,
    token_windows,
    work_folder,
    write,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

import assay
from assay.measure.profile import Profile
from assay.model.errors import InputError

sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(Path(__file__).with_name("peers")))
from engines.llama_reader import Reader
from llama_cpp_peer import quantize

TYPES = {"Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10, "IQ2_XS": 20}
REPEATS = 60
GENERATED = 48
BOUND = 0.7
HEADER = ("type, maker", "bytes", "KL to the original [95%]", "perplexity", "same top token", "prompt tokens/CPU s",
          "generated tokens/CPU s", "seconds to make")  # fmt: skip


def compressed(model: Path, work: Path, name: str, profile: Profile, engine: str, size: int) -> tuple[Path, float]:
    """Ours at a size, and the seconds it took; what an earlier run made is taken as it is."""
    folder = work / f"{engine}-{name}"
    if not folder.exists():
        report = assay.compress(model, folder, profile=profile.folder, size=size, engine=engine)
        (folder / "seconds").write_text(f"{report['seconds']:.1f}")
    return folder, float((folder / "seconds").read_text())


def judge(path: Path, windows: Tensor, reference: list[Tensor], threads: int) -> dict[str, Any]:
    """KL in nats per token, perplexity and agreement of what llama.cpp computes, windows as the unit of the interval."""
    reader = Reader(path, WINDOW, threads, cache=1)
    kl, loss, same = [], [], []
    for ids, wanted in zip(windows, reference, strict=True):
        p, q = wanted[:-1], reader.logits(ids.tolist()).log_softmax(-1)[:-1]
        kl.append((p.exp() * (p - q)).sum(-1).clamp_min(0).mean())
        loss.append(-q.gather(1, ids[1:, None]).mean())
        same.append((p.argmax(-1) == q.argmax(-1)).float().mean())
    reader.close()
    values = torch.stack(kl).double()
    picks = torch.randint(len(values), (1000, len(values)), generator=torch.Generator().manual_seed(0))
    spread = values[picks].mean(1).sort()[0]
    return {
        "kl": float(values.mean()), "kl_low": float(spread[25]), "kl_high": float(spread[974]),
        "perplexity": float(torch.stack(loss).mean().exp()), "agreement": float(torch.stack(same).mean()),
        "windows": values.tolist(),
    }  # fmt: skip


def speed(paths: dict[str, Path], ids: list[int], threads: int) -> dict[str, dict[str, float]]:
    """Tokens per second of processor time of each file, which a busy machine changes little; median of repeats in turns."""
    readers = {name: Reader(path, WINDOW, threads, cache=1) for name, path in paths.items()}
    seen: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "generated": []} for name in paths}
    for _ in range(REPEATS + 1):
        for name, reader in readers.items():
            started = time.process_time()
            reader.logits(ids)
            seen[name]["prompt"].append(len(ids) / (time.process_time() - started))
            reader.logits(ids[:16])
            started = time.process_time()
            for i in range(GENERATED):
                reader.logits([ids[16 + i]], start=16 + i)
            seen[name]["generated"].append(GENERATED / (time.process_time() - started))
    for reader in readers.values():
        reader.close()
    return {name: {kind: statistics.median(values[1:]) for kind, values in found.items()} for name, found in seen.items()}


@torch.no_grad()
def logits(model: Path, windows: Tensor) -> list[Tensor]:
    """Log-probabilities of the original in float32, one tensor a window."""
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return [original(ids[None]).logits[0].log_softmax(-1) for ids in windows]


def line(name: str, row: dict[str, Any]) -> list[str]:
    return [
        name, f"{row['bytes']:,}", f"{row['kl']:.5f} [{row['kl_low']:.5f}, {row['kl_high']:.5f}]", f"{row['perplexity']:.2f}",
        f"{row['agreement']:.1%}", f"{row['prompt']:.0f}", f"{row['generated']:.0f}", f"{row['seconds']:.1f}",
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--engines", nargs="+", default=["llama.cpp", "llama.cpp-fast"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    work = work_folder(given.out) / "gguf"
    work.mkdir(exist_ok=True)
    text, tokens = CALIBRATION_TEXT, CALIBRATION_WINDOWS * WINDOW
    profile = Profile.open(given.profile) if given.profile else assay.profile(
        given.model, work / "profile", calibration=text, tokens=tokens, window=WINDOW, methods=("ggml",)
    )  # fmt: skip
    if not (work / "float").exists():
        assay.export(given.model, "gguf", work / "float")
    windows = token_windows(given.model, JUDGE_TEXT, JUDGE_WINDOWS)
    reference = logits(given.model, windows)
    figures: dict[str, Any] = {}
    rows, ratios = [], []
    for name in given.types:
        theirs = work / f"{name}.gguf"
        started = time.perf_counter()
        quantize(work / "float" / "model.gguf", theirs, TYPES[name], profile, given.threads)
        made, paths = {"llama.cpp": time.perf_counter() - started}, {"llama.cpp": theirs}
        for engine in given.engines:
            try:
                folder, made[f"ours for {engine}"] = compressed(given.model, work, name, profile, engine, theirs.stat().st_size)
            except InputError as error:
                print(f"{name}, {engine}: {error}", flush=True)
                continue
            paths[f"ours for {engine}"] = folder / "model.gguf"
        fast = speed(paths, windows[0].tolist(), given.threads)
        for maker, path in paths.items():
            row = {"bytes": path.stat().st_size, "seconds": made[maker], **fast[maker]}
            row |= judge(path, windows, reference, given.threads)
            figures[f"{name}, {maker}"] = row
            rows.append(line(f"{name}, {maker}", row))
            print(rows[-1], flush=True)
        b = figures[f"{name}, llama.cpp"]
        for maker in list(paths)[1:]:
            a = figures[f"{name}, {maker}"]
            ratio = a["kl"] / b["kl"]
            ratios.append([f"{name}, {maker}", f"{ratio:.3f}", "met" if ratio <= BOUND else "missed",
                           f"{a['bytes'] / b['bytes']:.4f}", f"{a['prompt'] / b['prompt']:.2f}",
                           f"{a['generated'] / b['generated']:.2f}"])  # fmt: skip
    size = (work / "float" / "model.gguf").stat().st_size / MIB
    text = "\n\n".join((
        "# GGUF: ours beside llama.cpp's own quantizer",
        f"`python benchmarks/gguf_files.py`: {given.model.name} ({size:.1f} MiB as bf16), calibrated on {tokens} tokens of "
        f"WikiText-2 validation, judged on {JUDGE_WINDOWS} windows of {WINDOW} tokens of WikiText-2 test. llama.cpp reads both "
        "files (through llama-cpp-python); the KL is from the original in float32, so it holds the noise of llama.cpp's "
        "kernels, which round activations to 8 bits, for both. Seconds to make leave out what both need: the profile.",
        table(HEADER, rows),
        f"Ours over llama.cpp's; the bound on the KL is {BOUND}, on the speed 0.95.",
        table(("type", "KL", "bound", "bytes", "prompt speed", "generation speed"), ratios), machine(given.threads),
    ))  # fmt: skip
    write(work_folder(given.out), "gguf", text, figures)


if __name__ == "__main__":
    main()
