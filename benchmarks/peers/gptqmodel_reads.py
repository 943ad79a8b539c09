"""GPTQModel as a reader: logits of a folder in GPTQ's or AWQ's layout beside those of its decoded weights.

    assay compress MODEL --engine gptq --level int4-g32-sym -o OUT
    assay export OUT --to plain -o PLAIN
    PEER/bin/python benchmarks/peers/gptqmodel_reads.py OUT PLAIN

PEER is an environment with gptqmodel 7.7 (see setup.sh for how others are made). Both run in the dtype that GPTQModel
chooses on a CPU, bfloat16, so rounding of the activations is part of the difference.
"""

import sys

import torch
from gptqmodel import BACKEND, GPTQModel
from transformers import AutoModelForCausalLM

folder, plain = sys.argv[1:3]
ids = torch.randint(1, 40, (2, 16), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    for backend in (BACKEND.TORCH, BACKEND.TORCH_AWQ):
        try:
            model = GPTQModel.load(folder, backend=backend, device="cpu").model
            break
        except ValueError:
            continue
    dtype = next(model.parameters()).dtype
    meant = AutoModelForCausalLM.from_pretrained(plain, dtype=dtype)(ids).logits.float()
    found = model(ids).logits.float()
print(f"{folder}: {dtype}, largest difference {(found - meant).abs().max():.2g}, largest logit {meant.abs().max():.2g}")
