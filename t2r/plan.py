"""`t2r plan`: what a configuration would cost on given hardware, from its source's config alone: no weights, no GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from t2r.errors import UserError, nearest
from t2r.schema import RunConfig, StageConfig, load_run

ROOM = 0.95  # of a GPU's memory: the rest goes to CUDA itself and to fragments


@dataclass
class StagePlan:
    """One stage. trained: parameters in training. memory: bytes of a GPU by what they hold. hours: of all its steps."""

    stage: StageConfig
    trained: int
    memory: dict[str, float]
    step_seconds: float
    tokens_per_second: float
    hours: float


@dataclass
class PlanReport:
    """What `t2r plan` prints. passed: every stage fits."""

    config: str
    gpu: str
    gpus: int
    gpu_memory: float
    mfu: float
    parameters: int
    new: int
    stages: list[StagePlan] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(self.fits(plan) for plan in self.stages)

    def fits(self, plan: StagePlan) -> bool:
        return sum(plan.memory.values()) < ROOM * self.gpu_memory

    def __str__(self) -> str:
        lines = [
            f"{self.config}: {self.parameters:,} parameters, {self.new:,} of them new",
            f"{self.gpus} x {self.gpu} of {self.gpu_memory / 1e9:.0f} GB, taken to reach {self.mfu:.0%} of peak",
        ]
        for i, plan in enumerate(self.stages):
            stage = plan.stage
            used = sum(plan.memory.values())
            parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in plan.memory.items() if size >= 5e7)
            lines += [
                f"stage {i} {stage.kind}: {stage.tokens:,} tokens in {stage.steps:,} steps, {plan.trained:,} trained",
                f"  memory  {used / 1e9:.1f} GB a GPU ({parts}){'' if self.fits(plan) else ': DOES NOT FIT'}",
                f"  step    {span(plan.step_seconds)}, {plan.tokens_per_second:,.0f} tokens/s",
                f"  time    {self.time(plan.hours)}",
            ]
            if not self.fits(plan):
                lines.append(f"  try     {self.advice(i, plan)}")
        lines.append(f"together {self.time(sum(plan.hours for plan in self.stages))}; memory and time are estimates")
        return "\n".join(lines)

    def time(self, hours: float) -> str:
        return f"{span(3600 * hours)}, {span(3600 * hours * self.gpus)} of GPU time"

    def advice(self, i: int, plan: StagePlan) -> str:
        """The option that would save most of what is largest."""
        largest = max(plan.memory, key=plan.memory.get)
        if largest in ("activations", "logits"):
            if not plan.stage.activation_checkpointing:
                return f"stages.{i}.activation_checkpointing=true"
            return f"stages.{i}.micro_batch={max(1, plan.stage.micro_batch // 2)}"
        if largest == "teacher":
            return "deepspeed.teacher=sharded" if self.gpus > 1 else "deepspeed.teacher=cpu"
        return "deepspeed.zero=3" if self.gpus > 1 else "deepspeed.offload=optimizer"


def span(seconds: float) -> str:
    """In the largest unit that it has one of, to three digits: 38.7 ms, 7 s, 2.5 min, 1,497 h."""
    size, unit = next((pair for pair in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= pair[0]), (1e-3, "ms"))
    value = seconds / size
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def plan(config: str, overrides: Sequence[str] = (), gpu: str = "h100", gpus: int = 1, mfu: float = 0.3) -> PlanReport:
    """Memory, time and GPU hours of each stage of `config` on `gpus` GPUs of a kind. mfu: the share of their peak that
    all but the recurrence is assumed to reach: SmolLM2-135M has 0.31 to 0.33 on an H200. Raises UserError."""
    from t2r.train.cost import HARDWARE

    if gpu not in HARDWARE:
        raise UserError(f"unknown GPU {gpu!r}", nearest=nearest(gpu, HARDWARE) or ", ".join(HARDWARE))
    if gpus < 1 or not 0 < mfu <= 1:
        raise UserError(f"--gpus {gpus} and --mfu {mfu} must be positive, mfu at most 1", nearest="--gpus 1 --mfu 0.3")
    settings = replace(load_run(config, overrides), device="cuda")
    if not settings.stages:
        raise UserError("there are no stages to plan", where=config)
    parameters, new = count(settings)
    report = PlanReport(Path(config).stem, gpu, gpus, HARDWARE[gpu].memory, mfu, parameters, new)
    for i, stage in enumerate(settings.stages):
        report.stages.append(plan_stage(settings, stage, i, gpus, HARDWARE[gpu].flops, mfu))
    return report


def plan_stage(settings: RunConfig, stage: StageConfig, i: int, gpus: int, peak: float, mfu: float) -> StagePlan:
    from t2r.train.cost import training_flops, training_memory
    from t2r.train.finetune import check_split
    from t2r.train.parameters import add_adapters, parameter_groups
    from t2r.train.sharding import compute_dtype, engine_config, zero_stage

    check_split(stage, gpus, i)
    student = empty_student(settings)
    if stage.lora:
        add_adapters(student, stage.lora)
    trained = sum(p.numel() for group in parameter_groups(student, stage) for p in group["params"])
    dtype, zero = compute_dtype(stage, "cuda"), zero_stage(settings.deepspeed)
    engine_config(settings.deepspeed, stage, dtype, gpus, trained)
    memory = training_memory(student, trained, stage, settings.deepspeed, zero, gpus, dtype.itemsize)
    tokens_per_second = gpus / training_flops(student, stage).seconds(peak, mfu, stage.activation_checkpointing)
    seconds = stage.batch_tokens / tokens_per_second
    return StagePlan(stage, trained, memory._asdict(), seconds, tokens_per_second, stage.steps * seconds / 3600)


def empty_student(settings: RunConfig):
    """The converted model without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from t2r.convert.plan import converted_config

    options = settings.convert
    config = converted_config(
        source_config(settings.source), settings.source, options.chosen_preset, options.slots, options.sinks,
        options.eviction, options.layer_slots, options.keep_softmax,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def count(settings: RunConfig) -> tuple[int, int]:
    """(parameters of the converted model, those that its source does not have)."""
    from t2r.modeling.attention import GSAttention

    student = empty_student(settings)
    mixers = [m for m in student.modules() if isinstance(m, GSAttention)]
    new = sum(m.get_parameter(name).numel() for m in mixers for name in m.new_names())
    return sum(p.numel() for p in student.parameters()), new


@cache
def source_config(spec: str):
    """The config of a source: of a folder even without weights, of a hub model without fetching them."""
    from transformers import AutoConfig

    from t2r.convert.locate import HUB_ID
    from t2r.convert.source import first_line, load_config, open_source

    folder = Path(spec).expanduser()
    if (folder / "config.json").exists():
        return load_config(folder)
    if folder.exists() or not HUB_ID.fullmatch(spec):
        return open_source(spec).config
    try:
        return AutoConfig.from_pretrained(spec)
    except (OSError, ValueError) as error:
        what = f"no folder {spec!r} here, and the hub did not deliver its config: {first_line(error)}"
        raise UserError(what, nearest="source=FOLDER, with a config.json in it") from error
