"""The run of a recipe over models, one model in memory at a time."""

import gc
import sys
import time
from datetime import UTC, datetime

import torch
from tqdm import tqdm

from t2r.evaluate.models import Entry, load, window_only
from t2r.evaluate.recipe import Recipe
from t2r.evaluate.report import Results, environment


def evaluate(
    entries: list[Entry],
    recipe: Recipe,
    items: dict[str, list],
    device: torch.device,
    dtype: torch.dtype,
    stored: torch.dtype,
) -> Results:
    """Every task on every model, in `dtype` on `device`; originals are rounded to `stored` first."""
    facts = {
        **environment(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "recipe": recipe.to_dict(),
        "coverage": {task.name: task.coverage for task in recipe.tasks},
        "notes": [],
    }
    if stored != dtype:
        rounded = str(stored).removeprefix("torch.")
        facts["notes"].append(f"The original's weights were rounded to {rounded}, which its conversion is stored in.")
    results = Results(facts, recipe.tasks)
    for entry in entries:
        model = load(entry, dtype, stored, device)
        evaluate_one(results, entry.label, entry.spec, "converted" if entry.is_converted else "original", model, items)
        if recipe.ablation and window_only(model):
            label = f"{entry.label}, window only"
            evaluate_one(results, label, entry.spec, "window ablation", model, items)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def evaluate_one(results: Results, label: str, spec: str, what: str, model, items: dict[str, list]) -> None:
    """One column. A window ablation skips the tasks that do not depend on the weights' values."""
    counter = TokenCounter(model)
    began = time.perf_counter()
    on_terminal = sys.stderr.isatty()
    tasks = [task for task in results.tasks if task.quality or what != "window ablation"]
    for task in tqdm(tasks, label, disable=not on_terminal):
        start = time.perf_counter()
        results.outcomes[task.name][label] = task.run(model, items[task.name])
        if not on_terminal:
            print(f"{label}: {task.name} {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    results.models[label] = {
        "spec": spec,
        "what": what,
        "model_type": model.config.model_type,
        "gsa": getattr(model.config, "gsa", None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": counter.close(),
        "seconds": round(time.perf_counter() - began, 1),
    }


class TokenCounter:
    """Counts the tokens that a model reads, padding included."""

    def __init__(self, model) -> None:
        self.tokens = 0
        self.hook = model.get_input_embeddings().register_forward_pre_hook(self.count)

    def count(self, module, args) -> None:
        self.tokens += args[0].numel()

    def close(self) -> int:
        self.hook.remove()
        return self.tokens
