"""The same numbers from any number of threads: where torch's own division of the work would change last bits.

An elementwise function computes the last few numbers of a thread's share, those that don't fill a vector, with other
instructions than the rest. So it runs in as many threads as have shares of whole vectors. Products are MKL's, which divides long
sums by threads unless the environment says `MKL_CBWR=AUTO,STRICT` before its first call; the command line sets that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GRAIN = 1 << 15
"""Numbers below which torch doesn't divide an elementwise function."""
STRIDE = 64
"""A multiple of the numbers that any processor's loop takes at once."""
_aten = torch.ops.aten
ELEMENTWISE = frozenset({
    _aten.silu, _aten.silu_, _aten.silu_backward, _aten.gelu, _aten.gelu_, _aten.gelu_backward, _aten.sigmoid, _aten.sigmoid_,
    _aten.sigmoid_backward, _aten.tanh, _aten.tanh_backward, _aten.mish, _aten.mish_backward, _aten.softplus,
    _aten.softplus_backward, _aten.elu, _aten.elu_backward, _aten.pow, _aten.pow_, _aten.logit,
    _aten.exp, _aten.exp2, _aten.log, _aten.hardswish,
})  # fmt: skip
"""Those whose vectors are computed otherwise than single numbers; sums, products and roots are exact either way."""
WHOLE = frozenset({_aten.sum.default, _aten.mean.default, _aten.log1p.default, _aten._softmax_backward_data.default})
"""Those that are divided by threads in a way that no number of threads but one gives again."""


@contextmanager
def alike() -> Iterator[None]:
    """Within the block torch's functions give in any number of threads what they give in one, products aside (see above)."""
    if torch.get_num_threads() == 1:
        yield
        return
    with _Alike():
        yield


class _Alike(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func not in WHOLE and func.overloadpacket not in ELEMENTWISE:
            return func(*args, **given)
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if func in WHOLE else even(_first(args), threads))
        try:
            return func(*args, **given)
        finally:
            torch.set_num_threads(threads)


def _first(args: Sequence[Any]) -> Tensor:
    """What is divided: the tensor, which in a number raised to tensors comes second."""
    return next(value for value in args if isinstance(value, Tensor))


def even(tensor: Tensor, most: int) -> int:
    """The largest number of threads up to `most` whose shares of a tensor end where vectors, or rows of a view, end."""
    step = STRIDE if tensor.is_contiguous() else tensor.shape[-1]
    for threads in range(most, 1, -1):
        used = min(threads, -(-tensor.numel() // GRAIN))
        if used <= 1 or -(-tensor.numel() // used) % step == 0:
            return threads
    return 1
