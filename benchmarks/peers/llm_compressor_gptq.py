"""llm-compressor's GPTQ, its defaults."""

from __future__ import annotations

from _common import parser, read_job
from _llm_compressor import run, scheme
from llmcompressor.modifiers.gptq import GPTQModifier


def main() -> None:
    """Quantize the model on the command line."""
    job = read_job(parser(__doc__).parse_args())
    run(job, "llm-compressor GPTQ", [GPTQModifier(**scheme(job))])


if __name__ == "__main__":
    main()
