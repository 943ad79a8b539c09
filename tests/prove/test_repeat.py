"""A verdict in float32 hardly knows the batch size; one in bf16 does, and both are what the whole model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import CAUSAL
from tiny import save
from transformers import AutoModelForCausalLM

import assay
from assay.measure.stream import StreamedModel
from assay.measure.text import windows
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.progress import Silent
from assay.prove import repeat
from assay.prove.divergence import Scores


def logits(model: StreamedModel, ids: torch.Tensor) -> torch.Tensor:
    with model.outside(tail=False):
        hidden = model.embed(ids)
    for index in range(len(model.blocks)):
        with torch.no_grad(), model.block(index):
            hidden = model.run_block(index, hidden, 0)
    with torch.no_grad(), model.outside(tail=True):
        return model.logits(hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", CAUSAL)
def test_block_by_block_is_the_whole_model_in_that_dtype(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(family, tmp_path / "m")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.randint(1, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    found = logits(StreamedModel(Checkpoint.open(folder), compute=dtype), ids)
    assert found.dtype == torch.float32
    with torch.no_grad():
        wanted = whole(ids).logits.float()
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert float((found - wanted).abs().max()) <= bound * float(wanted.abs().max())


def test_the_spread_over_batch_sizes_is_a_tenth_in_float32_of_what_it_is_in_bf16(tmp_path: Path) -> None:
    """Short windows, since kernels differ between few rows and many; both precisions read the same text at the same sizes."""
    model = Checkpoint.open(assay.builtin_model())
    other = Checkpoint.open(assay.transform("builtin", tmp_path / "m", "rotate_heads")["out"])
    apart = {"float32": 0.0, "bfloat16": 0.0}
    for length, tokens in ((8, 256), (32, 512)):
        judge = windows(model, None, "evaluation", tokens, length, 4096)
        for compute in apart:
            runs = repeat.judged(model, other, judge, compute, (1, 16), Silent())["batches"]
            assert [run["batch"] for run in runs["runs"]] == [1, 16]
            apart[compute] += runs["spread"]["perplexity"]
    if apart["bfloat16"] == 0:
        pytest.skip("this processor's bf16 kernels don't depend on the batch size")
    assert apart["float32"] <= 0.1 * apart["bfloat16"]


def test_spread_is_largest_minus_smallest() -> None:
    def scores(kl: list[float], loss: list[float], top: list[int]) -> Scores:
        return Scores([torch.tensor([kl])], [torch.tensor([loss])], [], [], [torch.tensor([top])])

    runs = [
        scores([0.1, 0.3], [0.0, 0.0], [5, 7]),
        scores([0.2, 0.1], [0.0, 2.0], [5, 8]),
        scores([0.1, 0.3], [1.0, 1.0], [5, 7]),
    ]
    found = repeat.spread(runs)
    assert found["kl"] == pytest.approx(0.2 - 0.15)
    assert found["token_kl"] == pytest.approx(0.2)
    assert found["perplexity"] == pytest.approx(2.718281828 - 1)
    assert found["top_tokens"] == 0.5


def test_float32_stays_float32_whatever_torch_was_told() -> None:
    model = Checkpoint.open(assay.builtin_model())
    judge = windows(model, None, "evaluation", 256, 128, 4096)
    plain = repeat.judged(model, model, judge, "float32", (), Silent())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert repeat.judged(model, model, judge, "float32", (), Silent())["perplexity"] == plain["perplexity"]
    finally:
        torch.set_float32_matmul_precision(before)
    assert repeat.judged(model, model, judge, "bfloat16", (), Silent())["perplexity"] != plain["perplexity"]


@pytest.mark.parametrize(("compute", "sizes"), [("int8", ()), ("float32", (4,)), ("float32", (0, 4)), ("float32", (4, 4))])
def test_what_makes_no_sense_is_refused(compute: str, sizes: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="--compute|--batches"):
        repeat.check(compute, sizes)
