"""optimum-quanto, its defaults: rounding to nearest, no calibration data, groups of its own choice."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

from _common import Clock, bits_in_blocks, block_linears, finish, parser, read_job
from optimum.quanto import freeze, qint2, qint4, quantize

WIDTHS = {2: qint2, 4: qint4}
GROUP = 128
PARAMETERS = 32
"""Bits of a group's scale and shift, which quanto keeps in the model's dtype."""


def main() -> None:
    """Quantize the model on the command line."""
    job = read_job(parser(__doc__).parse_args())
    if job.bits not in WIDTHS:
        raise SystemExit(f"quanto has no {job.bits} bits")
    model, clock = job.load(), Clock()
    names = list(block_linears(model))
    with clock.running():
        quantize(model, weights=WIDTHS[job.bits], include=names)
        freeze(model)
        decoded = {name: model.get_submodule(name).weight.dequantize().float() for name in names}
    bits = bits_in_blocks(replace(job, group_size=GROUP), PARAMETERS)
    finish(job, clock, ("quanto", version("optimum-quanto")), bits, job.load(), decoded)


if __name__ == "__main__":
    main()
