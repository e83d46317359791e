"""Evaluation of models, and the comparison of a converted model with its original.

recipe.py says which tasks; the modules of task.py's subclasses are the kinds of task, harness.py the one that runs
lm-eval's; scoring.py reads texts for them; run.py runs them in units; statistics.py and report.py make numbers of it.
"""


def compare(
    models: list[str], recipe: str = "quick", out: str | None = None, limit: int | None = None, **options
) -> dict:
    """Evaluate the models, the original first, on the same items; write a report and return what report.json holds.

    models: what `t2r convert` reads or wrote, as PATH or LABEL=PATH. recipe: a shipped name or a YAML file.
    out: the folder to make, by default runs/compare-LABEL of the second model. An interrupted run keeps what it has
    finished beside it and goes on when it is called again. limit: items of each task. Options:

    device: by default all GPUs, or the CPU; several, with commas, share the work, and one named twice has two workers.
    dtype: by default the one that the converted model is stored in; the original is cast to the same. data: the folder
    that `eval:` in the recipe means.
    batch_size: texts that are read at once, "auto": as many as fit, None: the recipe's. No score depends on it.
    log_samples: write items.jsonl too. allow_code: run code that a model wrote, for tasks that do.
    notes: sentences for the report.

    Raises UserError, before any model is run, for whatever the user can mend; `out` then does not exist.
    """
    from t2r.errors import UserError
    from t2r.evaluate.measure import measure
    from t2r.evaluate.run import Request

    if len(models) < 2:
        raise UserError("nothing to compare with: give the original and a converted model", next="t2r compare --help")
    return measure(Request(tuple(models), recipe, out, limit, **options))


def evaluate(model: str, **options) -> dict:
    """Evaluate one model: `compare` without an original, with the same arguments, by keyword.

    out: by default runs/eval-LABEL. Tasks that compare a model with its original are left out.
    """
    from t2r.evaluate.measure import measure
    from t2r.evaluate.run import Request

    return measure(Request((model,), **options))
