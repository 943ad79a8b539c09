"""assay: makes trained models smaller without guessing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "builtin_model", "compress", "convert", "export", "inspect", "job", "list_methods", "load", "plan", "profile", "transform",
    "verify",
]  # fmt: skip

if TYPE_CHECKING:
    from assay.run import (
        builtin_model,
        compress,
        convert,
        export,
        inspect,
        job,
        list_methods,
        load,
        plan,
        profile,
        transform,
        verify,
    )  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in __all__:
        from assay import run

        return getattr(run, name)
    raise AttributeError(f"module 'assay' has no attribute {name!r}")
