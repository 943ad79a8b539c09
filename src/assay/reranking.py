"""Order of documents for a query, from what the query's tokens attend to.

Attention in Large Language Models Yields Efficient Zero-Shot Re-Rankers (ICR, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from assay.methods.cache._watch import Watch
from assay.model.errors import InputError
from assay.runtime.attention import Step
from assay.runtime.hook import attached
from assay.runtime.policy import Stack

PREFIX = "Here are some paragraphs:\n"
ASKED = "\nPlease find information that is relevant to the following query in the paragraphs above.\n\nQuery: "
EMPTY_QUERY = "N/A"
DEVIATIONS = 2.0


def rerank(model: PreTrainedModel | str | Path, query: str, documents: Sequence[str], *, tokenizer: Any = None,
           calibrate: bool = True) -> list[tuple[int, float]]:  # fmt: skip
    """Documents by relevance, best first: (index, score), the score in attention summed over layers and heads.

    Documents are read once; then a content-free query and the real one are read after them, and what a document token
    gains from the first to the second counts, but not tokens far below their document's mean. model: a transformers model
    or where to load one from; tokenizer: the model's own if left out. calibrate=False leaves the first query out.
    Raises InputError for an empty query or documents, models that can't be watched, and texts beyond the context.
    """
    if not query.strip() or not documents or not all(d.strip() for d in documents):
        raise InputError("nothing to rank: give a query and documents that are not empty")
    found: Any = model if isinstance(model, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(found.config._name_or_path)
    # pieces are tokenized apart, so that both queries start at the same token
    pieces = [_ids(tokenizer, PREFIX), *(_ids(tokenizer, f"[{i + 1}] {d}\n") for i, d in enumerate(documents))]
    ends = torch.tensor([len(p) for p in pieces]).cumsum(0).tolist()
    body = [i for piece in pieces for i in piece]
    queries = [_ids(tokenizer, ASKED + q) for q in ((EMPTY_QUERY, query) if calibrate else (query,))]
    *empty, gained = _attention(found, body, queries)
    gained = gained - empty[0] if empty else gained
    scores = [document_score(gained[a:b]) for a, b in pairwise(ends)]
    return sorted(enumerate(scores), key=lambda pair: (-pair[1], pair[0]))


def document_score(gained: Tensor) -> float:
    """Sum of a document's token scores [n] without those more than two deviations below their mean."""
    floor = gained.mean() - DEVIATIONS * gained.std(correction=0)
    return float(gained[gained >= floor].sum())


@torch.no_grad()
def _attention(model: PreTrainedModel, body: Sequence[int], queries: Sequence[Sequence[int]]) -> list[Tensor]:
    """For each query the attention that each token of the body gets: the queries' mean, summed over layers and heads."""
    found: list[Tensor] = []

    def see(step: Step) -> None:
        if found:
            for _, attention in step.rows():
                found[-1] += attention[0, ..., : len(body)].sum((0, 1, 2)).double() / step.query.shape[2]

    with attached(model, Stack(Watch(see=see))):
        cache = model.base_model(input_ids=torch.tensor([body], device=model.device), use_cache=True).past_key_values
        for ids in queries:
            found.append(torch.zeros(len(body), dtype=torch.float64, device=model.device))
            model.base_model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
            for layer in cache.layers:
                layer.crop(-len(ids))
    return found


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
