"""Bitshift trellis codes: how a stream of bits stands for Gaussian numbers, and how to read it.

A state is the last L bits of a stream. Each step shifts in the next few bits and yields the value that a fixed table
gives the new state, so a number costs only the bits of its step, and still depends on L of them. The stream goes
round: the first states look back into its end, so it needs no start. Every state can be cut out of the stream at
once, which makes reading parallel.

Idea: Trellis Coded Quantization (Marcellin and Fischer, 1990); shift register and tail-biting: QTIP (Tseng et al.,
2024); fractional rates by steps of two widths: after Q-Palette (Lee et al., 2025). The tables are our own: quantiles of
a Gaussian, permuted by multiplication modulo 2^L.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from assay.model.errors import InputError

STATE_BITS = 12
"""Default L: within 0.1 bit of the rate-distortion bound at 2, 3 and 4 bits."""
WORD = 32
_STATES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Trellis:
    """A code for sequences: `steps` are the bits that successive steps shift in, again and again.

    steps: 1 to 8 bits each. state_bits: L, one of 4, 6, ... 16, at least the widest step.
    Raises InputError for anything else.
    """

    steps: tuple[int, ...]
    state_bits: int = STATE_BITS

    def __post_init__(self) -> None:
        if self.state_bits not in _TABLES:
            known = ", ".join(map(str, _TABLES))
            raise InputError(f"a trellis with states of {self.state_bits} bits isn't known; use one of {known}")
        widest = len(_TABLES[self.state_bits])
        if not self.steps or not all(1 <= k <= widest for k in self.steps):
            steps = ", ".join(map(str, self.steps)) or "none"
            raise InputError(f"a trellis with states of {self.state_bits} bits has steps of 1 to {widest} bits, not {steps}")

    @classmethod
    def of_rate(cls, rate: float, state_bits: int = STATE_BITS) -> Trellis:
        """The trellis of `rate` bits a weight, a multiple of 0.25 from 1 to 8: 2.25 has steps of 2, 2, 2, 3 bits."""
        quarters = round(4 * rate)
        if 4 * rate != quarters or not 4 <= quarters <= 32:
            raise InputError(f"a trellis can't have {rate:g} bits a weight; use 1 to 8 in steps of 0.25")
        low, above = divmod(quarters, 4)
        patterns = ((low,), (low, low, low, low + 1), (low, low + 1), (low, low + 1, low + 1, low + 1))
        return cls(patterns[above], state_bits)

    @property
    def rate(self) -> float:
        """Bits a weight of a long sequence."""
        return sum(self.steps) / len(self.steps)

    def bits(self, length: int) -> int:
        """Exact bits of a sequence of `length` numbers. Raises InputError if they are too few to fill a state."""
        rounds, rest = divmod(length, len(self.steps))
        bits = rounds * sum(self.steps) + sum(self.steps[:rest])
        if bits < self.state_bits:
            raise InputError(f"{length} weights make {bits} bits, fewer than a trellis state of {self.state_bits}; use fewer")
        return bits

    def words(self, length: int) -> int:
        """32-bit words that hold a sequence of `length` numbers."""
        return -(-self.bits(length) // WORD)

    def tables(self) -> Tensor:
        """What a state decodes to at each turn of the pattern, float32 [len(steps), 2^L]; for unit variance."""
        return torch.stack([_table(self.state_bits, k) for k in self.steps])

    def decode(self, stream: Tensor, length: int) -> Tensor:
        """The numbers of each sequence, float32 [n, length].

        stream: int32 [n, words(length)], each row one stream, most significant bits first, padded with zeros.
        Raises InputError if its shape doesn't fit.
        """
        if stream.shape[1:] != (self.words(length),):
            raise InputError(
                f"a trellis stream of {length} weights has {self.words(length)} words a row, "
                f"but its shape is {list(stream.shape)}; the file is damaged or has other settings"
            )
        phases = torch.arange(length, device=stream.device) % len(self.steps)
        ends = torch.tensor(self.steps, device=stream.device)[phases].cumsum(0)
        tables = self.tables().to(stream.device).flatten()
        values = torch.empty(len(stream), length, device=stream.device)
        rows = max(1, _STATES_AT_ONCE // length)
        for part, into in zip(stream.split(rows), values.split(rows), strict=True):
            into.copy_(tables[self._states(part, ends) + (phases << self.state_bits)])
        return values

    def _states(self, stream: Tensor, ends: Tensor) -> Tensor:
        """The L bits before each of `ends` [length] (the last is where the stream ends), int64 [n, length]."""
        words = torch.nn.functional.pad(stream.long() & 0xFFFFFFFF, (1, 1))
        words[:, 0] = self._cut(words, ends[-1:])[:, 0]
        return self._cut(words, ends)

    def _cut(self, words: Tensor, ends: Tensor) -> Tensor:
        place = ends + (WORD - self.state_bits)
        word, offset = place // WORD, place % WORD
        pairs = words[:, word] << WORD | words[:, word + 1]
        return pairs >> (2 * WORD - self.state_bits - offset) & ((1 << self.state_bits) - 1)


@cache
def _table(state_bits: int, k: int) -> Tensor:
    """Values of the states after a step of k bits, float32 [2^L].

    State low + 2^h high has rank a low + 2^h b high + c modulo 2^L among 2^L quantiles of a Gaussian; a, b are odd, so
    each rank is taken once, and c makes the complement of a state its negative. States that come from the same one,
    or lead to the same one, get values spread over the whole range. Values are multiples of 2^-16, so that
    the last bit of a quantile function can't change them.
    """
    a, b, h, percent = _TABLES[state_bits][k - 1]
    count = 1 << state_bits
    states = torch.arange(count)
    low, high = states & ((1 << h) - 1), states >> h
    centre = -(1 + (a * ((1 << h) - 1) - (b << h)) % count) // 2
    ranks = (a * low + (b * high << h) + centre) % count
    quantiles = torch.special.ndtri((ranks.double() + 0.5) / count) * (percent / 100)
    return ((quantiles * 65536).round() / 65536).float()


_TABLES = {12: tuple((1597, 2531, 6, 100) for _ in range(8))}
