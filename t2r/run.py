"""`t2r run`: a configuration from its source model to the report; and `ls`, `cp`, `validate` for configurations."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from t2r.config import FOLDERS, find, read, shipped
from t2r.errors import UserError
from t2r.schema import RunConfig, load_run


def run(config: str, overrides: Sequence[str] = (), out: str | None = None) -> None:
    """Convert, train through the stages, compare: all that `config` (a file or a shipped name) says, in one folder.

    overrides: `key=value` words. out: the folder, default runs/NAME: config.yaml, env.json, `start` (the conversion),
    a folder for each stage, `model` (a link to the result) and `compare` with report.md. An unfinished run goes on
    where it stopped, a finished one is never written over.
    Raises UserError for whatever the user can mend.
    """
    from t2r.evaluate.plots import require_matplotlib
    from t2r.evaluate.recipe import load_recipe
    from t2r.evaluate.task import check_data
    from t2r.train.finetune import MODEL, REPORT, START, make_start, open_folder, resolve_run, train_stages, wait_for

    settings = resolve_run(config, overrides)
    if settings.compare:
        # what could not run after the training must not let it begin
        require_matplotlib()
        load_recipe(settings.compare.recipe, settings.compare.limit)
        check_data(settings.compare.data)
    result = REPORT if settings.compare else MODEL if settings.stages else START
    folder = open_folder(settings, out or f"runs/{Path(config).stem}", result)
    if settings.stages:
        train_stages(settings, folder)
    else:
        wait_for(folder / START, lambda: make_start(settings.source, settings.convert, folder / START))
    if settings.compare:
        compare_all(settings, folder)


def compare_all(settings: RunConfig, folder: Path) -> None:
    """The teacher, the untrained conversions and the trained one, side by side."""
    from t2r.evaluate import compare
    from t2r.train.finetune import MODEL, REPORT, START, make_start

    models = [f"teacher={settings.source}"]
    for other in settings.compare.beside:
        start = folder / other.label
        if not start.exists():
            make_start(settings.source, other, start)
        models.append(f"{other.label}={start}")
    models.append(f"{settings.convert.chosen_preset}-start={folder / START}")
    if settings.stages:
        models.append(f"trained={folder / MODEL}")
    what = settings.compare
    options = {"device": settings.device, "data": what.data, "notes": tuple(what.notes)}
    compare(models, what.recipe, str(folder / REPORT), what.limit, **options)


def ls() -> None:
    """Print what ships with t2r, one line each."""
    for kind in FOLDERS:
        print(f"{kind}:")
        entries = shipped(kind)
        width = max(map(len, entries), default=0)
        for name, line in entries.items():
            print(f"  {name:{width}}  {line}")


def cp(name: str, file: str) -> None:
    """Copy a shipped configuration or recipe to edit it. Raises UserError if `file` exists."""
    source, target = find(name), Path(file).expanduser()
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UserError(f"{target} already exists", nearest=target.with_stem(f"{target.stem}-2"))
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", where=target) from error
    print(f"wrote {target}")


def validate(file: str, overrides: Sequence[str] = ()) -> None:
    """Check a configuration with each of its variants, or a recipe, without running it. Raises UserError.

    Data that is not here, or not good, is only noted: a run may be checked where it will not happen.
    """
    from t2r.data.prepare import check_data
    from t2r.evaluate.recipe import load_recipe

    path, note = find(file), ""
    if "tasks" in read(path):
        load_recipe(path)
        note = "\nnot checked: the data of its tasks, names of lm-eval's tasks"
    else:
        config = load_run(path, overrides)
        for variant in config.variants:
            load_run(path, overrides, variant)
        if config.compare:
            load_recipe(config.compare.recipe)
        try:
            if config.stages:
                check_data(config)
        except UserError as error:
            note = f", but not with the data here: {error}"
        note += f"\nnot checked: {config.source}, data sets on the hub, whether the text is long enough"
    print(f"{path} is valid{note}")
