"""llama.cpp without the types that look vectors up in codebooks: on a processor these take longer than their bytes."""

from dataclasses import replace

from assay.engines import llama_cpp
from assay.model.ggml import KINDS

CONTRACT = replace(
    llama_cpp.CONTRACT,
    name="llama.cpp-fast",
    formats=tuple(kind for kind in llama_cpp.CONTRACT.formats if not KINDS[kind].codebook),
)
