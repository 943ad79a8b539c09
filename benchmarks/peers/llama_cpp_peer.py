"""llama.cpp's own quantizer with an importance matrix, on weights that assay converts for it and reads back.

The matrix is what its own tool would gather: mean squares of what each layer reads, on the job's tokens; the clock
leaves it out. Embedding and head stay in 16 bits. A file's type names a mix: llama.cpp gives some layers more.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
from importlib.metadata import version
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as api
from _common import Clock, Job, block_linears, parser, peak_rss, read_job, save_plain, write_result

import assay
from assay.exporting import importance
from assay.measure.profile import Profile
from assay.model.checkpoint import Checkpoint

TYPES = {"k": {4: 15, 3: 12, 2: 10}, "i": {4: 30, 3: 23, 2: 20}}
"""llama.cpp's numbers of Q4_K_M, Q3_K_M and Q2_K; of IQ4_XS, IQ3_XXS and IQ2_XS."""


def options() -> argparse.Namespace:
    """The command line."""
    given = parser(__doc__)
    given.add_argument("--text", type=Path, required=True, help="text that the ids are the start of")
    given.add_argument("--family", choices=TYPES, default="k", help="k-quants or i-quants")
    return given.parse_args()


def quantize(source: Path, target: Path, file_type: int, profile: Profile, threads: int, **more: int) -> None:
    """Run llama.cpp's quantizer on a GGUF file. more: other fields of its settings. Raises RuntimeError where it fails."""
    entries = importance(profile).entries
    rows = (api.llama_model_imatrix_data * (len(entries) + 1))()
    keep = []
    for row, (name, entry) in zip(rows, sorted(entries.items()), strict=False):
        values = entry.mean.flatten().contiguous().numpy()
        keep.append((name.encode(), values))
        row.name, row.size = keep[-1][0], len(values)
        row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    given = api.llama_model_quantize_default_params()
    given.ftype, given.nthread = file_type, threads
    for name, value in more.items():
        setattr(given, name, value)
    given.imatrix = ctypes.cast(rows, ctypes.POINTER(api.llama_model_imatrix_data))
    if api.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(given)):
        raise RuntimeError(f"llama.cpp could not make {target}")


def bits_in_blocks(path: Path) -> float:
    """Mean bits per weight of the matrices in the blocks of a GGUF file."""
    tensors = [t for t in gguf.GGUFReader(path).tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    return 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)


def decode(job: Job, folder: Path) -> None:
    """Write the plain checkpoint of what a GGUF file holds."""
    model, read = job.load(), Checkpoint.open(folder)
    plain = model.float()
    state = plain.state_dict()
    for name in block_linears(plain):
        state[f"{name}.weight"] = read.read(f"{name}.weight").float()
    plain.load_state_dict(state)
    save_plain(job, plain)


def main() -> None:
    """Quantize the model on the command line."""
    given = options()
    job, clock = read_job(given), Clock()
    work = job.out.with_name(f"{job.out.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    ids = job.ids()
    profile = assay.profile(
        job.model, work / "profile", calibration=given.text, tokens=ids.numel(), window=ids.shape[1], methods=("ggml",)
    )
    assay.export(job.model, "gguf", work / "float")
    shutil.copytree(work / "float", work / "small")
    half = int(gguf.GGMLQuantizationType.F16)
    with clock.running():
        quantize(
            work / "float" / "model.gguf", work / "small" / "model.gguf", TYPES[given.family][job.bits], profile, job.threads,
            token_embedding_type=half, output_tensor_type=half,
        )  # fmt: skip
    memory = peak_rss()
    decode(job, work / "small")
    facts = {"peer": "llama.cpp", "version": version("llama-cpp-python"), "bits_in_blocks": bits_in_blocks(work / "small" / "model.gguf")}
    write_result(job, clock, memory, **facts)


if __name__ == "__main__":
    main()
