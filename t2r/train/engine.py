"""The loop: one stage on the DeepSpeed engine, from a converted folder to a trained one, resumable at its checkpoints.

Which tokens a step sees and which learning rate it takes are functions of the step, so a resumed run goes on as if
nothing had happened.
"""

import signal
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2r.convert.source import open_source
from t2r.data.packing import Batch, Mixture, ahead
from t2r.errors import UserError
from t2r.schema import RunConfig, StageConfig
from t2r.train.checkpoint import (
    Lost,
    check_disk,
    clear,
    lost,
    newest_checkpoint,
    of_other_world,
    resume,
    save,
    step_of,
)
from t2r.train.cost import hardware_of, training_flops
from t2r.train.log import Log
from t2r.train.losses import check_liger
from t2r.train.parameters import (
    BIASES,
    add_adapters,
    check_saved,
    parameter_groups,
    set_learning_rates,
    train_offsets,
)
from t2r.train.plot import plot
from t2r.train.sharding import Group, compute_dtype, from_a_peer, initialize, without_weights, zero_stage
from t2r.train.stages import STAGES, Stage, mixers
from t2r.train.validation import validate
from t2r.train.varlen import read_by_bounds

STOP = "stop"  # the metric in which processes tell each other that one of them was asked to stop


class Step(nn.Module):
    """What the engine runs: a stage's loss. Only the student is part of it, so that only it is sharded and saved."""

    def __init__(self, stage: Stage, student: nn.Module, teacher: nn.Module | None) -> None:
        super().__init__()
        self.student = student
        self.stage, self.teacher = stage, [teacher]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        # compiled layers are made for any number of documents at once
        torch._dynamo.maybe_mark_dynamic(batch.cu_seqlens, 0)
        loss, metrics = self.stage.loss(self.student, self.teacher[0], batch)
        # a loss that is not finite must not have a gradient that is: only gradients are checked before the update
        return loss * (1 + 0 * loss.detach()), metrics


class Interrupt:
    """Context manager that remembers SIGTERM or one Ctrl-C in place of dying from it, for the loop to end at the next
    step. A second Ctrl-C ends it at once. requested: the signal's number, 0 while there was none."""

    def __enter__(self) -> "Interrupt":
        self.requested, self.before = 0, {}
        if threading.current_thread() is threading.main_thread():  # else signals are not ours
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame) -> None:
        self.requested = number
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def __exit__(self, *error) -> None:
        for number, before in self.before.items():
            signal.signal(number, before)


def recompute_layers(student) -> None:
    """Activation checkpointing, whatever this transformers calls it."""
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_layers(student, teacher, kind: str) -> None:
    """torch.compile, layer by layer, one graph for all of them; in align the student's mixers are called alone,
    and the teacher's, which are listened to, stay as they are."""
    if kind == "align":
        parts, heard = mixers(student), mixers(teacher)
        parts += [x for layer in teacher.model.layers for x in layer.children() if x not in heard]
    else:
        parts = [*student.model.layers, *(teacher.model.layers if teacher else [])]
    torch.compiler.reset()  # what a stage before has compiled counts towards the most that one function may have
    for part in parts:
        part.compile()


def load_student(folder: Path, stage: StageConfig, read: bool = True):
    """The model in `folder`, in float32, made ready for what the stage trains. read: its weights; else `partition` has
    to bring them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for name in vars(config):  # no randomness: a resumed run computes what an uninterrupted one would have
        if "dropout" in name or name.endswith("pdrop"):
            setattr(config, name, 0.0)
    if read:
        options = {"config": config, "dtype": torch.float32, "local_files_only": True}
        student = AutoModelForCausalLM.from_pretrained(folder, **options).train()
    else:
        student, source = without_weights(config).train(), open_source(folder)
        for name, parameter in student.named_parameters():
            if name.endswith(BIASES):  # offsets begin from these
                parameter.data.copy_(source.tensor(name))
    if stage.activation_checkpointing:
        recompute_layers(student)
    train_offsets(student)
    if stage.lora:
        add_adapters(student, stage.lora)
    return student


def train(
    config: RunConfig,
    stage: StageConfig,
    student_folder: Path,
    teacher: nn.Module | None,
    rows: Mixture,
    validation: Mixture | None,
    teacher_ppl: dict[str, float],
    out: Path,
    group: Group,
) -> Path:
    """Train the converted model in `student_folder` through one stage and return the folder of the result.

    out: holds metrics.jsonl and checkpoints; where there is a checkpoint already, training goes on from the newest.
    teacher: a causal LM on the group's device in the stage's dtype, or None if the stage needs none. teacher_ppl: its
        perplexities on the validation rows.
    Raises UserError when the loss stays non-finite, the disk is full, the data cannot be read, another process is gone,
    or a checkpoint belongs to another model; SystemExit 143 after SIGTERM and 130 after Ctrl-C, with a checkpoint of
    the last step.
    """
    newest = newest_checkpoint(out)
    if newest and step_of(newest) >= stage.steps:
        return newest
    source, zero = open_source(student_folder), zero_stage(config.deepspeed)
    student = load_student(student_folder, stage, read=zero != 3 or group.rank == 0)
    read_by_bounds(student, group.device, compute_dtype(stage, group.device.type))
    groups = parameter_groups(student, stage)
    check_saved(student, source)
    if stage.loss.backend == "liger" and stage.kind != "align":
        check_liger(student, group.device.type)
    if group.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        clear(out, newest)
        check_disk(out, source, sum(p.numel() for g in groups for p in g["params"]), stage.keep)
    flops = training_flops(student, stage)
    universal = newest is not None and of_other_world(newest, group)
    step = Step(STAGES[stage.kind](stage, config.data.has_lookups), student, teacher)
    if stage.compile:
        compile_layers(student, teacher, stage.kind)
    linear = torch.nn.functional.linear
    engine = initialize(step, groups, config.deepspeed, stage, group, universal)
    start = resume(engine, newest, source, group) if newest else 0
    log = Log(out, stage, start, flops, peak_flops(group), config.log) if group.rank == 0 else None

    def check(step: int) -> None:
        if validation is None:
            return
        with torch.compiler.set_stance("force_eager"):  # batches of other sizes, modules that are listened to
            found = validate(engine, validation, stage, group) | {"teacher_ppl": teacher_ppl}
        if log:
            log.validation(step, found)
            log.resume_clock()

    if not start:
        check(0)
    forwards = stage.rows // (stage.micro_batch * group.world)
    batches = ahead(
        chain.from_iterable(
            rows.step(step, stage.rows, stage.micro_batch, group.rank, group.world)
            for step in range(start, stage.steps)
        ),
        group.device,
    )
    failures = 0
    try:
        with Interrupt() as interrupt:
            for done in range(start + 1, stage.steps + 1):
                rates = set_learning_rates(engine.optimizer, stage, done - 1)
                metrics = optimizer_step(engine, batches, forwards, group, interrupt)
                stopping, norm = metrics.pop(STOP) > 0, metrics.pop("grad_norm")
                skipped = bool(engine.optimizer.overflow)
                failures = failures + 1 if skipped else 0
                if log:
                    log.step(done, metrics, rates, norm, skipped)
                if failures == stage.give_up:
                    what = f"loss or gradient not finite in {failures} steps in a row, the last is step {done}"
                    raise lost(f"{what}; smaller learning rates or dtype float32 may help", out)
                last = done == stage.steps
                if last or (stage.validate_every and done % stage.validate_every == 0):
                    check(done)
                if last or stopping or (stage.save_every and done % stage.save_every == 0):
                    save(engine, source, out, done, stage, zero, group)
                    if log:
                        log.resume_clock()
                if last and log:
                    plot(out)
                if stopping:
                    number = signal.Signals(interrupt.requested or signal.SIGTERM)  # 0: another process was told
                    if log:
                        what = f"stopped by {number.name} after step {done}/{stage.steps}"
                        log.say(f"{what}; the same command goes on from it")
                    raise SystemExit(128 + number)
    except RuntimeError as error:
        if not from_a_peer(error):
            raise
        raise lost("another process of this run is gone", out) from error
    except UserError as error:
        raise error if isinstance(error, Lost) else lost(str(error), out) from error
    finally:
        torch.nn.functional.linear = linear  # ZeRO 3 puts its own in that place, for all that this process does later
        if log:
            log.close()
    engine.destroy()
    return newest_checkpoint(out)


def optimizer_step(
    engine, batches: Iterator[Batch], forwards: int, group: Group, interrupt: Interrupt
) -> dict[str, float]:
    """One optimizer step. Returns the means of the loss and its metrics over all forwards, the gradient's norm, and
    whether any process is to stop, read from the device once, after the step's own check of the gradient."""
    total = None
    for _ in range(forwards):
        loss, metrics = engine(next(batches))
        engine.backward(loss)
        engine.step()
        metrics = {"loss": loss.detach(), **metrics}
        values = torch.stack(list(metrics.values())).float() / forwards
        total = values if total is None else total + values
    # filled on the device: a tensor made from a number would be copied there, and waited for
    norm, stop = (
        total.new_full((1,), float(x)) if not isinstance(x, Tensor) else x.float().view(1).to(total.device)
        for x in (engine.get_global_grad_norm(), interrupt.requested > 0)
    )
    total = torch.cat([total, norm, stop])
    if group.world > 1:
        dist.all_reduce(total)
    return dict(zip([*metrics, "grad_norm", STOP], (total / group.world).tolist(), strict=True))


def peak_flops(group: Group) -> float | None:
    """Operations a second that all processes could do at best, None on a CPU and on a GPU that is not known."""
    gpu = hardware_of(torch.cuda.get_device_name(group.device)) if group.device.type == "cuda" else None
    return gpu.flops * group.world if gpu else None
