"""assay: makes trained models smaller without guessing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.attaching import attach
    from assay.cache_pricing import cache_prices, price_cache
    from assay.caching import planned_cache
    from assay.relu_tuning import tune_relu
    from assay.reranking import rerank
    from assay.run import (
        benchmark,
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
        rank,
        sweep,
        transform,
        verify,
        write_report,
    )

__version__ = "0.1.0"
__all__ = [
    "attach", "benchmark", "builtin_model", "cache_prices", "compress", "convert", "export", "inspect", "job",
    "list_methods", "load", "plan", "planned_cache", "price_cache", "profile", "rank", "rerank", "sweep", "transform",
    "tune_relu", "verify", "write_report",
]  # fmt: skip
_HOMES = {
    "attach": "attaching", "cache_prices": "cache_pricing", "price_cache": "cache_pricing",
    "planned_cache": "caching", "rerank": "reranking", "tune_relu": "relu_tuning",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are first used: torch takes seconds."""
    if name in __all__:
        return getattr(importlib.import_module(f"assay.{_HOMES.get(name, 'run')}"), name)
    raise AttributeError(f"module 'assay' has no attribute {name!r}")
