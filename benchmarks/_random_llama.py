"""Writes Llama checkpoints of any size with random weights, one block in memory at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

TOKENIZER_VOCABULARY = 2048
POSITIONS = 2048
DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, in elements."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Number of weights, embeddings, head and norms included."""
        block = sum(rows * columns for rows, columns in self.block_matrices().values())
        ends = 2 * self.vocabulary * self.hidden + self.hidden
        return self.layers * (block + 2 * self.hidden) + ends

    def block_matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the weight matrices of one block."""
        narrow = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def config(self) -> LlamaConfig:
        """The model's configuration."""
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        )
        config.dtype = torch.bfloat16
        return config


TINY_LLAMA = Shape(2048, 5632, 22, 32, 4, 32000)
"""The shape of TinyLlama: 1.1 billion parameters."""


def narrow(hidden: int, layers: int, vocabulary: int = 4096) -> Shape:
    """A small Llama for curves over the depth; heads of 64, half as many for keys and values."""
    return Shape(hidden, 11 * hidden // 4, layers, hidden // 64, hidden // 128, vocabulary)


def build(shape: Shape, folder: Path, text: Path) -> None:
    """Write config, tokenizer (trained on `text`) and bf16 weights, a shard for each block."""
    folder.mkdir(parents=True, exist_ok=True)
    shape.config().save_pretrained(folder)
    _tokenizer(text).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    homes: dict[str, str] = {}
    total = 0
    for index in range(shape.layers + 1):
        shard = _shard(shape, index, generator)
        file = f"model-{index + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        homes |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    note = {"metadata": {"total_size": total}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(note, indent=1) + "\n")


def _shard(shape: Shape, index: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Tensors of block `index`, or what lies outside the blocks after the last one."""
    if index == shape.layers:
        matrices = dict.fromkeys(("model.embed_tokens", "lm_head"), (shape.vocabulary, shape.hidden))
        norms = ["model.norm"]
    else:
        block = f"model.layers.{index}"
        matrices = {f"{block}.{name}": size for name, size in shape.block_matrices().items()}
        norms = [f"{block}.input_layernorm", f"{block}.post_attention_layernorm"]
    weights = {
        f"{name}.weight": (torch.randn(size, generator=generator) * DEVIATION).bfloat16() for name, size in matrices.items()
    }
    ones = {f"{name}.weight": torch.ones(shape.hidden, dtype=torch.bfloat16) for name in norms}
    return weights | ones


def _tokenizer(text: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a text file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=POSITIONS,
    )
