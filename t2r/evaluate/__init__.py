"""Evaluation of models, and the comparison of a converted model with its original.

recipe.py says which tasks; perplexity.py, likelihood.py, recall.py and efficiency.py are the kinds of task; models.py
opens the models; statistics.py and report.py make numbers of what they did.
"""


def compare(
    models: list[str],
    recipe: str = "quick",
    out: str | None = None,
    limit: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    data: str | None = None,
) -> dict:
    """Evaluate the models, the original first, on the same items; write a report and return what report.json holds.

    models: what `t2r convert` reads or wrote, as PATH or LABEL=PATH. recipe: a shipped name or a YAML file.
    out: the folder to make, by default runs/compare-LABEL of the second model. limit: items of each task.
    device: by default a GPU if there is one. dtype: by default the one that the converted model is stored in; the
    original is cast to the same. data: the folder that `eval:` in the recipe means.

    Raises UserError, before any model is run, for whatever the user can mend; `out` then does not exist.
    """
    from pathlib import Path

    from t2r.errors import UserError
    from t2r.evaluate.models import common_tokenizer, open_models, pick_device, pick_dtype
    from t2r.evaluate.plots import require_matplotlib
    from t2r.evaluate.recipe import load_recipe
    from t2r.evaluate.report import check_absent, named_fault, new_folder, summary, write
    from t2r.evaluate.run import evaluate
    from t2r.evaluate.task import check_data

    if len(models) < 2:
        raise UserError("nothing to compare with: give the original and a converted model", next="t2r compare --help")
    if limit is not None and limit < 1:
        raise UserError(f"{limit} items are nothing to compare", where="--limit", nearest=1)
    require_matplotlib()
    chosen, on = load_recipe(recipe, limit), pick_device(device)
    entries = open_models(models)
    folder = Path(out if out is not None else f"runs/compare-{entries[1].label}").expanduser()
    check_absent(folder)
    items = chosen.prepare(common_tokenizer(entries), on, check_data(data))
    with new_folder(folder) as aside:
        results = evaluate(entries, chosen, items, on, *pick_dtype(entries, dtype))
        with named_fault(folder):
            write(results, aside)
    print(summary(results))
    print(f"\nwrote {folder / 'report.md'}")
    return results.to_dict()
