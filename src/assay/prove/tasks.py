"""Scores on tasks: lm-eval runs them on the original and on the result, example by example."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from assay.engines.load import load
from assay.measure.text import load_tokenizer
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError

INSTALL = 'pip install "assay[tasks]"'
YAML = (".yaml", ".yml")
Z95 = 1.96


@dataclass(frozen=True)
class Tasks:
    """Tasks by lm-eval's names, or by files in its own YAML. limit: examples of each, None for all.

    Raises InputError where lm-eval is missing, and for a task that it doesn't know or whose data can't be read.
    """

    names: tuple[str, ...]
    manager: Any = field(repr=False)
    limit: int | None = None

    @classmethod
    def of(cls, wanted: Sequence[str], limit: int | None = None) -> Tasks:
        """Look the tasks up, before anything is measured."""
        found = [_named(text.strip()) for text in wanted if text.strip()]
        if not found:
            raise InputError("--tasks names no task; give names like arc_easy,piqa or a YAML file")
        folders = sorted({folder for _, folder in found if folder})
        # reading lm-eval's own thousands of tasks takes many seconds
        own = any(folder is None for _, folder in found)
        manager = _lm_eval("tasks").TaskManager(include_path=folders or None, include_defaults=own)
        made = cls(tuple(name for name, _ in found), manager, limit)
        made._check()
        return made

    def _check(self) -> None:
        if unknown := [name for name in self.names if name not in self.manager.all_tasks]:
            raise InputError(f"lm-eval has no task {unknown[0]!r}; lm-eval ls tasks lists them, and a YAML file adds one")
        for name in self.names:
            try:
                _lm_eval("tasks").get_task_dict([name], self.manager)
            except Exception as error:  # what a task's own file and data raise has no common type
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise InputError(f"task {name}: its data can't be read ({reason})") from error

    def scores(self, model: Checkpoint, tokenizer: Any, seed: int = 0) -> dict[str, dict[str, list[float]]]:
        """What each example scored, by task and metric."""
        language_model = _lm_eval("models.huggingface").HFLM(
            pretrained=load(model.folder), tokenizer=tokenizer, device="cpu", batch_size=1
        )
        with torch.random.fork_rng():
            found = _lm_eval("evaluator").simple_evaluate(
                model=language_model, tasks=list(self.names), task_manager=self.manager, limit=self.limit,
                bootstrap_iters=0, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
        return {task: _by_metric(samples) for task, samples in sorted(found["samples"].items())}


def compared(result: Checkpoint, original: Checkpoint, tasks: Tasks) -> dict[str, dict[str, dict[str, float | None]]]:
    """By task and metric: the mean over `examples` of `original` and `compressed`, their `difference` and its 95% interval.

    Both answer the same examples, so the interval is that of the differences, which is narrower than either score's.
    """
    tokenizer = load_tokenizer(original)
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise InputError(f"{original.folder}: its tokenizer names no first or last token, and lm-eval needs one")
    before, after = (tasks.scores(model, tokenizer) for model in (original, result))
    return {task: {m: _pair(before[task][m], after[task][m]) for m in metrics} for task, metrics in before.items()}


def _pair(before: Sequence[float], after: Sequence[float]) -> dict[str, float | None]:
    old, new = torch.tensor(before, dtype=torch.float64), torch.tensor(after, dtype=torch.float64)
    change = new - old
    reach = Z95 * float(change.std()) / len(change) ** 0.5 if len(change) > 1 else None
    mean = float(change.mean())
    low, high = (None, None) if reach is None else (mean - reach, mean + reach)
    return {
        "original": float(old.mean()), "compressed": float(new.mean()), "difference": mean, "low": low, "high": high,
        "examples": len(change),
    }  # fmt: skip


def _by_metric(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Metrics that are one number an example; those of the whole set (perplexities) are left out."""
    metrics = samples[0].get("metrics", [])
    kept = [m for m in metrics if all(isinstance(s.get(m), (int, float)) for s in samples)]
    ordered = sorted(samples, key=lambda s: s["doc_id"])
    return {m: [float(s[m]) for s in ordered] for m in kept}


def _named(text: str) -> tuple[str, str | None]:
    """A task's name, and the folder of its file."""
    path = Path(text)
    if path.suffix not in YAML:
        return text, None
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("task:")]
        name = yaml.safe_load(lines[0])["task"]
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError) as error:
        raise InputError(f"{path}: no task of lm-eval; it must hold a line like task: NAME") from error
    return str(name), str(path.absolute().parent)


def _lm_eval(module: str) -> Any:
    """A module of lm-eval. Raises InputError where it isn't installed."""
    try:
        return importlib.import_module(f"lm_eval.{module}")
    except ImportError as error:
        raise InputError(f"--tasks needs lm-eval, which isn't installed ({error.name}); {INSTALL}") from error
