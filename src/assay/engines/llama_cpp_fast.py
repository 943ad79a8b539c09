"""llama.cpp with the types that a processor reads fastest for their size.

Reading one token at a time is bound by unpacking, not by memory, so a type is left out where one of more bits and the same
length of block takes less time (benchmarks/GGUF.md).
"""

from dataclasses import replace

from assay.engines import llama_cpp

CONTRACT = replace(llama_cpp.CONTRACT, name="llama.cpp-fast", formats=("q8_0", "q6_k", "q4_1", "q4_k", "q3_k", "q2_k"))
