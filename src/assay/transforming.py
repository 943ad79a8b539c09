"""Applies exact transforms to a whole checkpoint and writes it as another checkpoint, tensor by tensor."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.engines.plain import CONTRACT
from assay.engines.write import check_space, copy_side_files, new_folder, output_tensors, write_shards
from assay.measure.profile import Profile
from assay.methods import base
from assay.methods.transform._subject import Subject, Transform
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.files import save_json
from assay.model.finite import finite
from assay.model.notes import TRANSFORM, read_transform
from assay.model.progress import Progress
from assay.model.sites import empty_model, load_config, survey
from assay.model.streams import find_streams
from assay.model.weights import Weights


def transform(
    source: Checkpoint, names: Sequence[str], destination: Path, profile: Profile | None, seed: int, progress: Progress
) -> Checkpoint:
    """Write `source` with transforms applied, in their order, as the new checkpoint `destination`.

    names: as `assay methods` lists them, with parameters after a colon, like "awq:bits=3,group_size=128". Weights are
    changed in float32 and rounded once to the dtype in which they are stored. What was done is in assay/transform.json.
    Raises InputError where a transform doesn't apply, and leaves nothing behind.
    """
    wanted = [parse(name) for name in names]
    _check(source, wanted, profile)
    anatomy = survey(source, empty_model(source))
    streams = find_streams(source, anatomy, load_config(source))
    subject = Subject(Weights(source), streams, profile.curvatures if profile else None)
    steps: list[dict[str, Any]] = []
    for found in wanted:
        changed = found.apply(subject, torch.Generator().manual_seed(seed), progress)
        notes = changed.notes[len(subject.notes) :]
        steps.append({"name": name_of(found), "parameters": _parameters(found), "seed": seed, "notes": list(notes)})
        subject = dataclasses.replace(changed, statistics=None)
    _write(subject.weights, steps, destination, progress)
    return Checkpoint.open(destination)


def parse(text: str) -> Transform:
    """A transform from its name and parameters, like "awq" or "awq:bits=3,group_size=128". Raises InputError."""
    name, _, rest = text.partition(":")
    method = base.load(name, "transform")
    fields = {field.name: field for field in dataclasses.fields(method)}
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1) or sorted(fields)
            hint = f"did you mean {near[0]}?" if near else "it has none"
            raise InputError(f"{name} has no parameter {key!r}; {hint}")
        given[key] = _value(f"{name}:{key}", value, fields[key].default)
    made: Transform = method(**given)
    return made


def name_of(transform: Transform) -> str:
    """The name of a transform: that of its file."""
    return type(transform).__module__.rpartition(".")[2]


def origin(checkpoint: Checkpoint) -> str:
    """Fingerprint of the model that a checkpoint was transformed from; its own if it never was."""
    record = _record(checkpoint)
    return str(record["source"]) if record else checkpoint.fingerprint


def steps_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The transforms that made a checkpoint, first to last."""
    return list(_record(checkpoint).get("steps", []))


def _check(source: Checkpoint, wanted: Sequence[Transform], profile: Profile | None) -> None:
    if not wanted:
        raise InputError(f"no transform was named; there are {', '.join(base.names('transform'))}")
    if source.levels:
        raise InputError(f"{source.folder} is compressed already; transform the original, then compress that")
    if profile is not None and profile.index["model"] != source.fingerprint:
        raise InputError(f"{profile.folder}: a profile of another model; run assay profile on this one")
    for place, found in enumerate(wanted):
        if not found.needs:
            continue
        if profile is None:
            raise InputError(f"{name_of(found)} reads statistics; give a profile of this model, made by assay profile")
        if place:
            first = name_of(wanted[0])
            raise InputError(
                f"{name_of(found)} reads statistics that {first} changes; put it first, or profile the result of {first}"
            )


def _value(name: str, text: str, default: Any) -> Any:
    """A parameter's value, of the kind of its default."""
    if isinstance(default, bool):
        values: Mapping[str, Any] = {"true": True, "false": False}
        if text not in values:
            raise InputError(f"{name}: {text!r} is neither true nor false")
        return values[text]
    if not text.isdigit() or not 0 < int(text) < 1 << 16:
        raise InputError(f"{name}: {text!r} is not a whole number above zero")
    return int(text)


def _parameters(found: Transform) -> dict[str, Any]:
    return dataclasses.asdict(found)  # type: ignore[call-overload, no-any-return]


def _write(weights: Weights, steps: list[dict[str, Any]], destination: Path, progress: Progress) -> None:
    source = weights.source
    record = {
        "source": origin(source), "steps": steps_of(source) + steps,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }  # fmt: skip
    nbytes = sum(source.nbytes(weights.origin(name)) * len(source.parts(weights.origin(name))) for name in weights.names)
    check_space(destination.absolute().parent, nbytes)
    with new_folder(destination) as folder:
        write_shards(folder, _tensors(weights, progress))
        copy_side_files(folder, source)
        config = {key: value for key, value in weights.config.items() if key != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "assay").mkdir()
        save_json(folder / TRANSFORM, record)


def _tensors(weights: Weights, progress: Progress) -> Iterator[dict[str, Tensor]]:
    """Every tensor as it will be stored, one at a time."""
    with progress.task("writing tensors", len(weights.names)) as advance:
        for name in weights.names:
            home = weights.origin(name)
            if weights.untouched(name):
                (tensor,) = output_tensors(weights.source, home, {}, CONTRACT, frozenset()).values()
            else:
                tensor = weights.read(name)
                if not finite(tensor):
                    raise InputError(f"{name} would hold NaN or infinite weights; the source model is damaged")
                tensor = _rounded(name, tensor, _dtype(weights.source, home))
            yield {name: tensor.contiguous()}
            advance()


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the stored dtype. Raises InputError for what that can't hold (only fp16 is so narrow)."""
    if tensor.numel() and tensor.abs().max() > torch.finfo(dtype).max:
        raise InputError(
            f"{name} would leave the range of {str(dtype).removeprefix('torch.')}; convert the model to bfloat16 first"
        )
    return tensor.to(dtype)


def _dtype(source: Checkpoint, name: str) -> torch.dtype:
    """Dtype in which a changed tensor is stored: the source's, bfloat16 for FP8."""
    return torch.bfloat16 if len(source.parts(name)) > 1 else source.dtype(name)


def _record(checkpoint: Checkpoint) -> dict[str, Any]:
    return read_transform(checkpoint.folder) or {}
