"""What llama.cpp takes to generate a token from each of its types: a random model, whole blocks of one type.

python benchmarks/gguf_types.py [--width 1024] [--threads 1] [--out FOLDER]
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as api
import numpy as np
from _harness import ROOT, arguments, machine, table, work_folder, write

import assay

sys.path.insert(0, str(ROOT / "tests"))
from engines import real_gguf
from engines.llama_reader import Reader

FTYPES = {"q8_0": 7, "q6_k": 18, "q5_k": 17, "q5_1": 9, "q5_0": 8, "q4_k": 15, "q4_1": 3, "q4_0": 2, "iq4_nl": 25, "iq4_xs": 30,
          "q3_k": 12, "iq3_s": 26, "iq3_xxs": 23, "q2_k": 10, "iq2_s": 29, "iq2_xs": 20, "iq2_xxs": 19}  # fmt: skip
"""llama.cpp's numbers for files of one type."""
Q6_K = 14
REPEATS, GENERATED, PROMPT = 15, 16, 16


def sizes(width: int) -> dict[str, int]:
    """Settings of a llama model of 4 blocks."""
    return {"hidden_size": width, "intermediate_size": 11 * width // 4 // 256 * 256, "num_hidden_layers": 4,
            "num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64,
            "max_position_embeddings": 256}  # fmt: skip


def quantize(source: Path, target: Path, ftype: int) -> None:
    """A file whose blocks are of one type, by an importance of 1 everywhere; head and embedding are Q6_K in all of them."""
    weights = [t for t in gguf.GGUFReader(source).tensors if len(t.shape) == 2]
    rows = (api.llama_model_imatrix_data * (len(weights) + 1))()
    keep = [np.ones(int(t.shape[0]), np.float32) for t in weights]
    for row, tensor, ones in zip(rows, weights, keep, strict=False):
        row.name, row.size = tensor.name.encode(), len(ones)
        row.data = ones.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    given = api.llama_model_quantize_default_params()
    given.ftype, given.nthread, given.pure = ftype, 1, True
    given.output_tensor_type = given.token_embedding_type = Q6_K
    given.imatrix = ctypes.cast(rows, ctypes.POINTER(api.llama_model_imatrix_data))
    if api.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(given)):
        raise RuntimeError(f"llama.cpp could not make {target}")


def milliseconds(paths: dict[str, Path], threads: int) -> dict[str, list[float]]:
    """Processor time of a generated token, one number a repeat, the files in turns; the first repeat warms up."""
    readers = {name: Reader(path, 64, threads, cache=1) for name, path in paths.items()}
    seen: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(REPEATS + 1):
        for name, reader in readers.items():
            reader.logits(list(range(3, 3 + PROMPT)))
            started = time.process_time()
            for i in range(GENERATED):
                reader.logits([5 + i], start=PROMPT + i)
            seen[name].append((time.process_time() - started) / GENERATED * 1000)
    for reader in readers.values():
        reader.close()
    return {name: values[1:] for name, values in seen.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--width", type=int, default=1024, help="of the random model, a multiple of 256")
    given = parser.parse_args()
    work = work_folder(given.out) / f"gguf_types-{given.width}"
    work.mkdir(exist_ok=True)
    if not (work / "float").exists():
        real_gguf.lively("llama", work / "model", **sizes(given.width))
        assay.export(work / "model", "gguf", work / "float")
    paths = {name: work / f"{name}.gguf" for name in FTYPES}
    for name, path in paths.items():
        if not path.exists():
            quantize(work / "float" / "model.gguf", path, FTYPES[name])
    seen = milliseconds(paths, given.threads)
    unit = statistics.median(seen["q4_k"])
    rows = []
    for name, values in sorted(seen.items(), key=lambda x: statistics.median(x[1])):
        size = paths[name].stat().st_size
        middle = statistics.median(values)
        spread = f"{min(values):.2f} to {max(values):.2f}"
        rows.append([name, f"{size / 1e6:.1f}", f"{middle:.2f}", spread, f"{middle / unit:.2f}"])
    header = ("type", "MB", "ms a token, median", "range", "beside q4_k")
    title = f"# GGUF: time of a generated token by type, {given.width} wide"
    text = "\n\n".join((title, table(header, rows), machine(given.threads)))
    write(work_folder(given.out), work.name, text, seen)


if __name__ == "__main__":
    main()
