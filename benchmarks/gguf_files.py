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
SITTINGS, ROUNDS = 8, 20
GENERATED = 48
BOUND, SPEED = 0.7, 0.95
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


def speed(paths: dict[str, Path], ids: list[int], threads: int) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of processor time of each file, one number a round: the files in turns, in changing order.

    Each sitting opens the files anew, since where they come to lie in memory matters a little; its first round warms up.
    """
    seen: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "generated": []} for name in paths}
    for _ in range(SITTINGS):
        readers = {name: Reader(path, WINDOW, threads, cache=1) for name, path in paths.items()}
        for i in range(ROUNDS + 1):
            names = list(readers)
            for name in names[i % len(names) :] + names[: i % len(names)]:
                prompt, generated = once(readers[name], ids)
                if i:
                    seen[name]["prompt"].append(prompt)
                    seen[name]["generated"].append(generated)
        for reader in readers.values():
            reader.close()
    return seen


def once(reader: Reader, ids: list[int]) -> tuple[float, float]:
    """Tokens per second of one prompt, and of the tokens after a short one."""
    started = time.process_time()
    reader.logits(ids)
    prompt = len(ids) / (time.process_time() - started)
    reader.logits(ids[:16])
    started = time.process_time()
    for i in range(GENERATED):
        reader.logits([ids[16 + i]], start=16 + i)
    return prompt, GENERATED / (time.process_time() - started)


def beside(ours: list[float], theirs: list[float]) -> tuple[float, str]:
    """Median of the ratios of rounds, and the same as text with the quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return middle, f"{middle:.2f} [{low:.2f}, {high:.2f}]"


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
    parser.add_argument("--engines", nargs="+", default=["llama.cpp", "llama.cpp-all"])
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
            row = {"bytes": path.stat().st_size, "seconds": made[maker], "rounds": fast[maker]}
            row |= {kind: statistics.median(values) for kind, values in fast[maker].items()}
            row |= judge(path, windows, reference, given.threads)
            figures[f"{name}, {maker}"] = row
            rows.append(line(f"{name}, {maker}", row))
            print(rows[-1], flush=True)
        b = figures[f"{name}, llama.cpp"]
        for maker in list(paths)[1:]:
            a = figures[f"{name}, {maker}"]
            ratio = a["kl"] / b["kl"]
            (_, prompt), (generated, text) = (beside(a["rounds"][k], b["rounds"][k]) for k in ("prompt", "generated"))
            met = (
                "both"
                if ratio <= BOUND and generated >= SPEED
                else "KL"
                if ratio <= BOUND
                else "speed"
                if generated >= SPEED
                else "none"
            )
            ratios.append([f"{name}, {maker}", f"{a['bytes'] / b['bytes']:.4f}", f"{ratio:.3f}", prompt, text, met])
    size = (work / "float" / "model.gguf").stat().st_size / MIB
    text = "\n\n".join((
        "# GGUF: ours beside llama.cpp's own quantizer",
        f"`python benchmarks/gguf_files.py`: {given.model.name} ({size:.1f} MiB as bf16), calibrated on {tokens} tokens of "
        f"WikiText-2 validation, judged on {JUDGE_WINDOWS} windows of {WINDOW} tokens of WikiText-2 test. llama.cpp reads both "
        "files (through llama-cpp-python); the KL is from the original in float32, so it holds the noise of llama.cpp's "
        "kernels, which round activations to 8 bits, for both. Seconds to make leave out what both need: the profile.",
        table(HEADER, rows),
        f"Ours over llama.cpp's; the bound on the KL is {BOUND}, on the speed of generation {SPEED}. Speeds: processor time, the "
        f"files in turns in one process, {SITTINGS} times opened for {ROUNDS} rounds of a prompt of {WINDOW} tokens and "
        f"{GENERATED} generated ones each; medians of the rounds, of ratios the median of the rounds' ratios and its quartiles.",
        table(("type, maker", "bytes", "KL", "prompt speed", "generation speed", "bounds met"), ratios), machine(given.threads),
    ))  # fmt: skip
    write(work_folder(given.out), "gguf", text, figures)


if __name__ == "__main__":
    main()
