"""Every method of every folder with its facts."""

from __future__ import annotations

from typing import Any

from assay.methods import base

FOLDERS = ("quantize", "transform", "sensitivity", "select", "cache", "activation")


def every() -> list[dict[str, Any]]:
    """name, verb, paper, needs and summary; of encoders the formats, and the levels for rows of 256 weights too."""
    found = []
    for folder in FOLDERS:
        for name in base.names(folder):
            m = base.load(name, folder)
            facts = {"name": name, "verb": m.verb, "paper": m.paper, "needs": list(m.needs)}
            facts["summary"] = (m.__doc__ or "").splitlines()[0]
            if m.verb == "encode":
                facts |= {"formats": list(m.formats), "levels": [x.name for x in m().levels(256)]}
            found.append(facts)
    return found
