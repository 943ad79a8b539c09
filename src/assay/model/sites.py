"""Sites: the address of every weight matrix, found from the config and a model without storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from assay.model import memory
from assay.model.arch import facts
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.schema import conform

WEIGHTS_A_BYTE = 8
WHOLE = "experts stored as one 3-D tensor"
"""Why experts stay that the files don't hold one by one: some families store them [in, out]."""
BUFFERS = 1 << 27
"""Bytes of tables, such as masks, that a model may have however small its files are."""


@dataclass(frozen=True)
class Site:
    """One weight matrix of the source.

    name: tensor in the weight files; parameter: where a running model holds it; shape: (out, in)
    whatever the storage order; reads: key of the input it shares with its siblings.
    For experts that a running model keeps as one 3-D parameter, `expert` and `rows` cut out this matrix.
    """

    name: str
    parameter: str
    role: str
    block: int | None
    shape: tuple[int, int]
    reads: str
    transposed: bool = False
    expert: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def module(self) -> str:
        """Module name in the files, without `.weight`."""
        return self.name.removesuffix(".weight")

    @property
    def count(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


def has_experts(experts: Iterable[int | None], kept: Mapping[str, str]) -> bool:
    """Whether a model has experts: among its sites, of which the expert or None is given, or those that stay (name -> why)."""
    return any(expert is not None for expert in experts) or WHOLE in kept.values()


@dataclass(frozen=True)
class Anatomy:
    """What is in a model: its blocks, its sites, and why every other tensor stays as it is."""

    family: str
    block_names: tuple[str, ...]
    sites: dict[str, Site]
    kept: dict[str, str]
    parameters: dict[str, tuple[str, ...]] = field(repr=False)
    tied: bool = False

    @property
    def has_experts(self) -> bool:
        """Whether tokens are shared out among experts."""
        return has_experts((site.expert for site in self.sites.values()), self.kept)

    def block_sites(self, block: int) -> list[Site]:
        """Sites of one block, in the order of the model."""
        return [s for s in self.sites.values() if s.block == block]


def load_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """transformers' config of a checkpoint, any quantization of the files left out. Raises InputError."""
    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str):
        raise InputError(f"{checkpoint.folder}: config.json has no model_type; not a transformers model")
    try:
        if (checkpoint.folder / "config.json").exists():
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        else:
            config = AutoConfig.for_model(**checkpoint.config)
    except Exception as error:  # whatever the config's own class makes of odd values
        if memory.lacked(error):
            raise
        if "trust_remote_code" in str(error):
            problem = f"{checkpoint.folder}: {kind} needs code from its folder, which assay never runs"
            wanted = f"give a version of the model that transformers {transformers.__version__} opens by itself"
            raise InputError(f"{problem}; {wanted}") from error
        if kind not in transformers.CONFIG_MAPPING:
            raise InputError(f"unknown architecture {kind!r} in transformers {transformers.__version__}") from error
        raise _unusable(checkpoint, error) from error
    depth = getattr(config, "num_hidden_layers", 0)
    if not isinstance(depth, int) or depth > len(checkpoint.stored):
        raise InputError(f"{checkpoint.folder}: {depth} blocks in config.json, but {len(checkpoint.stored)} tensors in the files")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _unusable(checkpoint: Checkpoint, error: Exception) -> InputError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return InputError(f"{checkpoint.folder}: transformers can't make a model of config.json ({reason}); download it again")


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model with real buffers and parameters that take no memory. Raises InputError."""
    config = load_config(checkpoint)
    config.use_cache = False
    wanted = checkpoint.config.get("architectures") or [""]
    conform(wanted, list[str], f"{checkpoint.folder / 'config.json'}: architectures must be names")
    kinds = [
        transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM,
        transformers.AutoModelForImageClassification, transformers.AutoModel,
    ]  # fmt: skip
    cls = getattr(transformers, wanted[0], None)
    mapped = (k for k in kinds if k._model_mapping is not None and type(config) in k._model_mapping)  # its truth imports them all
    if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
        make = partial(cls._from_config, config, dtype=torch.float32)
    elif (kind := next(mapped, None)) is not None:
        make = partial(kind.from_config, config, dtype=torch.float32, trust_remote_code=False)
    else:
        raise InputError(f"transformers has no model for {checkpoint.config['model_type']!r}")
    _check_size(checkpoint, make)
    try:
        with init_empty_weights(include_buffers=False):
            model = make()
    except Exception as error:  # whatever the model's own class makes of odd values
        if memory.lacked(error):
            raise
        raise _unusable(checkpoint, error) from error
    model.config._experts_implementation = "eager"
    return model.eval()


def _check_size(checkpoint: Checkpoint, make: Callable[[], PreTrainedModel]) -> None:
    """Raises InputError for a config of a far larger model than the files hold, before any memory is taken for it."""
    try:
        with torch.device("meta"):
            model = make()
    except Exception as error:  # whatever the model's own class makes of odd values
        if "meta" in str(error):  # a class that can't be made without memory
            return
        raise _unusable(checkpoint, error) from error
    most = WEIGHTS_A_BYTE * sum(info.nbytes for info in checkpoint.stored.values())
    count = sum(tensor.numel() for tensor in model.parameters())
    buffers = sum(tensor.nbytes for tensor in model.buffers())
    if count > most or buffers > most + BUFFERS:
        problem = f"config.json describes {count} weights and {buffers} bytes of tables, far more than the files hold"
        raise InputError(f"{checkpoint.folder}: {problem}; download it again")


def survey(checkpoint: Checkpoint, model: PreTrainedModel | None = None) -> Anatomy:
    """Find every site; each tensor of the files becomes a site or is kept with a reason. Raises InputError."""
    model = model if model is not None else empty_model(checkpoint)
    blocks = find_blocks(model)
    names = _Names(checkpoint, model)
    tied = _tied(model)
    sites: dict[str, Site] = {}
    kept: dict[str, str] = {}
    parameters: dict[str, tuple[str, ...]] = {}
    for path, parameter in _tensors(model):
        stored = names.find(path, tuple(parameter.shape))
        parameters[path] = stored
        if path in tied and not stored:
            continue
        if not stored:
            raise InputError(f"{checkpoint.folder}: the files lack {path}, which {names.family} needs")
        found = _sites_of(path, parameter, stored, model, blocks, tied, checkpoint)
        if isinstance(found, str):
            kept.update(dict.fromkeys(stored, found))
        else:
            sites.update({site.name: site for site in found})
    known = {n for stored in parameters.values() for n in stored}
    for name in checkpoint.names:
        if name not in known:
            kept[name] = "not used by the model class; copied as it is"
    _check_shapes(checkpoint, model, parameters)
    return Anatomy(names.family, tuple(blocks), sites, kept, parameters, bool(tied))


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the transformer blocks: the members of the longest list of equal-typed modules. Raises InputError."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [(n, m) for n, m in lists if depth is None or len(m) == depth]
    if not lists:
        raise InputError(f"{type(model).__name__}: no list of transformer blocks found")
    name, chosen = min(lists, key=lambda pair: pair[0].count("."))
    return [f"{name}.{i}" for i in range(len(chosen))]


class _Names:
    """Maps a parameter of the running model to the tensors in the files."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self.family = str(checkpoint.config.get("model_type"))
        self.present = set(checkpoint.names)
        table = facts()["families"]
        self.rules = table.get(self.family, {})
        self.experts = self.rules.get("experts") or table["*"]["experts"]
        self.prefix = model.base_model_prefix + "."

    def find(self, path: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Names of the stored tensors of parameter `path`; empty when absent."""
        for candidate in self._spellings(path):
            if candidate in self.present:
                return (candidate,)
        for suffix, patterns in self.experts.items():
            if path.endswith(suffix) and len(shape) == 3:
                head = path.removesuffix(suffix)
                wanted = [head + p.format(e=e) for e in range(shape[0]) for p in patterns]
                if all(name in self.present for name in wanted):
                    return tuple(wanted)
        return ()

    def _spellings(self, path: str) -> Iterator[str]:
        yield path
        renamed = path
        for new, old in self.rules.get("rename", {}).items():
            renamed = renamed.replace(new, old, 1)
        yield renamed
        if path.startswith(self.prefix):
            yield path.removeprefix(self.prefix)
        else:
            yield self.prefix + path


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    persistent = set(model.state_dict(keep_vars=True))
    yield from ((n, b) for n, b in model.named_buffers() if n in persistent)


def _tied(model: PreTrainedModel) -> set[str]:
    """Parameters that share another one's storage; the files usually hold only that other."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    keys = getattr(model, "_tied_weights_keys", None) or {}
    return set(keys)


def _sites_of(
    path: str, parameter: torch.Tensor, stored: tuple[str, ...], model: PreTrainedModel,
    blocks: list[str], tied: set[str], checkpoint: Checkpoint,
) -> list[Site] | str:  # fmt: skip
    """Sites held by one parameter, or the reason why it stays."""
    module_path, _, leaf = path.rpartition(".")
    module = model.get_submodule(module_path)
    block = next((i for i, b in enumerate(blocks) if path.startswith(b + ".")), None)
    if parameter.ndim < 2:
        return "a vector (norm or bias)"
    for suffix, reason in facts()["keep"].items():
        if f".{module_path}".endswith(f".{suffix}") and not (suffix == "mlp.gate" and isinstance(module, nn.Linear)):
            return reason
    if block is not None and parameter.ndim == 3 and leaf in ("gate_up_proj", "down_proj"):
        if len(stored) == 1:
            return WHOLE
        return _expert_sites(path, leaf, parameter, stored, block)
    if isinstance(module, nn.Embedding):
        if module is model.get_input_embeddings():
            if tied or getattr(model.config, "tie_word_embeddings", False):
                return "embedding tied to the head; low bits there break readers"
            return [Site(stored[0], path, "embedding", None, (parameter.shape[0], parameter.shape[1]), path)]
        return "a table of positions or types"
    if leaf != "weight" or not (isinstance(module, (nn.Linear, Conv1D))):
        return f"a parameter of {type(module).__name__}, which is not a linear layer"
    if block is None:
        if module is model.get_output_embeddings():
            shape = (parameter.shape[0], parameter.shape[1])
            return "head tied to the embedding" if path in tied else [Site(stored[0], path, "head", None, shape, path)]
        return "outside the transformer blocks"
    role = _role(module_path)
    transposed = isinstance(module, Conv1D)
    rows, columns = parameter.shape[::-1] if transposed else parameter.shape
    return [Site(stored[0], path, role, block, (rows, columns), _reads(module_path, role), transposed)]


def _expert_sites(path: str, leaf: str, parameter: torch.Tensor, stored: tuple[str, ...], block: int) -> list[Site]:
    experts, rows, columns = parameter.shape
    halves = ["mlp.gate", "mlp.up"] if leaf == "gate_up_proj" else ["mlp.down"]
    step = rows // len(halves)
    sites = []
    for e in range(experts):
        for k, role in enumerate(halves):
            reads = f"{path.rpartition('.')[0]}.{e}.{'in' if leaf == 'gate_up_proj' else 'mid'}"
            span = (k * step, (k + 1) * step)
            sites.append(Site(stored[e * len(halves) + k], path, role, block, (step, columns), reads, False, e, span))
    return sites


def _role(module_path: str) -> str:
    roles = facts()["roles"]
    fits = [suffix for suffix in roles if f".{module_path}".endswith(f".{suffix}")]
    return roles[max(fits, key=len)] if fits else "linear." + module_path.rpartition(".")[2]


def _reads(module_path: str, role: str) -> str:
    parent = module_path.rpartition(".")[0]
    for shared in facts()["shared_input"]:
        if role in shared:
            return f"{parent}.{'+'.join(r.split('.')[1] for r in shared)}"
    return module_path


def _check_shapes(checkpoint: Checkpoint, model: PreTrainedModel, parameters: dict[str, tuple[str, ...]]) -> None:
    shapes = {path: tuple(t.shape) for path, t in _tensors(model)}
    for path, stored in parameters.items():
        if len(stored) == 1 and checkpoint.shape(stored[0]) != shapes[path]:
            have, want = list(checkpoint.shape(stored[0])), list(shapes[path])
            raise InputError(f"{stored[0]} is {have} in the files, but config.json makes it {want}; they don't belong together")
