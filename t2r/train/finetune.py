"""`t2r finetune`: convert if need be, then train through the stages of a configuration, on every GPU of the machine."""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import cache, partial
from io import StringIO
from pathlib import Path

import torch
import transformers

from t2r.config import find, load, save
from t2r.convert import convert
from t2r.convert.source import Source, open_source
from t2r.convert.verify import load_source
from t2r.data.prepare import RunData, check_data
from t2r.env import env
from t2r.errors import UserError
from t2r.families import FAMILIES
from t2r.schema import ConvertConfig, RunConfig, StageConfig, load_run, with_device
from t2r.train.engine import train
from t2r.train.launch import LOGS, Machines, check_machines, launch, launch_by_ssh
from t2r.train.log import METRICS, read
from t2r.train.sharding import (
    Group,
    compute_dtype,
    engine_config,
    join_group,
    require_deepspeed,
    shard_teacher,
    without_weights,
    zero_stage,
)
from t2r.train.stages import STAGES
from t2r.train.trackers import check_trackers
from t2r.train.validation import teacher_perplexities
from t2r.train.varlen import read_by_bounds

CONFIG, START, MODEL, REPORT = "config.yaml", "start", "model", "compare"
HERE = Machines()
NODE = "T2R_NODE"  # in the environment: the number of this machine, before its processes have ranks


def finetune(
    config: str,
    overrides: Sequence[str] = (),
    model: str | None = None,
    out: str | None = None,
    **machines: int | str | None,
) -> None:
    """Train through the stages of `config` (a file or a shipped name) with `key=value` overrides.

    model: a converted folder to begin with; None: convert the config's source first. out: the run's folder, default
    runs/NAME. It gets config.yaml, env.json, a folder for each stage, and `model`, a link to the result. An unfinished
    run goes on where it stopped. machines: the fields of launch.Machines.
    Raises UserError for whatever the user can mend.
    """
    where = Machines(**machines)
    check_machines(where)
    if where.node:
        os.environ[NODE] = str(where.node)
    settings = resolve_run(config, overrides)
    if not settings.stages:
        raise UserError("there are no stages to train", where=config, nearest="stages: [{kind: align, ...}]")
    if model:
        check_converted(Path(model), settings)
    folder = open_folder(settings, out or f"runs/{Path(config).stem}", MODEL)
    train_stages(settings, folder, model, where)
    say(f"wrote {folder / MODEL}")


def resolve_run(config: str, overrides: Sequence[str]) -> RunConfig:
    """The config as it will run here: variant and device chosen, data, source and packages found. Raises UserError."""
    path = find(config, ["configs"])
    settings = with_device(load_run(path, overrides, choose_variant(path, overrides)))
    teacher_source(settings.source)
    if settings.stages:
        check_data(settings)
        check_trackers(settings.log.trackers)
        require_deepspeed(settings.device)
    for i, stage in enumerate(settings.stages):
        dtype = compute_dtype(stage, settings.device)
        engine_config(settings.deepspeed, stage, dtype, world=1)
        if dtype == torch.bfloat16 and not zero_stage(settings.deepspeed):
            what = f"deepspeed.zero is 0, which keeps no float32 weights beside the bfloat16 ones of stages.{i}"
            raise UserError(what, nearest="deepspeed.zero=1")
    return replace(settings, variants={})


def choose_variant(config: Path, overrides: Sequence[str]) -> str | None:
    """tiny where the environment asks for it, gpu where one is used."""
    if os.environ.get("DEMO_TINY") == "1":
        return "tiny"
    return "gpu" if with_device(load(config, RunConfig, overrides)).device == "cuda" else None


def open_folder(settings: RunConfig, out: str, result: str) -> Path:
    """The folder of a run, with config.yaml and env.json, new or unfinished: without `result`. One in which a run of
    another configuration failed before it trained is made new.

    Raises UserError for one that is finished, holds what another configuration made, or is not a run's.
    """
    folder = Path(out).expanduser()
    number = 2
    while os.path.lexists(free := folder.with_name(f"{folder.name}-{number}")):
        number += 1
    known, other = folder / CONFIG, f"--out {free}"
    before = load(known, RunConfig) if known.exists() else None
    if before == settings:
        if os.path.lexists(folder / result):
            raise UserError(f"the run in {folder} is finished", nearest=other)
        return folder
    if before:
        check_untrained(folder, before, settings, other)
    if is_first():
        if not before and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and holds no run", nearest=other)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for stage in stage_folders(before, folder) if before else []:
                shutil.rmtree(stage, ignore_errors=True)  # the teacher's perplexity, at most
            (folder / "env.json").write_text(environment(), encoding="utf-8")
            save(settings, folder / f".{CONFIG}")
            os.replace(folder / f".{CONFIG}", known)
        except OSError as error:
            raise UserError(f"cannot write there: {error.strerror}", where=folder) from error
    while not known.exists() or load(known, RunConfig) != settings:
        time.sleep(0.5)  # the first process writes it
    return folder


def check_untrained(folder: Path, before: RunConfig, settings: RunConfig, other: str) -> None:
    """Raise UserError if the run `before` has left in its folder what would be lost, or be taken for one of `settings`:
    steps, checkpoints, a result, conversions."""
    what = f"{folder} holds a run of another configuration"
    results = [path for path in (folder / MODEL, folder / REPORT) if os.path.lexists(path)]
    steps = [path for path in stage_folders(before, folder) if any(path.glob("*step-*")) or has_steps(path / METRICS)]
    for path in results + steps:
        raise UserError(f"{what}, which has made {path.name}", where=folder / CONFIG, nearest=other)
    old = conversions(before)
    for name, made in conversions(settings).items():
        if (folder / name).exists() and old.get(name) != made:
            what = f"{what}, whose conversion {name} is of another source or has other settings"
            raise UserError(what, where=folder / CONFIG, nearest=other, next=f"rm -r {folder / name}")


def stage_folders(settings: RunConfig, folder: Path) -> list[Path]:
    return [folder / f"{i}-{stage.kind}" for i, stage in enumerate(settings.stages, start=1)]


def has_steps(metrics: Path) -> bool:
    return any("loss" in line for line in read(metrics))


def conversions(settings: RunConfig) -> dict[str, tuple[str, ConvertConfig]]:
    """Folder in the run's -> what it is the conversion of, and how."""
    beside = settings.compare.beside if settings.compare else []
    return {START: (settings.source, settings.convert)} | {c.label: (settings.source, c) for c in beside}


def train_stages(settings: RunConfig, folder: Path, model: str | None = None, where: Machines = HERE) -> None:
    """The stages in order, each in folder/N-KIND; then folder/model links to the result of the last.

    In this process if it is one of a launch, or the only one needed; else in processes that it starts.
    """
    start = Path(model) if model else folder / START
    if not (start.exists() or settings.data.stream):
        RunData(settings, teacher_source(settings.source).load_tokenizer())  # before the work that it could be in vain
    if not model:
        wait_for(start, lambda: make_start(settings.source, settings.convert, start))
    options = {"--config": folder / CONFIG, "--model": start, "--out": folder}
    again = ["finetune", *(word for name, path in options.items() for word in (name, str(path.absolute())))]
    if where.hostfile:
        launch_by_ssh(again, where.hostfile)
        return
    processes = where.processes or (torch.cuda.device_count() if settings.device == "cuda" else 1)
    if processes * where.nodes > 1 and "RANK" not in os.environ:
        launch(again, processes, where, folder / LOGS)
        return
    result = run_stages(settings, folder, start)
    link = folder / MODEL
    if is_first() and not link.exists():
        link.symlink_to(os.path.relpath(result, folder), target_is_directory=True)


def run_stages(settings: RunConfig, folder: Path, start: Path) -> Path:
    """All stages in this process, one of a group if a launcher says so. Returns the last result."""
    transformers.utils.logging.disable_progress_bar()
    group = join_group(settings.device)
    data = RunData(settings, open_source(start).load_tokenizer())
    teacher = teacher_dtype = None
    for i, (stage, out) in enumerate(zip(settings.stages, stage_folders(settings, folder), strict=True)):
        check_split(stage, group.world, i)
        dtype = compute_dtype(stage, group.device.type)
        if not STAGES[stage.kind].needs_teacher:
            teacher = teacher_dtype = None  # its memory is the stage's
        elif teacher_dtype != dtype:
            teacher, teacher_dtype = load_teacher(settings, group, dtype), dtype
        rows, validation = data.rows(stage, settings.seed + i), data.validation_rows(stage)
        teacher_ppl = {}
        if validation is not None:
            # a stage without a teacher has one for as long as that takes
            load, rest = partial(load_teacher, settings, group, dtype), (validation, stage, group, out)
            teacher_ppl = teacher_perplexities(load if teacher is None else lambda model=teacher: model, *rest)
        start = train(settings, stage, start, teacher, rows, validation, teacher_ppl, out, group)
    return start


@cache
def teacher_source(source: str) -> Source:
    """`open_source`, once: a GGUF file takes seconds to open."""
    return open_source(source)


def load_teacher(settings: RunConfig, group: Group, dtype: torch.dtype) -> torch.nn.Module:
    """The source itself, frozen, whole or sharded. Its weights are cast, its buffers are not: rotary frequencies need
    float32."""
    source, whole = teacher_source(settings.source), settings.deepspeed.teacher == "whole"
    # of what is sharded the others get their part from the first; what a GGUF file becomes only its reading tells
    read = whole or group.rank == 0 or source.is_quantised
    teacher = (load_source(source) if read else without_weights(source.config)).requires_grad_(False).eval()
    read_by_bounds(teacher, group.device, dtype)
    if not whole:
        return shard_teacher(teacher, settings.deepspeed, dtype, group)
    for parameter in teacher.parameters():
        parameter.data = parameter.data.to(dtype)
    return teacher.to(group.device)


def check_split(stage: StageConfig, world: int, i: int) -> None:
    if stage.rows % (stage.micro_batch * world):
        unit, own = stage.micro_batch * stage.context * world, stage.rows // world
        nearest = f"stages.{i}.batch_tokens={max(1, round(stage.batch_tokens / unit)) * unit}"
        if stage.rows % world == 0:  # the batch can stay
            nearest = f"stages.{i}.micro_batch={max(n for n in range(1, stage.micro_batch + 1) if own % n == 0)}"
        what = f"stages.{i}.batch_tokens is {stage.batch_tokens}, no multiple of micro_batch x context x {world} GPUs"
        raise UserError(what, nearest=nearest)


def check_converted(folder: Path, settings: RunConfig) -> None:
    """Raise UserError unless the folder is a conversion whose teacher the config's source can be."""
    config, teacher = open_source(folder).config, teacher_source(settings.source).config
    if config.model_type not in {family.gsa_model_type for family in FAMILIES.values()}:
        raise UserError(f"a {config.model_type} model is not converted yet", where=folder, next="t2r convert SRC OUT")
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        ours, theirs = getattr(config, name), getattr(teacher, name)
        if ours != theirs:
            raise UserError(f"{folder} does not come from {settings.source}: {name} is {ours}, not {theirs}")


def make_start(source: str, c: ConvertConfig, out: Path) -> None:
    """`t2r convert`, as the config says."""
    convert(source, str(out), **asdict(c))


def is_first() -> bool:
    """Whether this process, of all that share a disk, is the one to write."""
    return os.environ.get("RANK", os.environ.get(NODE, "0")) == "0"


def wait_for(path: Path, make: Callable[[], None]) -> None:
    """Let the first process make `path`, which appears complete or not at all; the others wait for it."""
    while not path.exists():
        if is_first():
            make()
        else:
            time.sleep(0.5)


def say(line: str) -> None:
    if is_first():
        print(line, flush=True)


def environment() -> str:
    """What `t2r env` prints, as JSON."""
    text = StringIO()
    with redirect_stdout(text):
        env()
    facts = (line.partition(":") for line in text.getvalue().splitlines())
    return json.dumps({name: value.strip() for name, _, value in facts}, indent=1) + "\n"
