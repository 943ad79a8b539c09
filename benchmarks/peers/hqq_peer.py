"""HQQ, its defaults: no calibration data."""

from __future__ import annotations

from importlib.metadata import version

import torch
from _common import Clock, Job, bits_in_blocks, block_linears, finish, parser, read_job
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from torch import Tensor, nn

SCALE = torch.float16


def quantize(job: Job, linear: nn.Linear) -> Tensor:
    """Quantize a layer and return its values, float32 [out, in].

    The scale and the zero point, which is not an integer, are kept in 16 bits each; the product
    is not rounded again.
    """
    config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group_size, axis=1)
    layer = HQQLinear(linear, config, compute_dtype=SCALE, device="cpu", del_orig=False)
    scale, zero = (layer.meta[part].to(SCALE).float() for part in ("scale", "zero"))
    meta = layer.meta | {"scale": scale, "zero": zero, "compute_dtype": torch.float32}
    return Quantizer.dequantize(layer.W_q, meta)


def main() -> None:
    """Quantize the model on the command line."""
    job = read_job(parser(__doc__).parse_args())
    model, clock = job.load(), Clock()
    with clock.running():
        decoded = {name: quantize(job, layer) for name, layer in block_linears(model).items()}
    finish(job, clock, ("HQQ", version("hqq")), bits_in_blocks(job, 32), model, decoded)


if __name__ == "__main__":
    main()
