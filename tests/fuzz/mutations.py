"""Damaged and hostile variants of a valid input, by any source of chance: hypothesis in the tests, `random` outside."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

import torch
import yaml
from safetensors.torch import load, save

from assay.model.files import CHECKS, _sum_of, checksum

NUMBERS = (0, 1, -1, 2, 7, 63, 255, 1 << 15, 1 << 31, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 10**40)
WORDS = (
    "", "x", "../x", "/etc/passwd", "..", "a\0b", "a" * 5000, "nan", "-inf", "1e999", "int4-g64-asym", "\ud800", "1" * 5000,
    "../../secret.safetensors", "model.safetensors", "keep", "float32", "{e}", "%s", "\n\n", "é" * 70, "__class__",
)  # fmt: skip
FLOATS = (float("nan"), float("inf"), -float("inf"), 1e308, -1e-308, 0.5, -0.5)
Mutation = Callable[[Random, bytes], bytes]


def in_bytes(random: Random, data: bytes) -> bytes:
    """A few flips, cuts, copies and numbers in the wrong place."""
    raw = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at, size = random.randrange(len(raw) + 1), random.choice((1, 2, 4, 8, 16, 64))
        kind = random.randrange(7)
        if kind == 0 and at < len(raw):
            raw[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            raw[at : at + size] = random.randbytes(size)
        elif kind == 2:
            raw[at : at + 8] = struct.pack("<Q", random.choice(NUMBERS) % (1 << 64))
        elif kind == 3:
            raw[at : at + 4] = struct.pack("<I", random.choice(NUMBERS) % (1 << 32))
        elif kind == 4:
            del raw[at : at + size]
        elif kind == 5:
            del raw[at:]
        else:
            source = random.randrange(len(raw) + 1)
            raw[at:at] = raw[source : source + size]
    return bytes(raw)


def in_head(random: Random, data: bytes) -> bytes:
    """The first kilobyte and a half damaged, or anything."""
    size = 1500 if random.random() < 0.7 else len(data)
    return in_bytes(random, data[:size]) + data[size:]


def value(random: Random) -> Any:
    """Something that was not expected."""
    kind = random.randrange(5)
    if kind == 0:
        return random.choice(NUMBERS) * random.choice((1, 1, -1))
    if kind == 1:
        return random.choice(WORDS)
    if kind == 2:
        return random.choice(FLOATS)
    simple: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"a": None}, [0, 0], [-1, 1], ["x"], {"x": {"x": []}})
    return random.choice(simple)


def in_tree(random: Random, tree: Any) -> Any:
    """A tree of mappings, lists and scalars with one node changed, gone, moved or doubled."""
    holders = list(_holders(tree))
    if not holders or random.random() < 0.02:
        return value(random)
    holder = random.choice(holders)
    key = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
    kind = random.randrange(6)
    if kind <= 1:
        holder[key] = value(random)
    elif kind == 2:
        del holder[key]
    elif kind == 3:
        other = random.choice(holders)
        holder[key] = deepcopy(random.choice(list(other.values() if isinstance(other, dict) else other)))
    elif kind == 4 and isinstance(holder, dict):
        holder[random.choice((*WORDS, str(key) + "x"))] = holder.pop(key)
    elif isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = random.choice((holder[key] + 1, holder[key] * 2, -holder[key], holder[key] / 3, holder[key] * 1000))
    else:
        holder[key] = [holder[key]]
    return tree


def _holders(tree: Any) -> Any:
    if isinstance(tree, dict | list) and tree:
        yield tree
        for inner in tree.values() if isinstance(tree, dict) else tree:
            yield from _holders(inner)


def _trees(random: Random, tree: Any) -> Any:
    for _ in range(random.choice((1, 1, 2, 3))):
        try:
            tree = in_tree(random, tree)
        except RecursionError:
            break
    return tree


def in_json(random: Random, data: bytes) -> bytes:
    """Another document, or the text of it damaged."""
    if random.random() < 0.2:
        return in_bytes(random, data)
    if random.random() < 0.01:
        return random.choice((b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"\xff\xfe", b"null", b'"x"', b""))
    return json.dumps(_trees(random, json.loads(data))).encode()


def in_note(random: Random, data: bytes) -> bytes:
    """Another document with the right checksum, or the text damaged."""
    if random.random() < 0.1:
        return in_bytes(random, data)
    tree = {k: v for k, v in json.loads(data).items() if k != CHECKS}
    changed = _trees(random, tree)
    return json.dumps(changed | {CHECKS: _sum_of(changed)} if isinstance(changed, dict) else changed).encode()


def in_yaml(random: Random, data: bytes) -> bytes:
    """Another plan, or the text of it damaged."""
    if random.random() < 0.3:
        return in_bytes(random, data)
    if random.random() < 0.05:
        bombs = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
            b"%c: &%c [%s]\n" % (c + 1, c + 1, b",".join([b"*%c" % c] * 9)) for c in range(97, 115)
        )
        return random.choice((bombs, bombs + data, b"!!python/object/apply:os.system [id]\n", b"[" * 50_000, b"a: *b\n"))
    return yaml.dump(_trees(random, yaml.load(data, yaml.CSafeLoader)), Dumper=yaml.SafeDumper).encode()


def in_header(random: Random, data: bytes) -> bytes:
    """A safetensors file with another header, other data, or damaged anywhere."""
    kind = random.randrange(10)
    if kind == 0:
        return in_bytes(random, data)
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    if kind == 1:
        return data[: 8 + length] + in_bytes(random, body)
    header = in_json(random, header)
    size = len(header) if random.random() < 0.9 else random.choice(NUMBERS) % (1 << 64)
    return struct.pack("<Q", size) + header + body


def in_body(random: Random, data: bytes) -> bytes:
    """A safetensors file whose tensors hold other bytes, as many as before."""
    (length,) = struct.unpack("<Q", data[:8])
    body = bytearray(data[8 + length :])
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        at = 4 * random.randrange(len(body) // 4)
        raw = random.choice(
            (random.randbytes(4), b"\xff" * 4, b"\0" * 4, struct.pack("<i", random.choice((-1, 1 << 30, 1 << 16))))
        )
        body[at : at + 4] = raw
    return data[: 8 + length] + bytes(body)


def in_tensors(random: Random, data: bytes) -> bytes:
    """A file of `save_tensors` with tensors gone, renamed, of other shapes, dtypes and values, and the right checksums."""
    if random.random() < 0.1:
        return in_bytes(random, data)
    tensors = load(data)
    for _ in range(random.choice((1, 1, 2))):
        name = random.choice(list(tensors))
        tensor, kind = tensors[name], random.randrange(7)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[random.choice((*WORDS[:4], name + "x", "n|" + name))] = tensors.pop(name)
        elif kind == 2:
            tensors[name] = tensor.reshape(-1)[: random.randrange(tensor.numel() + 1)].clone()
        elif kind == 3:
            tensors[name] = tensor.to(random.choice((torch.bool, torch.uint8, torch.float16, torch.int64, torch.float64)))
        elif kind == 4:
            filled = torch.full(tensor.shape, random.choice((*FLOATS[:3], 3e38, 0.0, -1.0)), dtype=torch.float64)
            tensors[name] = filled.to(tensor.dtype)
        elif kind == 5:
            tensors[name] = tensor[None].clone()
        else:
            tensors[name] = tensors[random.choice(list(tensors))].clone()
    tensors = tensors or {"none": torch.zeros(1)}
    checks = [_sum_of({}), {name: checksum(tensor) for name, tensor in tensors.items()}]
    return save(tensors, {CHECKS: json.dumps(checks)})


def in_lines(random: Random, data: bytes) -> bytes:
    """JSONL with some lines of other JSON, or the text damaged."""
    if random.random() < 0.3:
        return in_bytes(random, data)
    lines = data.splitlines()
    at = random.randrange(len(lines))
    lines[at] = json.dumps(_trees(random, json.loads(lines[at]))).encode()
    return b"\n".join(lines)
