"""Re-ranking by attention, on the trained model pebble."""

from __future__ import annotations

import pebble
import pytest
import torch
from runtime.subjects import model as tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import assay
from assay.model.errors import InputError
from assay.reranking import EMPTY_QUERY, _attention, document_score

PLANTED = "The code of bakuti is 48213."
OTHERS = ("The old church stands near the river.", "He played for the club in two seasons.", "The album was released in May.",
          "The storm moved over the island.")  # fmt: skip
QUERY = "The code of bakuti is"


@pytest.fixture(scope="module")
def loaded():
    folder = pebble.folder() / "models/pebble"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def test_the_document_with_the_query_comes_first_wherever_it_lies(loaded) -> None:
    """At four of five places at least with so small a model; without calibration, where a document lies counts for more."""
    hits = {True: 0, False: 0}
    for place in range(5):
        documents = [*OTHERS[:place], PLANTED, *OTHERS[place:]]
        for calibrate in hits:
            ranked = assay.rerank(loaded[0], QUERY, documents, tokenizer=loaded[1], calibrate=calibrate)
            assert sorted(i for i, _ in ranked) == list(range(5))
            hits[calibrate] += ranked[0][0] == place
    assert hits[True] >= 4
    assert hits[True] > hits[False]


def test_a_query_without_content_scores_nothing(loaded) -> None:
    ranked = assay.rerank(loaded[0], EMPTY_QUERY, list(OTHERS), tokenizer=loaded[1])
    assert all(abs(score) < 1e-5 for _, score in ranked)


def test_reading_documents_once_is_reading_them_twice() -> None:
    found = tiny()
    body, queries = [5, 9, 13, 7, 22, 41, 8], [[3, 4, 50], [17, 6]]
    together = _attention(found, body, queries)
    for query, ours in zip(queries, together, strict=True):
        torch.testing.assert_close(ours, _attention(found, body, [query])[0], atol=1e-6, rtol=1e-6)
        with torch.no_grad():
            found.config._attn_implementation = "eager"
            maps = found(torch.tensor([body + query]), output_attentions=True).attentions
            found.config._attn_implementation = "sdpa"
        wanted = sum(m[0, :, len(body) :, : len(body)].double().mean(1).sum(0) for m in maps)
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


def test_tokens_far_below_the_mean_do_not_count() -> None:
    gained = torch.tensor([1.0] * 20 + [-50.0])
    assert document_score(gained) == 20


@pytest.mark.parametrize(("query", "documents"), [("", ["a"]), ("a", []), ("a", ["b", " "])])
def test_nothing_to_rank(query: str, documents: list[str]) -> None:
    with pytest.raises(InputError, match="nothing to rank"):
        assay.rerank(tiny(), query, documents)
