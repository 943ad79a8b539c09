"""llama.cpp through its C interface, as the reader of a GGUF file."""

from __future__ import annotations

import ctypes
from functools import cache as cached
from pathlib import Path

import llama_cpp.llama_cpp as api
import numpy as np
import torch
from torch import Tensor

_QUIET = api.llama_log_callback(lambda level, text, data: None)


@cached
def _silence() -> None:
    api.llama_log_set(_QUIET, None)
    api.llama_backend_init()


class Reader:
    """llama.cpp with a file open. cache: ggml's type of keys and values, 0 is float32, 1 fp16."""

    def __init__(self, path: Path, tokens: int = 128, threads: int = 1, cache: int = 0) -> None:
        _silence()
        given = api.llama_model_default_params()
        # repacked weights need AMX, which a sandbox may forbid though the processor has it
        given.use_extra_bufts = False
        self.model = api.llama_model_load_from_file(str(path).encode(), given)
        assert self.model, f"llama.cpp does not open {path}"
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = tokens
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = cache
        settings.flash_attn_type = 0
        self.context = api.llama_init_from_model(self.model, settings)
        self.vocabulary = api.llama_model_get_vocab(self.model)

    def tokens(self, text: str) -> list[int]:
        """Ids of a text, with the tokens that the file adds."""
        raw, found = text.encode(), (ctypes.c_int32 * 512)()
        count = api.llama_tokenize(self.vocabulary, raw, len(raw), found, 512, True, True)
        return list(found[:count])

    def logits(self, ids: list[int], start: int = 0) -> Tensor:
        """Of a sequence whose first `start` tokens were read before, float32 [tokens, vocabulary]."""
        if start == 0:
            api.llama_memory_clear(api.llama_get_memory(self.context), True)
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, True
            batch.seq_id[i][0] = 0
        assert api.llama_decode(self.context, batch) == 0
        size = api.llama_vocab_n_tokens(self.vocabulary)
        found = np.ctypeslib.as_array(api.llama_get_logits(self.context), (len(ids), size)).copy()
        api.llama_batch_free(batch)
        return torch.from_numpy(found)

    def close(self) -> None:
        api.llama_free(self.context)
        api.llama_model_free(self.model)
