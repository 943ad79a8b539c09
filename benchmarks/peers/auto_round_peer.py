"""auto-round: signed gradient descent on the rounding of each block."""

from __future__ import annotations

from importlib.metadata import version

from auto_round import AutoRound
from _common import Clock, bits_in_blocks, finish, parser, read_job
from transformers import AutoTokenizer


def main() -> None:
    """Quantize the model on the command line."""
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=200, help="steps for each block")
    given = arguments.parse_args()
    job = read_job(given)
    model, clock = job.load(), Clock()
    ids = job.ids()
    with clock.running():
        rounding = AutoRound(
            model,
            tokenizer=AutoTokenizer.from_pretrained(job.model),
            scheme="W4A16",
            bits=job.bits,
            group_size=job.group_size,
            sym=False,
            iters=given.steps,
            dataset=job.batches(),
            nsamples=ids.shape[0],
            seqlen=ids.shape[1],
            device_map="cpu",
            enable_torch_compile=False,
        )
        model, _ = rounding.quantize()
    release = "auto-round", version("auto-round")
    finish(job, clock, release, bits_in_blocks(job, 16 + job.bits), model)


if __name__ == "__main__":
    main()
