"""Runs a model block by block, so that memory is one block plus activations whatever the depth."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from assay.measure.capture import Capture, OnProduct
from assay.model import memory
from assay.model.alike import alike
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.files import checksum, damaged, read_note, save_note
from assay.model.finite import finite
from assay.model.precision import rounded_maps
from assay.model.sites import Anatomy, Site, empty_model, survey
from assay.model.threads import WORTH_SHARING

Override = Callable[[Site, Tensor], Tensor]
"""Takes a site and its weight [out, in], float32; returns the weight to run with."""
Answering = Callable[[int, Tensor, Any], Tensor]
"""Takes a block's number, its input and its further arguments."""
LOGITS_AT_ONCE = 1 << 20
BATCH_TOKENS, ENOUGH_BATCHES = 2048, 4
CACHES = ("past_key_values", "layer_past")
"""What blocks call the cache."""


class _Stop(Exception):
    pass


class StreamedModel:
    """A model whose parameters are in memory only while they are needed.

    batch_tokens: how many tokens go through a block at once. compute: dtype of weights and activations while they are
    used; what goes in and out of blocks and the logits are float32 in any case.
    """

    def __init__(
        self, checkpoint: Checkpoint, override: Override | None = None, batch_tokens: int = BATCH_TOKENS,
        compute: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.checkpoint = checkpoint
        self.compute = compute
        self.batch_tokens = batch_tokens
        self.model = empty_model(checkpoint)
        self.anatomy: Anatomy = survey(checkpoint, self.model)
        self.override = override
        self.blocks = [self.model.get_submodule(name) for name in self.anatomy.block_names]
        self._answers = _Answers()
        for index, block in enumerate(self.blocks):
            block.forward = self._answers.instead_of(index, block.forward)
        self._sound: set[str] = set()
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._outside = [p for p in self.anatomy.parameters if not self._block_of(p)]
        self._sites_by_parameter: dict[str, list[Site]] = {}
        for site in self.anatomy.sites.values():
            self._sites_by_parameter.setdefault(site.parameter, []).append(site)

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        embedding = self.model.get_input_embeddings()
        if not isinstance(embedding, nn.Embedding):
            raise InputError(f"{self.anatomy.family} does not read tokens; assay measures text models only")
        return embedding.num_embeddings

    @cached_property
    def small(self) -> bool:
        """Whether batches are run side by side, a thread for each: products are too small to be divided by threads."""
        widths = (width for site in self.anatomy.sites.values() if site.block is not None for width in site.shape)
        return max(widths, default=0) ** 2 < WORTH_SHARING

    def few_logits(self, length: int) -> bool:
        """Whether that goes for the logits of windows of so many tokens too."""
        return self.small and length * self.vocabulary <= LOGITS_AT_ONCE

    def share(self, tokens: int, most: int) -> int:
        """Tokens of a batch of a short text, `most` of a long one: where batches run side by side, every thread has some."""
        return min(most, tokens // ENOUGH_BATCHES) if self.small else most

    @contextmanager
    def block(self, index: int, override: Override | None = None) -> Iterator[nn.Module]:
        """Block `index` with its weights loaded; they are released at the end."""
        name = self.anatomy.block_names[index]
        paths = [p for p in self.anatomy.parameters if p.startswith(name + ".")]
        with self._loaded(paths, override or self.override):
            yield self.blocks[index]

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The model with all of its weights loaded."""
        with self._loaded(list(self.anatomy.parameters), self.override):
            yield self.model

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [batch, length] -> input of the first block [batch, length, hidden], float32.

        Remembers, per batch, with which further arguments the model calls each block. Call inside `outside()`.
        """
        seen: list[Tensor] = []
        with self._answers.are(lambda index, hidden, call: self._note(index, hidden, call, seen)), suppress(_Stop):
            self.model(input_ids=ids)
        return seen[0]

    def run_block(
        self, index: int, hidden: Tensor, batch: int, cache: Any = None, watch: OnProduct | None = None, early: bool = False
    ) -> Tensor:
        """Output [batch, length, hidden] of a loaded block for one batch noted by `embed`.

        cache: gets its keys and values; watch: sees the products with its sites' weights, see `Capture`, also for `early`.
        """
        args, kwargs = self._calls[index][batch]
        if cache is not None:
            kwargs = kwargs | {name: cache for name in CACHES if name in kwargs}
        with rounded_maps(), self._watched(index, watch, early):
            result = self.blocks[index](hidden.to(self.compute), *args, **kwargs)
        return (result[0] if isinstance(result, tuple) else result).float()

    def _watched(self, index: int, watch: OnProduct | None, early: bool) -> AbstractContextManager[Any]:
        if watch is None:
            return nullcontext()
        return Capture(self.blocks[index], self.anatomy.block_names[index], self.anatomy.block_sites(index), watch, early)

    def logits(self, hidden: Tensor) -> Tensor:
        """Output of the last block -> logits [batch, length, vocabulary]. Call inside `outside()`."""

        def replay(index: int, _: Tensor, __: Any) -> Tensor:
            return hidden.to(self.compute)

        ids = torch.zeros(hidden.shape[:2], dtype=torch.long)
        with self._answers.are(replay):
            return self.model(input_ids=ids).logits.float()

    @contextmanager
    def outside(self, tail: bool, override: Override | None = None) -> Iterator[None]:
        """Load what lies outside the blocks: the tail (norms and head) or the front (the rest)."""
        embedding = self.model.get_input_embeddings()
        name = next((n for n, m in self.model.named_modules() if m is embedding), "")
        head = self.model.get_output_embeddings()
        head_name = next((n for n, m in self.model.named_modules() if m is head), "-")
        if tail and not self.anatomy.tied:
            paths = [p for p in self._outside if not p.startswith(name + ".")]
            with self._loaded(paths, override or self.override), self._blind(embedding):
                yield
        else:
            skip = head_name + "." if not tail and not self.anatomy.tied else "-"
            with self._loaded([p for p in self._outside if not p.startswith(skip)], override or self.override):
                yield

    def forget(self) -> None:
        """Drop the noted calls, before another set of windows."""
        self._calls.clear()

    @contextmanager
    def _blind(self, embedding: nn.Module) -> Iterator[None]:
        """The embedding gives zeros: its weights are not needed, only its shape."""
        width = int(embedding.weight.shape[1])  # type: ignore[union-attr, index, call-overload, arg-type]
        embedding.forward = lambda ids: torch.zeros(*ids.shape, width)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del embedding.forward

    def _block_of(self, path: str) -> bool:
        return any(path.startswith(name + ".") for name in self.anatomy.block_names)

    def _note(self, index: int, hidden: Tensor, call: tuple[Any, Any], seen: list[Tensor]) -> Tensor:
        if index == 0:
            seen.append(hidden.float())
        calls = self._calls.setdefault(index, [])
        first = self._calls[0]
        calls.append(_share(call, first[0]) if first else call)
        if index == len(self.blocks) - 1:
            raise _Stop
        return hidden

    @contextmanager
    def _loaded(self, paths: list[str], override: Override | None = None) -> Iterator[None]:
        homes = [(self._home(path), path) for path in paths if self.anatomy.parameters[path]]
        for (module, leaf), path in homes:
            value = self.value(path, override)
            value = value.to(self.compute) if value.is_floating_point() else value
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[leaf] = value
        self.model.tie_weights()
        try:
            with alike():
                yield
        finally:
            for (module, leaf), _ in homes:
                store = module._parameters if leaf in module._parameters else module._buffers
                store[leaf] = _emptied(store[leaf])
            self.model.tie_weights()
            memory.release()

    def _home(self, path: str) -> tuple[nn.Module, str]:
        module, _, leaf = path.rpartition(".")
        return self.model.get_submodule(module), leaf

    def _read(self, name: str) -> Tensor:
        value = self.checkpoint.read(name)
        if not value.is_floating_point():
            return value
        if name not in self._sound and not finite(value):
            raise InputError(f"{name} holds NaN or infinite weights; the source model is damaged")
        self._sound.add(name)
        return value.float()

    def value(self, path: str, override: Override | None = None) -> Tensor:
        """A parameter as the running model holds it, float32."""
        stored = self.anatomy.parameters[path]
        sites = self._sites_by_parameter.get(path, [])
        parts = [self._read(name) for name in stored]
        if len(parts) > 1:
            if override is not None:
                parts = [override(site, part) for site, part in zip(sites, parts, strict=True)]
            experts = len({site.expert for site in sites})
            return torch.stack(parts).unflatten(0, (experts, -1)).flatten(1, 2)
        value = parts[0]
        if override is None or not sites:
            return value
        new = override(sites[0], value.T.contiguous() if sites[0].transposed else value)
        return new.T.contiguous() if sites[0].transposed else new


class _Answers(threading.local):
    """What blocks answer in the present thread in place of running."""

    given: Answering | None = None

    @contextmanager
    def are(self, given: Answering) -> Iterator[None]:
        """Every block answers with `given`'s tensor."""
        self.given = given
        try:
            yield
        finally:
            self.given = None

    def instead_of(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of block `index` while there is no other answer."""

        @wraps(forward)
        def answered(*args: Any, **kwargs: Any) -> Any:
            if self.given is None:
                return forward(*args, **kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            return self.given(index, hidden.as_subclass(Tensor), (args[1:], kwargs)).as_subclass(_Answer)

        return answered


class _Answer(Tensor):
    """A block's output for models that take it as it is and for models that take item 0 of a tuple."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Any:
        return self.as_subclass(Tensor) if isinstance(index, int) else self.as_subclass(Tensor)[index]


def _emptied(value: Any) -> Any:
    empty = torch.empty_like(value, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty


def _share(call: Any, earlier: Any) -> Any:
    """`call` with every tensor that equals its counterpart in `earlier` replaced by that one."""
    if isinstance(call, Tensor):
        same = isinstance(earlier, Tensor) and call.shape == earlier.shape and torch.equal(call, earlier)
        return earlier if same else call
    if isinstance(call, dict):
        return {k: _share(v, earlier.get(k) if isinstance(earlier, dict) else None) for k, v in call.items()}
    if isinstance(call, (tuple, list)):
        others = earlier if isinstance(earlier, (tuple, list)) and len(earlier) == len(call) else [None] * len(call)
        return type(call)(_share(a, b) for a, b in zip(call, others, strict=True))
    return call


class Activations:
    """Hidden states by (name, batch) in files with checksums, read without memory maps so that they don't count as resident.

    `batch_tokens` and `get` raise InputError for files that are damaged or gone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def batch_tokens(self, wanted: int) -> int:
        """The size of batches that lie here already, or the one wanted, which is noted."""
        note = self.folder / "batch_tokens.json"
        if not note.exists():
            save_note(note, {"tokens": wanted})
        return int(read_note(note, "damaged")["tokens"])

    def put(self, name: str, batch: int, value: Tensor) -> None:
        path = self.folder / f"{name}.{batch}.npy"
        try:
            with path.open("wb") as file:
                np.save(file, value.detach().numpy())
                file.write(checksum(value).to_bytes(4, "little"))
        except OSError as error:
            if error.errno is not None:
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error  # numpy gives no number

    def get(self, name: str, batch: int) -> Tensor:
        path = self.folder / f"{name}.{batch}.npy"
        try:
            with path.open("rb") as file:
                value = torch.from_numpy(np.load(file))
                intact = int.from_bytes(file.read(), "little") == checksum(value)
        except (ValueError, EOFError, SyntaxError, FileNotFoundError) as error:
            raise damaged(path, str(error)) from error
        if not intact:
            raise damaged(path, "its checksum is wrong")
        return value

    def drop(self, name: str) -> None:
        for path in self.folder.glob(f"{name}.*.npy"):
            path.unlink()


def batches(ids: Tensor, tokens: int = BATCH_TOKENS) -> list[Tensor]:
    """Windows [n, length] in batches of about `tokens` tokens."""
    return list(ids.split(max(1, tokens // ids.shape[1])))


def micro(hidden: Tensor, vocabulary: int) -> list[Tensor]:
    """A batch split so that its logits stay within a bounded number of elements."""
    return list(hidden.split(max(1, LOGITS_AT_ONCE // (hidden.shape[1] * vocabulary))))


def read_weight(model: StreamedModel, site: Site) -> Tensor:
    """Weight of a site as float32 [out, in], whatever its storage order."""
    value = model.checkpoint.read(site.name).float()
    return value.T.contiguous() if site.transposed else value


def token_divergences(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL in nats from reference to candidate at each predicting token: logits [b, t, v] of both -> [b, t - 1]."""
    p, q = reference[:, :-1].log_softmax(-1), candidate[:, :-1].log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Loss in nats of each predicted token: logits [b, t, v], ids [b, t] -> [b, t - 1]."""
    return functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
