"""The same judgement in a chosen precision and at several batch sizes: what of a verdict is the model, and what is rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from assay.measure.stream import BATCH_TOKENS, StreamedModel
from assay.measure.text import Windows
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.precision import float32_products
from assay.model.progress import Progress
from assay.prove.divergence import Candidate, Scores, compare

COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check(compute: str, sizes: Sequence[int]) -> None:
    """Raises InputError for an unknown precision, sizes below one, or a single size, which has no spread."""
    if compute not in COMPUTE:
        raise InputError(f"--compute {compute}: give one of {', '.join(COMPUTE)}")
    if sizes and (min(sizes) < 1 or len(set(sizes)) < 2):
        raise InputError("--batches: give two or more different numbers of windows above zero, like 1,4,16")


def judged(
    original: Checkpoint, result: Checkpoint, windows: Windows, compute: str, sizes: Sequence[int], progress: Progress
) -> dict[str, Any]:  # fmt: skip
    """`Scores.summary` of a result, with `compute` and, for sizes, `batches`: a run for each and their `spread`.

    Weights lie in the files in 16 bits or fewer; a block's are cast to the dtype `compute` when its turn comes and dropped after
    it, and both models compute in it throughout. That is LayerCast for float32 (Give Me FP32 or Give Me Death?, 2025), by
    blocks. sizes: windows that go through a block at once; the first one's summary is the answer. Raises InputError.
    """
    check(compute, sizes)
    length, runs = int(windows.ids.shape[1]), []
    for size in sizes or [max(1, BATCH_TOKENS // length)]:
        reference, candidate = (StreamedModel(c, compute=COMPUTE[compute]) for c in (original, result))
        if (shape := _shape(candidate)) != (wanted := _shape(reference)):
            raise InputError(f"{result.folder} has {shape}, {original.folder} {wanted}; they can't be compared")
        with float32_products():
            runs.append(compare(reference, {"out": Candidate(candidate)}, windows, progress, batch_tokens=size * length)["out"])
    if compute == "float16" and not all(bool(part.isfinite().all()) for run in runs for part in run.kl):
        raise InputError(f"{result.folder}: numbers too large for float16; verify with --compute bfloat16 or float32")
    found: dict[str, Any] = runs[0].summary() | {"compute": compute, "batches": None}
    if sizes:
        found["batches"] = {"runs": [_row(n, s) for n, s in zip(sizes, runs, strict=True)], "spread": spread(runs)}
    return found


def _shape(model: StreamedModel) -> str:
    return f"{len(model.blocks)} blocks and {model.vocabulary} tokens"


def spread(runs: Sequence[Scores]) -> dict[str, float]:
    """How far runs of the same windows are apart: largest minus smallest, or the largest difference of any token.

    kl: of the mean KL, nats; perplexity: of the result's; token_kl: of one token's KL, nats; top_tokens: share of tokens whose
    most likely successor is not the same in all runs.
    """
    kl, loss, top = (torch.stack([torch.cat(part) for part in parts]) for parts in _parts(runs))
    means, perplexities = kl.double().mean((1, 2)), loss.double().mean((1, 2)).exp()
    return {
        "kl": float(means.max() - means.min()), "perplexity": float(perplexities.max() - perplexities.min()),
        "token_kl": float((kl.amax(0) - kl.amin(0)).max()), "top_tokens": float((top.amax(0) != top.amin(0)).double().mean()),
    }  # fmt: skip


def _parts(runs: Sequence[Scores]) -> tuple[list[list[torch.Tensor]], ...]:
    return [r.kl for r in runs], [r.loss for r in runs], [r.top for r in runs]


def _row(size: int, scores: Scores) -> dict[str, Any]:
    kl, loss, agrees = (torch.cat(x).double().mean() for x in (scores.kl, scores.loss, scores.agrees))
    return {"batch": size, "kl": float(kl), "perplexity": float(loss.exp()), "agreement": float(agrees)}
