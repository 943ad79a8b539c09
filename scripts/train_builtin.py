"""Trains the built-in model on the library text of this CPython and exports it.

    PYTHONPATH=src python scripts/train_builtin.py --minutes 62 --threads 4

A run that was stopped goes on from ``--checkpoint`` when started again.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from assay.builtin.corpus import SPLITS, Split, corpus

REPOSITORY = Path(__file__).resolve().parents[1]
END = "<|endoftext|>"
SHAPE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
POSITIONS, WINDOW, BATCH = 1024, 512, 16
WARMUP = 0.02
"""Share of the run over which the learning rates rise."""
MUON_LR, ADAM_LR, WEIGHT_DECAY = 0.02, 3e-3, 0.2
SEED, LOSS_WINDOWS = 0, 320
EXPORT_EVERY = 540.0
"""Seconds between exports."""
SIZE_LIMIT = 12_000_000


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"], special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((d.text for d in corpus("train")), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, split: Split) -> Tensor:
    """The split as one stream of token ids [tokens], an end token before each document."""
    end = tokenizer.token_to_id(END)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([d.text for d in corpus(split)]):
        ids += [end, *encoding.ids]
    return torch.tensor(ids)


def windows(stream: Tensor, step: int) -> Tensor:
    """The windows [BATCH, WINDOW] of one step; each epoch shifts and shuffles anew."""
    per_epoch = (len(stream) - WINDOW) // (WINDOW * BATCH)
    epoch, position = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(SEED + epoch)
    shift = int(torch.randint(WINDOW, (1,), generator=generator))
    order = torch.randperm(per_epoch * BATCH, generator=generator)
    chosen = order[position * BATCH : (position + 1) * BATCH]
    return torch.stack([stream[i : i + WINDOW] for i in (chosen * WINDOW + shift).tolist()])


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return LlamaForCausalLM(
        LlamaConfig(
            **SHAPE, max_position_embeddings=POSITIONS, tie_word_embeddings=True,
            rope_parameters=rope, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def window_loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean next-token loss, in nats, over ``ids`` [windows, tokens], in bf16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def stream_loss(model: LlamaForCausalLM, stream: Tensor) -> float:
    """Mean loss over the first ``LOSS_WINDOWS`` disjoint windows of a stream."""
    count = min(len(stream) // WINDOW, LOSS_WINDOWS)
    cut = stream[: count * WINDOW].view(count, WINDOW)
    parts = [(len(part), float(window_loss(model, part))) for part in cut.split(BATCH)]
    return sum(n * loss for n, loss in parts) / count


def learning_rate(progress: float) -> float:
    """The factor on every learning rate: up, then straight down to zero."""
    return min(progress / WARMUP, (1 - progress) / (1 - WARMUP)) if progress < 1 else 0.0


class Run:
    """Model, optimisers and clocks of a training run, as one checkpoint."""

    def __init__(self, checkpoint: Path, minutes: float, threads: int):
        self.checkpoint, self.seconds, self.threads = checkpoint, 60 * minutes, threads
        self.step, self.before, self.started = 0, 0.0, time.monotonic()
        self.model = new_model()
        inner = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        taken = {id(p) for p in inner}
        rest = [p for p in self.model.parameters() if id(p) not in taken]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(inner, lr=MUON_LR, weight_decay=WEIGHT_DECAY),
            torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        if checkpoint.exists():
            self._load()
        else:
            self.tokenizer = train_tokenizer()
        self.streams = {split: encode(self.tokenizer, split) for split in SPLITS}

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, over all the starts of this run."""
        return self.before + time.monotonic() - self.started

    def update(self, loss: Callable[[LlamaForCausalLM, Tensor], Tensor]) -> float:
        factor = learning_rate(self.elapsed / self.seconds)
        value = loss(self.model, windows(self.streams["train"], self.step))
        value.backward()
        for optimizer, peak in zip(self.optimizers, (MUON_LR, ADAM_LR), strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return float(value.detach())

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(), "tokenizer": self.tokenizer.to_str(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step, "elapsed": self.elapsed,
        }  # fmt: skip
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, part := self.checkpoint.with_suffix(".part"))
        part.replace(self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.tokenizer = Tokenizer.from_str(state["tokenizer"])
        self.step, self.before = state["step"], state["elapsed"]

    def export(self, out: Path) -> None:
        """Writes model, tokenizer and card, each file replaced in one move."""
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as name:
            folder = Path(name)
            rounded = new_model().bfloat16()
            rounded.load_state_dict(self.model.state_dict())
            rounded.save_pretrained(folder)
            ends = {"bos_token": END, "eos_token": END, "model_max_length": POSITIONS}
            PreTrainedTokenizerFast(tokenizer_object=self.tokenizer, **ends).save_pretrained(folder)
            size = sum(path.stat().st_size for path in folder.iterdir())
            assert size <= SIZE_LIMIT, f"{size} bytes"
            losses = {s: stream_loss(rounded, t) for s, t in self.streams.items()}
            (folder / "README.md").write_text(card(self, losses), encoding="utf-8")
            for path in folder.iterdir():
                path.chmod(0o644)
                path.replace(out / path.name)
        print(f"exported at step {self.step}: {losses}", flush=True)


CARD = """\
# The built-in model

A Llama-type language model of {parameters:,} parameters, in bf16, for tests, examples and method comparisons where no other model is at hand. This project trained it, with `scripts/train_builtin.py`.

| | |
|---|---|
| shape | {shape}, tied embeddings, RoPE base 10,000 |
| trained on | library source and `pydoc_data` topics of CPython {python}: {train:,} tokens, {chars:.1f} characters a token |
| split | by module family and topic family, from a SHA-256 of the name alone (`assay/builtin/corpus.py`): the submodules and tests of a package, and topics that quote one another, stay together |
| held out | calibration {calibration:,} tokens, evaluation {evaluation:,} tokens |
| steps | {step:,} of {batch} windows of {window} tokens: {seen:,} tokens seen, {epochs:.1f} passes |
| recipe | Muon (peak {muon}) for the block matrices, AdamW (peak {adam}) for the rest; warm-up, then linear to zero by wall clock; seed {seed} |
| wall time | {minutes:.0f} minutes, {threads} threads of a {cores}-core {machine} CPU, bf16 autocast, no GPU |

| split | loss (nats a token) | perplexity |
|---|---|---|
{rows}

Loss of the shipped bf16 weights over at most the first {most} disjoint windows of {window} tokens; an end token precedes each document. The training row is text the model has seen.

Limits: it writes what looks like Python source and reference prose, and knows nothing else: no chat, no facts, no other language. It was never trained beyond {window} tokens (the configuration allows {positions}). Another CPython version has slightly other text under the same names: losses differ a little there. A prompt should not end in white space: that is half a token.

Licence: the weights, Apache-2.0; the training text, CPython's library and documentation, under the Python Software Foundation licence.
"""  # noqa: E501


def card(run: Run, losses: dict[Split, float]) -> str:
    """The model card, with the numbers of this run."""
    lengths = {split: len(stream) for split, stream in run.streams.items()}
    seen = run.step * BATCH * WINDOW
    return CARD.format(
        **lengths, parameters=run.model.num_parameters(), python=platform.python_version(),
        shape=", ".join(f"{k.removeprefix('num_').replace('_', ' ')} {SHAPE[k]}" for k in SHAPE),
        chars=sum(len(d.text) for d in corpus("train")) / lengths["train"],
        step=run.step, batch=BATCH, window=WINDOW, seen=seen, epochs=seen / lengths["train"],
        muon=MUON_LR, adam=ADAM_LR, seed=SEED, minutes=min(run.elapsed, run.seconds) / 60,
        threads=run.threads, cores=os.cpu_count(), machine=platform.machine(), most=LOSS_WINDOWS, positions=POSITIONS,
        rows="\n".join(f"| {s} | {v:.3f} | {math.exp(v):.2f} |" for s, v in losses.items()),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=62)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "src/assay/builtin/model")
    parser.add_argument("--checkpoint", type=Path, default=REPOSITORY / "build/builtin.pt")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = Run(arguments.checkpoint, arguments.minutes, arguments.threads)
    loss = torch.compile(window_loss)
    exported = run.elapsed
    while run.elapsed < run.seconds:
        value = run.update(loss)
        if run.step % 50 == 0:
            print(f"{run.step} {run.elapsed:.0f}s loss {value:.3f}", flush=True)
        if run.elapsed - exported > EXPORT_EVERY:
            exported = run.elapsed
            run.save()
            run.export(arguments.out)
    run.save()
    run.export(arguments.out)


if __name__ == "__main__":
    main()
