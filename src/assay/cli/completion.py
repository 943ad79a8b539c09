"""Names that a shell completes, found without importing what they name: a key that is pressed can't wait for torch."""

from __future__ import annotations

from pathlib import Path

import assay

SOURCE = Path(assay.__file__).parent


def methods(incomplete: str) -> list[str]:
    """Names for `--method`."""
    return _starting(["auto", "best", *_files("methods", "quantize")], incomplete)


def planners(incomplete: str) -> list[str]:
    """Names for `--planner`."""
    return _starting(_files("budget", "planners"), incomplete)


def transforms(incomplete: str) -> list[str]:
    """Names for `--with`."""
    return _starting(_files("methods", "transform"), incomplete)


def engines(incomplete: str) -> list[str]:
    """Names for `--engine`."""
    from assay.engines import NAMES

    return _starting(NAMES, incomplete)


def _files(*folder: str) -> list[str]:
    """A method is a file, and its name is the method's."""
    return sorted(p.stem for p in SOURCE.joinpath(*folder).glob("[!_]*.py"))


def _starting(names: list[str] | tuple[str, ...], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
