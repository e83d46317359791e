"""The loop: one stage on the DeepSpeed engine, from a converted folder to a trained one, resumable at its checkpoints.

A checkpoint is a Hugging Face folder like the one that training began with, beside it the engine's own state. Which
tokens a step sees and which learning rate it takes are functions of the step, so a resumed run goes on as if nothing
had happened.
"""

import atexit
import io
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from t2r.convert.source import Source, open_source
from t2r.convert.writer import FolderWriter
from t2r.data.packing import Batch, Rows, ahead
from t2r.errors import UserError
from t2r.modeling.attention import GSAttention
from t2r.schema import RunConfig, StageConfig
from t2r.train.stages import STAGES, Stage, learning_rate, parameter_groups

GIVE_UP = 5  # steps in a row whose loss or gradient is not finite
STATE = "deepspeed"  # folder of the engine's state inside a checkpoint
BIASES = ("write", "keep")


def require_deepspeed(device: str):
    """DeepSpeed, told about the device before it looks for one itself. Raises UserError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError("training needs DeepSpeed", next="DS_BUILD_OPS=0 pip install deepspeed") from error
    if device == "cpu":
        # a shared memory all-reduce that would be compiled here and now; gloo has its own
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


def join_group(device: str) -> tuple[int, int, torch.device]:
    """(rank, world, device) of this process, in the group that a launcher describes, or alone."""
    deepspeed = require_deepspeed(device)
    place = torch.device("cpu")
    if device == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    backend = "nccl" if device == "cuda" else "gloo"
    if "RANK" not in os.environ and not dist.is_initialized():
        os.environ["LOCAL_RANK"] = "0"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return dist.get_rank(), dist.get_world_size(), place


class Offset(nn.Module):
    """A parameter trained as its distance from where it started: bfloat16 has no room for 1 - 1e-3, but for 1e-3."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.detach().clone(), persistent=False)

    def forward(self, offset: Tensor) -> Tensor:
        return self.start + offset.to(self.start.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value - self.start


def recompute_layers(student) -> None:
    """Activation checkpointing, whatever this transformers calls it."""
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def train_offsets(student: nn.Module) -> None:
    """Make the clock's biases Offsets."""
    for module in student.modules():
        if isinstance(module, GSAttention) and module.gsa.ring:
            for name in BIASES:
                parametrize.register_parametrization(module, name, Offset(getattr(module, name)))


class Step(nn.Module):
    """What the engine runs: a stage's loss. Only the student is part of it, so that only it is sharded and saved."""

    def __init__(self, stage: Stage, student: nn.Module, teacher: nn.Module | None) -> None:
        super().__init__()
        self.student = student
        self.stage, self.teacher = stage, [teacher]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.stage.loss(self.student, self.teacher[0], batch)


class ClippingAdamW(torch.optim.AdamW):
    """AdamW that clips, and skips a step whose gradient is not finite: for ZeRO 0; the others do so themselves."""

    def __init__(self, groups: list[dict], clip: float, **settings) -> None:
        super().__init__(groups, **settings)
        self.clip, self.overflow, self._global_grad_norm = clip, False, None

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._global_grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        self.overflow = not torch.isfinite(self._global_grad_norm).item()
        return None if self.overflow else super().step(closure)


def make_optimizer(groups: list[dict], stage: StageConfig, zero: int, device: torch.device) -> torch.optim.Optimizer:
    settings = {"betas": (0.9, 0.95), "fused": device.type == "cuda"}
    return torch.optim.AdamW(groups, **settings) if zero else ClippingAdamW(groups, stage.clip, **settings)


def engine_config(stage: StageConfig, zero: int, dtype: torch.dtype, world: int) -> dict:
    """DeepSpeed's configuration. Gradients are summed in float32, the weights that are updated are float32."""
    config = {
        "train_micro_batch_size_per_gpu": stage.micro_batch,
        "gradient_accumulation_steps": stage.rows // (stage.micro_batch * world),
        "gradient_clipping": stage.clip if zero else 0.0,
        "zero_optimization": {"stage": zero},
        "steps_per_print": None,
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def compute_dtype(stage: StageConfig, device: str) -> torch.dtype:
    auto = "bfloat16" if device == "cuda" else "float32"
    return getattr(torch, auto if stage.dtype == "auto" else stage.dtype)


def train(
    config: RunConfig,
    stage: StageConfig,
    student_folder: Path,
    teacher: nn.Module | None,
    rows: Rows,
    validation: Rows | None,
    out: Path,
    rank: int,
    world: int,
    device: torch.device,
) -> Path:
    """Train the converted model in `student_folder` through one stage and return the folder of the result.

    out: holds metrics.jsonl and checkpoints; where there is a checkpoint already, training goes on from the newest.
    teacher: a causal LM on `device` in the stage's dtype, or None if the stage needs none.
    Raises UserError when the loss stays non-finite, or a checkpoint belongs to another model.
    """
    from transformers import AutoModelForCausalLM

    newest = newest_checkpoint(out)
    if newest and step_of(newest) >= stage.steps:
        return newest
    if rank == 0:
        for unfinished in out.glob(".step-*"):  # what a killed run was writing
            shutil.rmtree(unfinished)
    source = open_source(student_folder)
    dtype = compute_dtype(stage, device.type)
    student = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32, local_files_only=True).train()
    if stage.activation_checkpointing:
        recompute_layers(student)
    train_offsets(student)
    groups = parameter_groups(student, stage)
    zero = config.deepspeed.zero
    with redirect_stdout(io.StringIO()):  # bfloat16 optimizers print their memory use, group by group
        engine, *_ = require_deepspeed(device.type).initialize(
            model=Step(STAGES[stage.kind](stage), student, teacher),
            optimizer=make_optimizer(groups, stage, zero, device),
            config=engine_config(stage, zero, dtype, world),
        )
    start = resume(engine, newest, source) if newest else 0
    log = Log(out, stage, start) if rank == 0 else None
    if not start:
        evaluate(engine, validation, stage, device, log, 0)
    batches = ahead(
        chain.from_iterable(
            rows.step(step, stage.rows, stage.micro_batch, rank, world) for step in range(start, stage.steps)
        ),
        device,
    )
    failures = 0
    for step in range(start, stage.steps):
        rates = set_learning_rates(engine, stage, step)
        metrics = optimizer_step(engine, batches, stage.rows // (stage.micro_batch * world), world)
        skipped = bool(engine.optimizer.overflow)
        failures = failures + 1 if skipped else 0
        if log:
            log.step(step + 1, metrics, rates, float(engine.get_global_grad_norm()), skipped)
        if failures == GIVE_UP:
            raise UserError(
                f"loss or gradient not finite in {GIVE_UP} steps in a row, the last is step {step + 1}",
                where=out,
                nearest="smaller learning rates, or dtype: float32",
            )
        last = step + 1 == stage.steps
        if last:
            evaluate(engine, validation, stage, device, log, step + 1)
        if last or (stage.save_every and (step + 1) % stage.save_every == 0):
            save(engine, source, out, step + 1, stage.keep, rank)
            if log:
                log.time = time.perf_counter()
    if log:
        log.close()
    engine.destroy()
    return newest_checkpoint(out)


def set_learning_rates(engine, stage: StageConfig, step: int) -> dict[str, float]:
    """Give each optimizer group its rate; returned by name."""
    fraction = learning_rate(stage, step)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak"] * fraction
    return {group["name"]: group["lr"] for group in engine.optimizer.param_groups}


def optimizer_step(engine, batches: Iterator[Batch], forwards: int, world: int) -> dict[str, float]:
    """One optimizer step. Returns the means of the loss and its metrics over all forwards, read from the device once,
    after the step's own check of the gradient."""
    total = None
    for _ in range(forwards):
        loss, metrics = engine(next(batches))
        engine.backward(loss)
        engine.step()
        metrics = {"loss": loss.detach(), **metrics}
        values = torch.stack(list(metrics.values())).float() / forwards
        total = values if total is None else total + values
    if world > 1:
        dist.all_reduce(total)
    return dict(zip(metrics, (total / world).tolist(), strict=True))


@torch.no_grad()
def evaluate(engine, rows: Rows | None, stage: StageConfig, device: torch.device, log: "Log | None", step: int) -> None:
    """The stage's loss on held out rows, the same on every process."""
    count = stage.validation_tokens // stage.context
    if rows is None or not count:
        return
    engine.eval()
    losses = [engine(batch.to(device))[0] for batch in rows.first(count, stage.micro_batch)]
    engine.train()
    if log:
        log.validation(step, torch.stack(losses).mean().item())


def resume(engine, checkpoint: Path, source: Source) -> int:
    """Load the engine's state and return the step it stands at. UserError if the checkpoint is of another model."""
    theirs = open_source(checkpoint)
    shapes = [{name: s.shape(name) for name in s.names()} for s in (source, theirs)]
    if shapes[0] != shapes[1]:
        raise UserError("the checkpoint is of another model", where=checkpoint, next=f"rm -r {checkpoint.parent}")
    loaded, _ = engine.load_checkpoint(str(checkpoint), tag=STATE)
    if loaded is None:
        raise UserError("the checkpoint has no state to go on from", where=checkpoint)
    return step_of(checkpoint)


def save(engine, source: Source, out: Path, step: int, keep: int, rank: int) -> None:
    """Write out/step-N: a Hugging Face folder with the engine's state inside. It appears complete or not at all."""
    aside = out / f".step-{step:06d}.{STATE}"
    engine.save_checkpoint(str(aside), tag=STATE, save_latest=False)
    target = out / f"step-{step:06d}"
    trained = trained_tensors(engine)
    if rank == 0:
        plan = {name: (source.shape(name), source.dtype(name)) for name in source.names()}
        with FolderWriter(target, plan) as writer:
            for name in source.names():
                tensor = trained[name] if name in trained else source.tensor(name)
                writer.add(name, tensor.to(source.dtype(name)))
            copy_rest(source.path, writer.path)
            os.rename(aside / STATE, writer.path / STATE)
        shutil.rmtree(aside, ignore_errors=True)
        for old in sorted(out.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    if dist.get_world_size() > 1:
        dist.barrier()


def trained_tensors(engine) -> dict[str, Tensor]:
    """Name in the checkpoint folder -> float32 weight, on the CPU, of every parameter that is trained."""
    from deepspeed.utils import safe_get_full_fp32_param

    modules, tensors = dict(engine.module.student.named_modules()), {}
    for name, parameter in engine.module.student.named_parameters():
        if not parameter.requires_grad:
            continue
        full = safe_get_full_fp32_param(parameter)
        full = (parameter if full is None else full).detach().float().view(parameter_shape(parameter)).cpu()
        if ".parametrizations." in name:
            owner, _, bias = name.removesuffix(".original").partition(".parametrizations.")
            full = full + modules[owner].parametrizations[bias][0].start.cpu()
            name = f"{owner}.{bias}"
        tensors[name] = full
    return tensors


def parameter_shape(parameter: Tensor) -> torch.Size:
    """Its full shape, also where ZeRO 3 keeps a part of it only."""
    return getattr(parameter, "ds_shape", parameter.shape)


def copy_rest(folder: Path, to: Path) -> None:
    """What a model folder holds beside its weights: config, tokenizer, generation config, reports."""
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith(("model.safetensors", "model-", "pytorch_model")):
            shutil.copyfile(path, to / path.name)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest_checkpoint(out: Path) -> Path | None:
    return max(out.glob("step-*"), key=step_of, default=None)


class Log:
    """metrics.jsonl, one line an optimizer step, with a progress bar on a terminal and plain lines elsewhere."""

    def __init__(self, out: Path, stage: StageConfig, start: int) -> None:
        from tqdm import tqdm

        out.mkdir(parents=True, exist_ok=True)
        self.stage = stage
        path = out / "metrics.jsonl"
        # an interrupted run may have logged steps that its last checkpoint does not know
        known = path.read_text().splitlines() if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in known if start and json.loads(line)["step"] <= start))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115
        self.bar = tqdm(total=stage.steps, initial=start, desc=stage.kind, unit="step", disable=not sys.stderr.isatty())
        self.every = max(1, stage.steps // 20)
        self.time = time.perf_counter()

    def step(self, step: int, metrics: dict[str, float], rates: dict[str, float], norm: float, skipped: bool) -> None:
        now = time.perf_counter()
        speed, self.time = self.stage.batch_tokens / (now - self.time), now
        record = {
            "step": step,
            "tokens": step * self.stage.batch_tokens,
            **metrics,
            "lr": rates,
            "grad_norm": norm,
            "tokens_per_second": speed,
            "memory_bytes": memory(),
        }
        if skipped:
            record["skipped"] = True
        self.write(record)
        line = f"loss {metrics['loss']:.4f}, {speed:.0f} tokens/s"
        self.bar.set_postfix_str(line)
        self.bar.update()
        if skipped or (self.bar.disable and (step % self.every == 0 or step == self.stage.steps)):
            note = ": not finite, step skipped" if skipped else ""
            self.bar.write(f"{self.stage.kind} step {step}/{self.stage.steps}: {line}{note}", file=sys.stderr)

    def validation(self, step: int, loss: float) -> None:
        self.write({"step": step, "validation_loss": loss})
        self.bar.write(f"{self.stage.kind} step {step}/{self.stage.steps}: validation loss {loss:.4f}", file=sys.stderr)
        self.time = time.perf_counter()

    def write(self, record: dict) -> None:
        self.file.write(json.dumps(finite(record)) + "\n")

    def close(self) -> None:
        self.bar.close()
        self.file.close()


def finite(value: object) -> object:
    """The same without NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def memory() -> int:
    """Most bytes in use so far: of the GPU, or of this process where there is none."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
