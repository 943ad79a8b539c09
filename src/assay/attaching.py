"""`attach`: a model whose cache, or whose activations, follow policies while a `with` block lasts."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from assay.methods import base
from assay.methods.cache._evict import Evict
from assay.methods.cache._planned import planned
from assay.model.errors import InputError
from assay.runtime.hook import Attached, attached, check_model
from assay.runtime.policy import Evictor, Packer, Reader, Stack

FOLDERS = ("cache", "activation")


@contextmanager
def attach(model: PreTrainedModel, *policies: Any, calibration: Tensor | None = None, **options: Any) -> Iterator[Attached]:
    """Run a transformers model under policies; leaving the block takes them out again.

    policies: names (see `assay methods`), or methods of those files; they act in the order evict, thin channels, quantize,
    read, however they are given. options: fields of the named policies, each given to those that have it. calibration: int
    [windows, tokens], for policies that need it. Raises InputError for unknown names and options, for what can't be
    stacked, and for models that can't take a policy.

        with assay.attach(model, "snapkv", "kivi", budget=0.25, bits=4):
            model.generate(**inputs)
    """
    made = _made(policies, options)
    caches = [p for p in made if isinstance(p, (Evictor, Packer, Reader))]
    check_model(model)
    fitted = [_fitted(p, model, calibration) for p in made]
    stack = Stack.of([p for p, raw in zip(fitted, made, strict=True) if raw in caches])
    with ExitStack() as open_, attached(model, stack) as found:
        for policy in fitted:
            if hasattr(policy, "wrapped"):
                open_.enter_context(policy.wrapped(model))
        yield found


def _fitted(policy: Any, model: PreTrainedModel, calibration: Tensor | None) -> Any:
    plan = isinstance(policy, Evict) and policy.shape == "planned"
    if not plan and "calibration" not in policy.needs:
        return policy
    if calibration is None:
        name = "shape='planned'" if plan else type(policy).__module__.rpartition(".")[2]
        raise InputError(f"{name} needs text to calibrate on; give token ids with calibration=ids")
    return planned(policy, model, calibration) if plan else policy.calibrated(model, calibration)


def named(name: str) -> type[Any]:
    """The class of a policy by its file name. Raises InputError naming the nearest."""
    known = {n: folder for folder in FOLDERS for n in base.names(folder)}
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise InputError(
            f"unknown policy {name!r}; {f'did you mean {near[0]}?' if near else 'there are ' + ', '.join(sorted(known))}"
        )
    found: type[Any] = base.load(name, known[name])
    return found


def _made(policies: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
    if not policies:
        raise InputError("no policy given; name one, like attach(model, 'snapkv', budget=0.25)")
    classes = [named(p) if isinstance(p, str) else None for p in policies]
    fields = [{f.name for f in dataclasses.fields(c) if f.init} if c else set() for c in classes]
    for option in options:
        if not any(option in f for f in fields):
            near = difflib.get_close_matches(option, set().union(*fields), 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(set().union(*fields)))}"
            raise InputError(f"no policy has an option {option!r}; {hint}")
    return [
        p if c is None else c(**{k: v for k, v in options.items() if k in f})
        for p, c, f in zip(policies, classes, fields, strict=True)
    ]
