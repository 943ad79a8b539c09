"""llama.cpp with plans from all its types: less loss at the same size, and slower on a processor (benchmarks/GGUF.md)."""

from dataclasses import replace

from assay.engines import llama_cpp

CONTRACT = replace(llama_cpp.CONTRACT, name="llama.cpp-all", preferred=())
