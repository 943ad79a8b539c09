"""Products in the precision that the source was stored in."""

from __future__ import annotations

from contextlib import AbstractContextManager

from assay.model.checkpoint import Checkpoint
from assay.model.precision import bf16_products


def stored_precision(checkpoint: Checkpoint) -> AbstractContextManager[None]:
    """Lets products round their factors to bf16 where the model is stored in 16 bits or fewer.

    That is how it runs in use, at several times the speed. It adds about 3e-5 nats per token to a KL divergence, so
    figures that are reported as measured stay out of it.
    """
    return bf16_products(all(checkpoint.dtype(name).itemsize <= 2 for name in checkpoint.names))
