"""Value tables: the unscaled levels of number formats, as sorted tuples for `TableGrid`."""

from statistics import NormalDist


def float_values(
    exponent_bits: int, mantissa_bits: int, bias: float | None = None, *, infinities: bool = False, nans: bool = False
) -> tuple[float, ...]:
    """All finite values of a float with a sign, `exponent_bits` (1 or more) and `mantissa_bits`, subnormals included.

    bias: of the exponent, any real number; None: 2^(exponent_bits - 1) - 1. infinities: the largest exponent
    is kept for infinities and NaNs, as in IEEE 754. nans: only the largest code of each sign is, for a NaN.
    E2M1, E2M3 and E3M2 of the Microscaling formats (OCP, 2023) keep none; E4M3 is `nans`, E5M2 `infinities`
    ("FP8 formats for deep learning", 2022).
    """
    positive = _magnitudes(exponent_bits, mantissa_bits, bias, infinities, nans)
    return (*(-x for x in reversed(positive[1:])), *positive)


def float_codes(exponent_bits: int, mantissa_bits: int, *, infinities: bool = False, nans: bool = False) -> tuple[int, ...]:
    """The bit pattern of each of `float_values`: sign, exponent, mantissa from the highest bit down; +0 for 0."""
    count = len(_magnitudes(exponent_bits, mantissa_bits, None, infinities, nans))
    sign = 1 << (exponent_bits + mantissa_bits)
    return (*(sign | code for code in reversed(range(1, count))), *range(count))


def _magnitudes(exponent_bits: int, mantissa_bits: int, bias: float | None, infinities: bool, nans: bool) -> list[float]:
    """The finite values from 0 up, one per code."""
    if exponent_bits < 1 or mantissa_bits < 0 or exponent_bits + mantissa_bits > 7:
        raise ValueError(f"a float of at most 8 bits has an exponent; E{exponent_bits}M{mantissa_bits} is none")
    bias = 2 ** (exponent_bits - 1) - 1 if bias is None else bias
    unit = 2.0 ** (1 - bias - mantissa_bits)
    codes = 2 ** (exponent_bits + mantissa_bits) - (2**mantissa_bits if infinities else int(nans))
    found = []
    for code in range(codes):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        found.append((mantissa + (2**mantissa_bits if exponent else 0)) * 2 ** max(exponent - 1, 0) * unit)
    return found


def quantile_values(bits: int) -> tuple[float, ...]:
    """The `bits` wide (2 to 4) normal-float of QLoRA (2023): quantiles of a Gaussian, 0 among them, within [-1, 1].

    2^(bits - 1) levels above 0, one less below, each side equally spaced in probability from 1/2 to a
    tail. The tail is the mean of those of two even divisions, into 2^bits and into 2^bits - 1 levels.
    At 4 bits this is NF4.
    """
    if not 2 <= bits <= 4:
        raise ValueError(f"a normal-float has 2 to 4 bits, not {bits}")
    tail = (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
    half = 2 ** (bits - 1)
    below, above = (
        [NormalDist().inv_cdf(0.5 + (0.5 - tail) * i / count) for i in range(1, count + 1)] for count in (half - 1, half)
    )
    return (*(-x / below[-1] for x in reversed(below)), 0.0, *(x / above[-1] for x in above))


def power_of_two(bits: int) -> tuple[float, ...]:
    """+-2^S with S = 0 ... 2^(bits - 1) - 1 and no 0: the shift weights of DenseShift (2023), 1 to 6 bits."""
    if not 1 <= bits <= 6:
        raise ValueError(f"shift weights have 1 to 6 bits, not {bits}")
    powers = [2.0**shift for shift in range(2 ** (bits - 1))]
    return (*(-x for x in reversed(powers)), *powers)


def power_law(bits: int, exponent: float) -> tuple[float, ...]:
    """sign(k) |k|^(1/exponent), |k| < K = 2^(bits - 1), scaled to end at K - 1 (NUPES, 2023); 2 to 8 bits.

    exponent 1: the integers -(K - 1) ... K - 1 exactly; below 1 levels are denser near 0.
    """
    if not 2 <= bits <= 8 or not exponent > 0:
        raise ValueError(f"a power law has 2 to 8 bits and an exponent above 0, not {bits} and {exponent}")
    top = 2 ** (bits - 1) - 1
    positive = [float(top ** (1 - 1 / exponent) * k ** (1 / exponent)) for k in range(1, top + 1)]
    return (*(-x for x in reversed(positive)), 0.0, *positive)


TERNARY = (-1.0, 0.0, 1.0)
BINARY = (-1.0, 1.0)
