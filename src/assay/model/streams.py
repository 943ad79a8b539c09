"""Streams: which tensors write and read each space of activations, so that a change of its basis can be folded into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from assay.model.arch import facts
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.sites import Anatomy, Site

Index = range | tuple[int, ...]


@dataclass(frozen=True)
class Face:
    """One axis of a stored tensor that runs along a stream; `index` picks the part of the axis that does."""

    tensor: str
    axis: int
    index: Index | None = None

    def taken(self, tensor: Tensor) -> Tensor:
        """The face of a whole tensor: [..., width], the stream's axis last."""
        moved = tensor.movedim(self.axis, -1)
        return moved if self.index is None else moved[..., list(self.index)]

    def width(self, shape: Sequence[int]) -> int:
        """How many channels the face has in a tensor of this shape."""
        if self.index is not None:
            return len(self.index)
        return shape[self.axis]

    def changed(self, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """`tensor` itself, with `change` of the face [..., width] written back."""
        moved = tensor.movedim(self.axis, -1)
        if self.index is None:
            moved.copy_(change(moved))
        else:
            moved[..., list(self.index)] = change(self.taken(tensor))
        return tensor


@dataclass(frozen=True)
class Linear:
    """One weight matrix between two streams. site: None for what assay never compresses (a router)."""

    inputs: Face
    outputs: Face
    bias: Face | None
    site: Site | None

    def matrix(self, tensor: Tensor) -> Tensor:
        """The weight [out, in] in its stored tensor."""
        matrix = tensor if self.inputs.axis == 1 else tensor.T
        return matrix if self.outputs.index is None else matrix[list(self.outputs.index)]


@dataclass(frozen=True)
class Norm:
    """A norm and all that reads it. weight, bias: stored tensors, None where the norm has none; gain = weight + offset."""

    name: str
    block: int | None
    weight: str | None
    bias: str | None
    offset: float
    readers: tuple[Linear, ...]


@dataclass(frozen=True)
class Residual:
    """The stream that all blocks read and write.

    centred: its norms subtract the mean (LayerNorm); norms: those that feed matrices, the final one last;
    vectors: every norm's weight and bias on the stream; writers: embeddings, matrices and biases that add to it;
    tied: the head is the embedding; head: the running model's name of the head; fixed: why its basis can't be
    rotated, or "".
    """

    width: int
    centred: bool
    norms: tuple[Norm, ...]
    vectors: tuple[Face, ...]
    writers: tuple[Face, ...]
    tied: bool
    head: str
    fixed: str

    @property
    def final(self) -> Norm:
        """The norm that feeds the head."""
        return self.norms[-1]

    def readers(self) -> Iterator[Face]:
        """Input faces of all that reads the stream through a norm."""
        for norm in self.norms:
            yield from (reader.inputs for reader in norm.readers)

    def untied(self) -> Residual:
        """The same with a head that is a tensor of its own."""
        (head,) = self.final.readers
        own = replace(head, inputs=replace(head.inputs, tensor=self.head), outputs=replace(head.outputs, tensor=self.head))
        return replace(self, norms=(*self.norms[:-1], replace(self.final, readers=(own,))), tied=False)


@dataclass(frozen=True)
class Inner:
    """A stream inside one block: the values of attention, or the hidden channels of an MLP, an expert or a mixer.

    written: every face along it but those of `readers`; divided: those among them to divide by s so that the
    stream shrinks by s, empty where a nonlinearity or other readers stand in the way; heads: (heads written, heads
    that read each), (1, 1) for hidden channels.
    """

    kind: str
    block: int
    written: tuple[Face, ...]
    divided: tuple[Face, ...]
    readers: tuple[Linear, ...]
    heads: tuple[int, int] = (1, 1)

    def spread(self, vector: Tensor) -> Tensor:
        """Values by channel written [n] -> by channel read [n * readers of each head]."""
        own, each = self.heads
        return vector.view(own, 1, -1).expand(-1, each, -1).reshape(-1)

    def gathered(self, vector: Tensor) -> Tensor:
        """Values by channel read -> by channel written, [heads that share it, n]."""
        own, each = self.heads
        return vector.view(own, each, -1).transpose(0, 1).reshape(each, -1)


@dataclass(frozen=True)
class Streams:
    """All streams of a model. residual: None where `refusal` says why nothing can be folded along it."""

    family: str
    residual: Residual | None
    refusal: str
    inner: tuple[Inner, ...]

    def need_residual(self, what: str) -> Residual:
        """The residual stream. Raises InputError with the reason when there is none to fold along."""
        if self.residual is None:
            raise InputError(f"{what}: {self.family} {self.refusal}")
        return self.residual


def find_streams(checkpoint: Checkpoint, anatomy: Anatomy, config: PretrainedConfig) -> Streams:
    """Streams of a model, from the table of families. Raises InputError for a family that isn't in it."""
    table = facts()["streams"]
    family = table["families"].get(anatomy.family)
    if isinstance(family, str):
        family = table["families"][family]
    if family is None:
        known = ", ".join(sorted(table["families"]))
        raise InputError(f"assay doesn't know which tensors of {anatomy.family} feed which; transforms know {known}")
    return _Finder(checkpoint, anatomy, config, table | family).find()


class _Finder:
    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, config: PretrainedConfig, table: Mapping[str, Any]) -> None:
        self.checkpoint, self.anatomy, self.config, self.table = checkpoint, anatomy, config, table
        self.parent = anatomy.block_names[0].rpartition(".")[0].rpartition(".")[0]

    def find(self) -> Streams:
        inner = tuple(stream for block in range(len(self.anatomy.block_names)) for stream in self._inner(block))
        found = next((r["why"] for r in self.table.get("refuse", ()) if self._holds(r["when"])), None) or self._residual(inner)
        refusal = found if isinstance(found, str) else ""
        return Streams(self.anatomy.family, None if isinstance(found, str) else found, refusal, inner)

    # ---- the residual stream ----------------------------------------------------------------

    def _residual(self, inner: tuple[Inner, ...]) -> Residual | str:
        norms = [norm for block in range(len(self.anatomy.block_names)) for norm in self._norms(block)]
        head, final = self._head(), self._norm(self._outside(self.table["final"]), None)
        if head is None or final is None:
            return "has no head behind a final norm here; transform the whole model, with its head"
        norms.append(replace(final, readers=(head,)))
        after = [
            self._norm(f"{b}.{name}", i) for i, b in enumerate(self.anatomy.block_names) for name in self.table.get("after", ())
        ]
        entry = self._norm(self._outside(self.table["entry"]), None) if "entry" in self.table else None
        rows = [self._face(self._outside(path), axis) for path, axis in self.table["embeddings"].items()]
        writers = [face for face in rows if face]
        for site in (s for s in self.anatomy.sites.values() if s.role in self.table["writes"]):
            writers += _written(self._linear(site))
        if self.anatomy.tied and (second := self._face(f"{self._head_path}.weight", 1)):
            writers.append(second)
        vectors = [
            Face(name, 0) for norm in (*norms, *after, entry) if norm is not None for name in (norm.weight, norm.bias) if name
        ]  # fmt: skip
        residual = Residual(
            self._width(head.inputs), self.table["norm"] == "layer", tuple(norms), tuple(vectors), tuple(writers),
            self.anatomy.tied, f"{self._head_path}.weight", self._fixed(bool(after), entry is not None),
        )  # fmt: skip
        return self._gap(residual, inner) or residual

    def _fixed(self, after: bool, entry: bool) -> str:
        if after:
            return f"has gains between its matrices and the residual stream ({self.table['after'][0]}), which no rotation passes"
        return f"normalises its embedding ({self.table['entry']}) with gains that no rotation passes" if entry else ""

    def _norms(self, block: int) -> Iterator[Norm]:
        """The norms of a block that feed matrices; what two of them claim belongs to the later one."""
        owners: dict[str, str] = {}
        for name, reads in self.table["norms"].items():
            if self._norm(f"{self.anatomy.block_names[block]}.{name}", block):
                owners.update({role: name for part in reads for role in self.table["reads"][part]})
        linears = [(s.role, self._linear(s)) for s in self.anatomy.block_sites(block)]
        linears += [("router", router) for router in self._routers(block)]
        for name in self.table["norms"]:
            norm = self._norm(f"{self.anatomy.block_names[block]}.{name}", block)
            if norm is not None:
                yield replace(norm, readers=tuple(linear for role, linear in linears if owners.get(role) == name))

    def _routers(self, block: int) -> Iterator[Linear]:
        for suffix in self.table["routers"]:
            stored = self._stored(f"{self.anatomy.block_names[block]}.{suffix}.weight")
            if stored and stored not in self.anatomy.sites:
                yield Linear(Face(stored, 1), Face(stored, 0), None, None)

    def _norm(self, path: str, block: int | None) -> Norm | None:
        """A norm by its module, None where the model lacks it or it holds nothing."""
        weight, bias = self._stored(f"{path}.weight"), self._stored(f"{path}.bias")
        return Norm(path, block, weight, bias, float(self.table.get("offset", 0)), ()) if weight or bias else None

    @property
    def _head_path(self) -> str:
        return str(self.table.get("head", "lm_head"))

    def _head(self) -> Linear | None:
        own = f"{self._head_path}.weight"
        stored = self._stored(self._outside(next(iter(self.table["embeddings"]))) if self.anatomy.tied else own)
        if stored is None:
            return None
        bias = self._face(f"{self._head_path}.bias", 0)
        return Linear(Face(stored, 1), Face(stored, 0), bias, None if self.anatomy.tied else self.anatomy.sites.get(stored))

    def _gap(self, residual: Residual, inner: tuple[Inner, ...]) -> str:
        """Why the table doesn't fit this model, or "": every parameter must lie on a stream, or stay inside a block."""
        readers = [r for norm in residual.norms for r in norm.readers] + [r for stream in inner for r in stream.readers]
        along = [*residual.readers(), *residual.vectors, *residual.writers]
        faces = [*along, *(f for s in inner for f in s.written), *(f for r in readers for f in (r.inputs, r.bias) if f)]
        known = {face.tensor for face in faces}
        for path, stored in self.anatomy.parameters.items():
            if not set(stored) <= known and path.rpartition(".")[0].rpartition(".")[2] not in self.table["inside"]:
                return f"has {path} here, which assay can't place; only the usual variant of the family can be transformed"
        if idle := next((norm.name for norm in residual.norms if not norm.readers), None):
            return f"has {idle} here, and nothing that reads it"
        widths = {self._width(face) for face in along}
        return "" if widths == {residual.width} else "changes the width of its residual stream here"

    # ---- streams inside a block ---------------------------------------------------------------

    def _inner(self, block: int) -> Iterator[Inner]:
        sites = self.anatomy.block_sites(block)
        for expert in dict.fromkeys(s.expert for s in sites if s.role in self.table["hidden"]["inputs"]):
            yield self._hidden(block, [s for s in sites if s.expert == expert])
        out = next((s for s in sites if s.role == "attn.o"), None)
        source = next((s for s in sites if s.role in ("attn.v", "attn.qkv")), None)
        if out is not None and source is not None:
            yield self._values(block, source, out)

    def _hidden(self, block: int, sites: list[Site]) -> Inner:
        rules = self.table["hidden"]
        written: list[Face] = []
        for site in (s for s in sites if s.role in rules["outputs"]):
            parts = rules["outputs"][site.role]
            step = site.shape[0] // parts
            for part in range(parts):
                written += _written(self._linear(site), range(part * step, (part + 1) * step) if parts > 1 else None)
        along = [self._face(f"{self.anatomy.block_names[block]}.{path}", axis) for path, axis in rules["along"].items()]
        readers = tuple(self._linear(s) for s in sites if s.role in rules["inputs"])
        return Inner("hidden", block, (*written, *(f for f in along if f)), self._divided(sites, written), readers)

    def _divided(self, sites: list[Site], written: list[Face]) -> tuple[Face, ...]:
        """Faces whose division by s divides the hidden channels by s: the linear half of a gate, or all before a ReLU."""
        roles = {s.role: s for s in sites}
        if "mlp.gate" in roles and "mlp.up" in roles:
            return tuple(_written(self._linear(roles["mlp.up"])))
        if "mlp.gate_up" in roles:
            return tuple(written[len(written) // 2 :])
        return tuple(written) if "mlp.up" in roles and self._holds(self.table.get("homogeneous")) else ()

    def _values(self, block: int, source: Site, out: Site) -> Inner:
        heads = int(self.config.num_attention_heads)
        size = out.shape[1] // heads
        linear = self._linear(source)
        own, rows = source.shape[0] // size, None
        if source.role == "attn.qkv":
            own = (source.shape[0] // size - heads) // 2
            rows = _value_rows(heads, own, size, self.table.get("fused", "stacked"))
        written = tuple(_written(linear, rows))
        return Inner("values", block, written, written, (self._linear(out),), (own, heads // own))

    # ---- addresses ---------------------------------------------------------------------------

    def _linear(self, site: Site) -> Linear:
        """The faces of a site in its stored tensor."""
        bias = self._stored(site.parameter.removesuffix("weight") + "bias") if site.expert is None else None
        inputs, outputs = (0, 1) if site.transposed else (1, 0)
        return Linear(Face(site.name, inputs), Face(site.name, outputs), Face(bias, 0) if bias else None, site)

    def _face(self, path: str, axis: int) -> Face | None:
        stored = self._stored(path)
        return Face(stored, axis) if stored else None

    def _stored(self, path: str) -> str | None:
        found = self.anatomy.parameters.get(path, ())
        return found[0] if len(found) == 1 else None

    def _outside(self, name: str) -> str:
        return f"{self.parent}.{name}" if self.parent else name

    def _width(self, face: Face) -> int:
        return face.width(self.checkpoint.shape(face.tensor))

    def _holds(self, wanted: Mapping[str, Any] | None) -> bool:
        return wanted is not None and all(getattr(self.config, key, None) == value for key, value in wanted.items())


def _written(linear: Linear, rows: Index | None = None) -> list[Face]:
    """Faces of a matrix and its bias along the matrix's outputs, or along some of them."""
    faces = [linear.outputs] + ([linear.bias] if linear.bias else [])
    return [replace(face, index=rows) for face in faces] if rows is not None else faces


def _value_rows(heads: int, own: int, size: int, layout: str) -> Index:
    """Rows of a fused query-key-value matrix that hold the values, head by head.

    stacked: all queries, all keys, all values; grouped: per head of keys and values its queries, its key, its value.
    """
    if layout == "stacked":
        return range((heads + own) * size, (heads + 2 * own) * size)
    group = heads // own + 2
    return tuple(row for head in range(own) for row in range((head * group + group - 1) * size, (head + 1) * group * size))
