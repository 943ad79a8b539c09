"""llama.cpp with the types that a processor reads fastest for their size.

Reading one token at a time is bound by unpacking, not by memory: of the types below none is slower than one that has
fewer bits, and a type for which one of more bits is read faster is left out (benchmarks/GGUF.md).
"""

from dataclasses import replace

from assay.engines import llama_cpp

CONTRACT = replace(llama_cpp.CONTRACT, name="llama.cpp-fast", formats=("q8_0", "q6_k", "q4_1", "q4_k", "q3_k", "q2_k"))
