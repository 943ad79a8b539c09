"""One budget for weights and cache against the best pair of separate plans, by measured KL in the regime of decoding.

python benchmarks/joint.py [--model DIR|builtin] [--method trellis] [--context 1k] [--batch 8] [--evict snapkv]

At five budgets of memory: the joint plan, and each cache type for all layers with the best plan of the weights in the bytes
that it leaves. Measured on text that calibration never saw: three quarters of a window go through the compressed model as a
prompt, the last quarter is predicted from what the cache holds of it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _harness import CALIBRATION_TEXT, JUDGE_TEXT, MODEL, arguments, machine, table, work_folder, write
from frontier import Levels, levels_of
from torch import Tensor
from transformers import AutoModelForCausalLM

import assay
from assay import engines
from assay.budget import plans
from assay.budget.plan import Plan
from assay.budget.size import Budget
from assay.cache_pricing import FITTED, WINDOW, WINDOWS
from assay.evolving import LevelStore
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.measure.text import windows
from assay.model.errors import InputError
from assay.prompted import Prompted
from assay.run import open_model
from assay.runtime.policy import Stack

ENGINE = "assay"
SHARES = (0.05, 0.15, 0.25, 0.4, 0.6)
"""Of the way from the least memory that is possible to that of the largest weights beside an exact cache."""


class Bench:
    """One model, its profile with prices of the cache, and the KL of any weights and cache together."""

    def __init__(self, model: str, method: str, folder: Path, judged: int, evict: str | None) -> None:
        shipped = model == "builtin"
        self.method, self.contract, self.evict = method, engines.get(ENGINE), evict
        text = None if shipped else CALIBRATION_TEXT
        self.profile: Profile = assay.profile(model, folder / "profile", calibration=text, methods=("two_sided", method))
        source = open_model(model)
        begun = time.process_time()
        assay.price_cache(source.folder, self.profile.folder, text)
        self.pricing_seconds = time.process_time() - begun
        self.streamed = StreamedModel(source)
        self.store = LevelStore(self.streamed, self.profile, method, folder / "levels")
        self.sites = self.streamed.anatomy.sites
        self.model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
        self.original = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        vocabulary = self.streamed.vocabulary
        count = (WINDOWS + FITTED) * WINDOW
        self.calibration: Tensor = windows(source, text, "calibration", count, WINDOW, vocabulary).ids[WINDOWS:]
        judge = None if shipped else JUDGE_TEXT
        ids = windows(source, judge, "evaluation", judged, WINDOW, vocabulary).ids
        self.parts = list(ids.split(24))
        self.reference = [Prompted.of(self.model, part).tail(Stack())[0] for part in self.parts]

    def plan(self, memory: int, cache: str | None, context: str, batch: int) -> Plan:
        """The plan of a budget; cache None: both together."""
        budget = Budget(memory=memory, context=context, batch=batch, cache=cache, evict=None if cache else self.evict)
        return plans.make(self.profile, budget, self.contract, self.method, (), "lagrange", False)

    @torch.no_grad()
    def kl(self, plan: Plan) -> float:
        """Nats per token of the plan's weights and cache."""
        self._set(levels_of(plan))
        lossless = plan.cache["nats"] == 0
        made = [] if lossless else assay.planned_cache(plan)
        fitted = [p.calibrated(self.model, self.calibration) if "calibration" in p.needs else p for p in made]
        sums = 0.0
        for part, reference in zip(self.parts, self.reference, strict=True):
            found, _ = Prompted.of(self.model, part).tail(Stack.of(fitted))
            sums += float((reference.exp() * (reference - found)).sum(-1).double().sum())
        return sums / sum(r.shape[0] * r.shape[1] for r in self.reference)

    def _set(self, levels: Levels) -> None:
        for name, parameter in self.model.named_parameters():
            site, level = self.sites.get(name), levels.get(name)
            parameter.copy_(self.original[name] if site is None or level is None else self.store.decoded(site, level))


def budgets(bench: Bench, context: str, batch: int) -> list[int]:
    """Bytes of memory at `SHARES`."""
    try:
        bench.plan(1 << 20, None, context, batch)
    except InputError as error:
        low = float(str(error).split("allow ")[1].split(" to ")[0].replace(",", "")) * 1e6
    high = bench.plan(1 << 40, "fp16", context, batch).serving["total"]
    return [int(low + share * (high - low) + 20_000) for share in SHARES]


def compared(bench: Bench, context: str, batch: int) -> list[dict[str, Any]]:
    """One row a budget."""
    rows = []
    types = list(bench.plan(1 << 40, None, context, batch).cache["alone"])
    for memory in budgets(bench, context, batch):
        both = bench.plan(memory, None, context, batch)
        pairs: dict[str, tuple[float, float, float]] = {}
        for name in types:
            try:
                plan = bench.plan(memory, name, context, batch)
            except InputError:
                continue
            pairs[name] = (bench.kl(plan), plan.cache["predicted"], plan.bits)
        total, least = both.serving["bytes"], min(pairs, key=lambda n: pairs[n][0])
        rows.append({
            "memory": memory, "used": both.serving["total"], "weights": total["weights"], "cache": total["cache"],
            "title": both.serving["cache_type"], "bits": both.bits, "kl": bench.kl(both), "predicted": both.cache["predicted"],
            "low": both.cache["predicted_low"], "high": both.cache["predicted_high"], "best": least, "best_kl": pairs[least][0],
            "best_bits": pairs[least][2], "pairs": {n: kl for n, (kl, _, _) in pairs.items()},
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def report(bench: Bench, rows: Sequence[dict[str, Any]], threads: int) -> str:
    """The table as markdown."""
    header = (
        "memory, MB",
        "weights + cache, MB",
        "joint: bits, cache",
        "predicted",
        "measured KL",
        "best pair",
        "its KL",
        "ratio",
    )
    lines = [
        [f"{r['memory'] / 1e6:.2f}", f"{r['weights'] / 1e6:.2f} + {r['cache'] / 1e6:.2f}", f"{r['bits']:.2f}, {r['title']}",
         f"{r['predicted']:.5f}", f"{r['kl']:.5f}", f"{r['best_bits']:.2f} bits, {r['best']}", f"{r['best_kl']:.5f}",
         f"{r['kl'] / r['best_kl']:.2f}"]
        for r in rows
    ]  # fmt: skip
    return "\n\n".join([machine(threads), f"pricing the cache: {bench.pricing_seconds:.0f} CPU seconds", table(header, lines)])


def main() -> None:
    """Five budgets of one model."""
    parser = arguments(__doc__)
    parser.set_defaults(model=str(MODEL))
    parser.add_argument("--method", default="trellis")
    parser.add_argument("--context", default="1k")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=12_288, help="of the judge, a quarter of which is predicted")
    parser.add_argument("--evict", default=None, help="let the joint plan drop tokens by this policy")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(str(given.model), given.method, Path(folder), given.tokens, given.evict)
        rows = compared(bench, given.context, given.batch)
    name = f"joint-{Path(str(given.model)).name}-{given.method}{f'-{given.evict}' if given.evict else ''}"
    write(work_folder(given.out), name, report(bench, rows, given.threads), {"rows": rows})


if __name__ == "__main__":
    main()
