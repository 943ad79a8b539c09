"""What policies that mask the inputs of linear maps share: thresholds, their greedy allocation, and the masked maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from assay.model.errors import InputError
from assay.runtime.skip import skip_rows

SAMPLED = 1 << 18
STEP = 0.1
_Self = TypeVar("_Self", bound="Sparse")


class Turn:
    """Inputs in another orthogonal basis [in, in], turned once for all `readers` that get the same tensor."""

    def __init__(self, basis: Tensor, readers: int) -> None:
        self.basis, self.readers = basis, readers
        self._last: tuple[Tensor, Tensor] | None = None
        self._left = 0

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., in]."""
        if self._last is None or self._last[0] is not x:
            self._last, self._left = (x, x @ self.basis.to(x.dtype)), self.readers
        turned, self._left = self._last[1], self._left - 1
        if not self._left:
            self._last = None
        return turned


@dataclass(frozen=True, eq=False)
class Gate:
    """Which inputs of a map count: |x| * scale above a threshold; the rest goes through factors [in, r] and [r, out], if any.

    turn: the basis that inputs are brought to first; `gated` brings the weight to it.
    """

    threshold: float
    scale: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    turn: Turn | None = None

    def kept(self, x: Tensor) -> Tensor:
        """bool [..., in], of inputs in the gate's basis."""
        size = x.abs() if self.scale is None else x.abs() * self.scale
        return size > self.threshold

    def apply(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """Output [..., out] of the masked map."""
        x = x if self.turn is None else self.turn(x)
        kept = self.kept(x)
        if _skippable(linear, x):
            out = skip_rows(x.flatten(), linear.weight.T, kept.flatten()).view(*x.shape[:-1], -1)
            out = out if linear.bias is None else out + linear.bias
        else:
            out = functional.linear(x * kept, linear.weight, linear.bias)
        if self.factors is None:
            return out
        first, second = self.factors
        return out + ((x * ~kept) @ first.to(x.dtype)) @ second.to(x.dtype)


@dataclass(frozen=True, eq=False)
class Sparse:
    """Inputs of every linear map in the blocks, a share `sparsity` of which is left out, for each token.

    greedy: unequal shares in a block, raised where the block's output suffers least; prompt: mask prompts too, not only
    single tokens; gates: by the map's name, set by `calibrated`.
    """

    verb: ClassVar[str] = "attach"
    needs: ClassVar[tuple[str, ...]] = ("calibration",)

    sparsity: float = 0.5
    greedy: bool = False
    prompt: bool = True
    gates: Mapping[str, Gate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity={self.sparsity:g}; give a share from 0 to below 1")

    def scale(self, weight: Tensor) -> Tensor | None:
        """Factor of each input's size, [in]; weight: [out, in]. None for 1."""
        return None

    def turns(self, maps: Mapping[str, nn.Linear]) -> dict[str, Turn]:
        """Bases for the inputs of some of a block's maps."""
        return {}

    def gate(self, weight: Tensor, inputs: Tensor, sparsity: float) -> Gate:
        """The gate of a map from a sample of its inputs [n, in]."""
        scale = self.scale(weight)
        return Gate(quantile(inputs.abs() if scale is None else inputs.abs() * scale, sparsity), scale)

    @torch.no_grad()
    def calibrated(self: _Self, model: PreTrainedModel, ids: Tensor) -> _Self:
        """With gates measured on token ids [windows, tokens]; one block's inputs are held at a time."""
        if ids.ndim != 2 or not ids.numel():
            raise InputError(f"calibration of shape {list(ids.shape)}; give token ids [windows, tokens]")
        gates: dict[str, Gate] = {}
        for prefix, block in blocks(model):
            maps = linears(block)
            seen = _inputs(model, block, maps, ids)
            seen = replace(seen, turns=self.turns(maps))
            shares = dict.fromkeys(maps, self.sparsity)
            if self.greedy and self.sparsity:
                shares = self._greedy(block, maps, seen)
            for name, linear in maps.items():
                gates[f"{prefix}.{name}"] = self._made(name, linear, seen, shares[name])
        return replace(self, gates=gates)

    @contextmanager
    def wrapped(self, model: PreTrainedModel) -> Iterator[None]:
        """The model with its maps masked."""
        maps = {f"{prefix}.{name}": linear for prefix, block in blocks(model) for name, linear in linears(block).items()}
        with gated(maps, self.gates, self.prompt):
            yield

    def _made(self, name: str, linear: nn.Linear, seen: Seen, share: float) -> Gate:
        turn, weight, inputs = seen.turns.get(name), linear.weight.float(), seen.of[name]
        return self.gate(weight, inputs, share) if turn is None else replace(
            self.gate(weight @ turn.basis, inputs @ turn.basis, share), turn=turn)  # fmt: skip

    def _greedy(self, block: nn.Module, maps: Mapping[str, nn.Linear], seen: Seen) -> dict[str, float]:
        """Shares that average to the target over the block's weights."""
        total = sum(m.weight.numel() for m in maps.values())
        weight = {name: m.weight.numel() / total for name, m in maps.items()}
        shares = dict.fromkeys(maps, 0.0)
        wanted = seen.run(block)

        def error(tried: Mapping[str, float]) -> float:
            gates = {n: self._made(n, m, seen, tried[n]) for n, m in maps.items() if tried[n] > 0}
            with gated(maps, gates, True):
                return float((seen.run(block) - wanted).square().sum())

        while (spent := sum(weight[n] * shares[n] for n in maps)) < self.sparsity - 1e-9:
            grown = {n: min(shares[n] + min(STEP, self.sparsity - spent) / (weight[n] * len(maps)), 0.95) for n in maps}
            choices = [n for n in maps if grown[n] > shares[n]]
            best = min(choices, key=lambda n: error(shares | {n: grown[n]}))
            room = (self.sparsity - spent) / weight[best]
            shares[best] = min(grown[best], shares[best] + room)
        return shares


@dataclass(frozen=True, eq=False)
class Seen:
    """Inputs of a block's maps [n, in], how the block was called with the first two windows, and bases of inputs."""

    of: dict[str, Tensor]
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    turns: Mapping[str, Turn] = field(default_factory=dict)

    def run(self, block: nn.Module) -> Tensor:
        """Outputs of the block for all calls [n, hidden]."""
        found = [block(*args, **kwargs) for args, kwargs in self.calls]
        return torch.cat([(x[0] if isinstance(x, tuple) else x).flatten(0, 1) for x in found]).float()


def blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The decoder blocks, by name."""
    return [(str(i), block) for i, block in enumerate(model.base_model.layers)]  # type: ignore[arg-type]


def activations(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """The activation of each feed-forward block: the module that holds it, and its name there. Raises InputError."""
    found = []
    for _, block in blocks(model):
        names = [name for name, m in block.mlp.named_children() if not any(isinstance(x, nn.Linear) for x in m.modules())]  # type: ignore[union-attr]
        if len(names) != 1:
            raise InputError(f"{model.config.model_type}: its feed-forward blocks have {len(names)} activations; one is needed")
        found.append((block.mlp, names[0]))
    return found  # type: ignore[return-value]


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of a block, by name."""
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def _skippable(linear: nn.Linear, x: Tensor) -> bool:
    """One token on the CPU in float32, of a map whose weight lies input by input."""
    single = x.numel() == x.shape[-1] and x.device.type == "cpu" and x.dtype == torch.float32
    return single and not torch.is_grad_enabled() and linear.weight.T.is_contiguous()


def quantile(x: Tensor, share: float) -> float:
    """The value that a share of the numbers doesn't exceed; below all for 0."""
    if share <= 0:
        return -1.0
    flat = x.flatten()
    return float(flat.kthvalue(min(max(round(share * len(flat)), 1), len(flat)))[0])


@contextmanager
def gated(maps: Mapping[str, nn.Linear], gates: Mapping[str, Gate], prompt: bool) -> Iterator[None]:
    """Linear maps that pass their inputs through gates; meanwhile their weights lie in memory input by input."""

    def stand_in(linear: nn.Linear, gate: Gate) -> Any:
        plain = linear.forward

        def act(x: Tensor) -> Tensor:
            if prompt or x.shape[-2] == 1:
                return gate.apply(linear, x)
            return plain(x if gate.turn is None else gate.turn(x))

        return act

    chosen = [(maps[name], gate) for name, gate in gates.items()]
    before = [linear.weight.data for linear, _ in chosen]
    for linear, gate in chosen:
        linear.forward = stand_in(linear, gate)  # type: ignore[method-assign]
        if gate.turn is not None:
            linear.weight.data = (linear.weight.data.float() @ gate.turn.basis).to(linear.weight.dtype)
        if linear.weight.device.type == "cpu" and linear.weight.dtype == torch.float32:
            linear.weight.data = linear.weight.data.T.contiguous().T
    try:
        yield
    finally:
        for (linear, _), weight in zip(chosen, before, strict=True):
            del linear.forward
            linear.weight.data = weight


def _inputs(model: PreTrainedModel, block: nn.Module, maps: Mapping[str, nn.Linear], ids: Tensor) -> Seen:
    held: dict[str, list[Tensor]] = {name: [] for name in maps}
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hooks = [block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)]
    for name, linear in maps.items():
        hooks.append(linear.register_forward_pre_hook(lambda _, args, n=name: held[n].append(args[0].flatten(0, -2).float())))
    try:
        for part in ids.split(2):
            model.base_model(input_ids=part.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return Seen({n: _thinned(torch.cat(x)) for n, x in held.items()}, calls[:1])


def _thinned(x: Tensor) -> Tensor:
    """Rows at even distances, so that there are at most SAMPLED numbers."""
    most = max(SAMPLED // x.shape[1], 1)
    return x if len(x) <= most else x[torch.arange(most) * len(x) // most]
