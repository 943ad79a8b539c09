"""llm-compressor's AWQ, then rounding to nearest, with the settings its examples use."""

from __future__ import annotations

from _common import parser, read_job
from _llm_compressor import run, scheme
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache


def main() -> None:
    """Quantize the model on the command line."""
    job = read_job(parser(__doc__).parse_args())
    # It pins its cache for copies to an accelerator, which fails where there is none.
    IntermediatesCache.pin_memory = lambda *_: None
    recipe = [AWQModifier(duo_scaling="both"), QuantizationModifier(**scheme(job))]
    run(job, "llm-compressor AWQ", recipe)


if __name__ == "__main__":
    main()
