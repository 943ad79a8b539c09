"""Tasks for caches: text to continue and facts to look up, and their scores. Needs torch and transformers only."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

CONTEXT, TAIL, FACTS, DIGITS = 384, 48, 3, 5
Enter = Callable[[], AbstractContextManager[Any]]
"""Puts a policy into the model for one batch."""


@dataclass(frozen=True)
class Tasks:
    """texts int [n, CONTEXT + TAIL]; contexts int [m, t] with facts; questions int [m, q]; answers: the digits."""

    texts: Tensor
    contexts: Tensor
    questions: Tensor
    answers: list[str]


def make(tokenizer: Any, text: Path, texts: int, trials: int, length: int = 448, seed: int = 0) -> Tasks:
    """Windows of a text, and trials of `length` tokens with three facts in other parts of it, the question at the end."""
    ids = tokenizer(text.read_text()[: 40 * (texts + trials) * length], add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(ids[: texts * (CONTEXT + TAIL)]).view(texts, -1)
    draw, used = random.Random(seed), texts * (CONTEXT + TAIL)
    contexts, questions, answers = [], [], []
    while len(contexts) < trials:
        names = ["".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3)) for _ in range(FACTS)]
        codes = ["".join(draw.choice("0123456789") for _ in range(DIGITS)) for _ in range(FACTS)]
        facts = [_ids(tokenizer, f"\nThe code of {n} is {c}.\n") for n, c in zip(names, codes, strict=True)]
        asked = draw.randrange(FACTS)
        question = _ids(tokenizer, f"\nQuestion: what is the code of {names[asked]}? Answer:")
        if questions and len(question) != len(questions[0]):
            continue
        filler = length - len(question) - sum(map(len, facts))
        body, used = ids[used : used + filler], used + filler
        for place, fact in sorted(zip((draw.randrange(filler) for _ in facts), facts, strict=True), reverse=True):
            body = [*body[:place], *fact, *body[place:]]
        contexts.append(body)
        questions.append(question)
        answers.append(codes[asked])
    return Tasks(windows, torch.tensor(contexts), torch.tensor(questions), answers)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def feed(model: PreTrainedModel, ids: Tensor, cache: Any, start: int) -> Tensor:
    """Logits [n, t, V] of tokens fed one at a time at positions from `start` on."""
    parts = []
    for i in range(ids.shape[1]):
        where = torch.full((len(ids), 1), start + i)
        parts.append(model(ids[:, i : i + 1], past_key_values=cache, position_ids=where, use_cache=True).logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def continued(model: PreTrainedModel, tasks: Tasks, enter: Enter, inside: bool, size: Callable[[Any, Any], int]
              ) -> tuple[Tensor, int]:  # fmt: skip
    """Logits [n, TAIL, V] of the tails after contexts under a policy, and the cache's bytes after the contexts.

    inside: the policy acts on the tail too.
    """
    ids = tasks.texts
    with enter() as held:
        cache = model(ids[:, :CONTEXT], use_cache=True, logits_to_keep=1).past_key_values
        if inside:
            nbytes = size(held, cache)
            return feed(model, ids[:, CONTEXT:], cache, CONTEXT), nbytes
    nbytes = size(held, cache)
    return feed(model, ids[:, CONTEXT:], cache, CONTEXT), nbytes


def divergence(reference: Tensor, other: Tensor) -> float:
    """Mean KL in nats a token from reference logits to others, [n, t, V] each."""
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def recall(model: PreTrainedModel, tokenizer: Any, tasks: Tasks, enter: Enter, inside: bool, known: bool) -> float:
    """Share of exact answers. known: the question is part of the prompt; else it comes when the prompt is compressed."""
    prompt = torch.cat([tasks.contexts, tasks.questions], 1) if known else tasks.contexts

    def answer(cache: Any, logits: Tensor) -> Tensor:
        start, found = prompt.shape[1], []
        if not known:
            logits = feed(model, tasks.questions, cache, start)[:, -1:]
            start += tasks.questions.shape[1]
        for i in range(DIGITS + 2):
            found.append(logits[:, -1].argmax(-1, keepdim=True))
            logits = feed(model, found[-1], cache, start + i)
        return torch.cat(found, 1)

    with enter():
        out = model(prompt, use_cache=True, logits_to_keep=1)
        if inside:
            said = answer(out.past_key_values, out.logits)
    if not inside:
        said = answer(out.past_key_values, out.logits)
    right = [tokenizer.decode(s).strip().startswith(a) for s, a in zip(said.tolist(), tasks.answers, strict=True)]
    return sum(right) / len(right)
