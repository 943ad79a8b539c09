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
# By L and then k, from 1: what `permuted_quantiles` takes. Part of the stored format, so they never change.
# Found by scripts/search_trellis.py.
_TABLES: dict[int, tuple[tuple[int, int, int, int], ...]] = {
    4: (
        (9, 3, 1, 93), (13, 1, 2, 119), (3, 3, 1, 135), (1, 1, 1, 148),
    ),
    6: (
        (33, 11, 2, 95), (15, 7, 2, 108), (45, 7, 3, 116), (41, 1, 5, 133),
        (49, 15, 2, 139), (1, 27, 1, 148),
    ),
    8: (
        (119, 5, 5, 90), (191, 21, 3, 105), (225, 11, 4, 113), (45, 1, 4, 115),
        (143, 7, 5, 129), (95, 7, 5, 141), (105, 31, 3, 150), (1, 1, 5, 161),
    ),
    10: (
        (389, 3, 8, 90), (793, 19, 5, 104), (121, 13, 6, 107), (959, 21, 4, 111),
        (331, 1, 5, 117), (543, 13, 6, 123), (575, 1, 9, 134), (989, 127, 1, 142),
    ),
    12: (
        (1799, 13, 8, 89), (927, 25, 7, 103), (3599, 243, 4, 105), (3847, 5, 8, 109),
        (1665, 17, 7, 111), (1235, 29, 6, 111), (3451, 15, 8, 119), (3455, 13, 8, 128),
    ),
    14: (
        (8503, 11, 10, 88), (12147, 39, 7, 101), (6169, 61, 7, 104), (9215, 379, 5, 107),
        (1537, 109, 6, 110), (12341, 1989, 3, 110), (6527, 79, 7, 109), (11569, 5, 8, 116),
    ),
    16: (
        (30149, 15, 12, 88), (17069, 133, 6, 102), (24209, 5, 9, 105), (39985, 41, 10, 107),
        (38361, 9, 10, 109), (27223, 1, 13, 110), (5675, 127, 8, 110), (38887, 13, 12, 110),
    ),
}  # fmt: skip


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
        if not 1 <= rate <= 8 or rate % 0.25:
            raise InputError(f"a trellis can't have {rate:g} bits a weight; use 1 to 8 in steps of 0.25")
        low, above = divmod(int(4 * rate), 4)
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
    return permuted_quantiles(state_bits, *_TABLES[state_bits][k - 1])


def permuted_quantiles(state_bits: int, a: int, b: int, split: int, percent: int) -> Tensor:
    """A table of values of the states, float32 [2^L]: quantiles of a Gaussian of deviation `percent` / 100.

    State low + 2^split high has rank a low + 2^split b high + c modulo 2^L; a and b are odd, so each rank is taken once,
    and c makes the complement of a state its negative. With good a and b the states that come from one state, and
    those that lead to one, have values spread over the whole range. Values are multiples of 2^-16, so that the last
    bit of a quantile function can't change them.
    """
    count = 1 << state_bits
    states = torch.arange(count)
    low, high = states & ((1 << split) - 1), states >> split
    c = -(1 + (a * ((1 << split) - 1) - (b << split)) % count) // 2
    ranks = (a * low + (b * high << split) + c) % count
    quantiles = torch.special.ndtri((ranks.double() + 0.5) / count) * (percent / 100)
    return ((quantiles * 65536).round() / 65536).float()
