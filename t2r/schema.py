"""The schema of a run: what `t2r run`, `finetune`, `validate` and `plan` read, and which values fit together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NoReturn

from t2r.config import find, load
from t2r.data.lookups import MORE
from t2r.errors import UserError

# pretrained weights do not survive much more than this; a typing slip such as 1e3 for 1e-3 is caught by it
LARGEST_LR = 1.0


@dataclass
class ConvertConfig:
    """How the source becomes a GSA model: the options of `t2r convert`. None: the preset exact (of a source that
    has slots already its own), the preset's slots and sinks, the source's dtype.
    layer_slots: slots of single layers, such as "0-3=128,9=256". keep_softmax: layers that stay, such as "0,8-11".
    eviction: which token makes room in a full memory, the oldest or by score; eviction_text: as DataConfig.train, the
    text on which the scores are fitted to what the source reads, half of it with lookups (DataConfig.lookups);
    eviction_reach: far holds what is asked for late longer, near what the next words need. SmolLM2-135M with 64 slots
    after 31M tokens: perplexity 24.59 and 24.48, a code 256 tokens later 46 and 36 %, 512 30 and 15 %.
    verify: prove the result before training it.
    """

    preset: Literal["exact", "paper"] | None = None
    slots: int | None = None
    sinks: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    eviction: Literal["oldest", "score"] = "oldest"
    eviction_text: list[str] = field(default_factory=lambda: ["shipped:train"])
    eviction_reach: Literal["near", "far"] = "far"
    layer_slots: str = ""
    keep_softmax: str = ""
    verify: bool = True

    @property
    def chosen_preset(self) -> str:
        """The preset of a source that has no slots yet."""
        return self.preset or "exact"

    @property
    def label(self) -> str:
        """What an untrained conversion is called in a comparison."""
        return "-".join([self.chosen_preset, *([str(self.slots)] if self.slots else []), "start"])


@dataclass
class LearningRates:
    """Peak learning rate of each group of parameters; 0 freezes the group.

    gates: what GSA adds to decide on writing (f_proj, write, keep). What scores tokens for eviction stays as it was
        fitted: a choice has no gradient, and what stood in for one did harm (docs/LOG.md).
    mixer: the q, k, v, o projections and g_norm. body: everything else (embeddings, MLPs, norms, head).
    named: rates for names of tensors, which may be patterns (model.layers.0.*, *norm.weight); the first that fits
        goes before the groups.
    """

    gates: float = 0.0
    mixer: float = 0.0
    body: float = 0.0
    named: dict[str, float] = field(default_factory=dict)


@dataclass
class LoRAConfig:
    """Low-rank adapters in place of training whole matrices. rank: of each. alpha: their sum is scaled by alpha / rank.
    targets: linear layers that get one. Checkpoints hold the sum of weight and adapter.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])


@dataclass
class LossConfig:
    """align: what a mixer's output is judged by, its squared distance or its angle to the teacher's.
    kl: weight of KL(teacher || student) in `distill`, the rest is cross-entropy. temperature: of both in the KL. Of a
        chat both are of what the assistant says: what others say is read, not imitated. align is of every token.
    answers: from what `distill` learns the answers of lookups that a row has told (DataConfig.lookups): the text, by
        cross-entropy, or the teacher, as all else, who knows some of them.
    chunk: tokens whose logits exist at once, the memory knob of `distill` and `lm`; it changes no result. On a GPU four
        times as many in bfloat16, twice in float32, which takes no more memory: the kernel there makes no copies.
    backend: our own loss, or liger-kernel's, which needs a GPU and that package.
    """

    align: Literal["mse", "cosine"] = "mse"
    kl: float = 1.0
    temperature: float = 1.0
    answers: Literal["text", "teacher"] = "text"
    chunk: int = 1024
    backend: Literal["own", "liger"] = "own"


@dataclass
class StageConfig:
    """One stage of training.

    kind: align (each mixer imitates the teacher's on the teacher's own inputs), distill (the logits imitate the
        teacher's), lm (the next token).
    tokens: to train on. context: tokens of a row. batch_tokens: of one optimizer step, over all processes.
    micro_batch: rows of one forward of one process; the rest of a batch is accumulated.
    schedule: of the learning rates, after a linear warm-up of warmup_tokens, down to end_lr times the peak; wsd stays
        at the peak and falls over the last decay_tokens.
    lora: train adapters of the mixer and body, not these themselves; gates are trained whole.
    weight_decay: of matrices, never of gates, norms and biases. clip: largest gradient norm.
    dtype: of the computation; the weights that are trained are float32 in any case. auto: bfloat16 on a GPU.
    activation_checkpointing: recompute each layer in the backward pass, for less memory.
    compile: the layers by torch.compile: faster steps after a minute at the start; whole models only.
    validation_tokens: held-out tokens to look at the model with, before the stage, every validate_every optimizer steps
        (0: never) and after it: its loss, perplexity by position beside the teacher's, half-lives and use of slots.
    save_every: optimizer steps between checkpoints, 0: only at the end. keep: how many checkpoints stay.
    give_up: end the run after so many steps in a row whose loss or gradient is not finite; each is skipped.
    """

    kind: Literal["align", "distill", "lm"]
    tokens: int
    context: int = 1024
    batch_tokens: int = 32768
    micro_batch: int = 1
    lr: LearningRates = field(default_factory=LearningRates)
    lora: LoRAConfig | None = None
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_tokens: int = 0
    decay_tokens: int = 0
    end_lr: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    loss: LossConfig = field(default_factory=LossConfig)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    validation_tokens: int = 0
    validate_every: int = 0
    save_every: int = 0
    keep: int = 1
    give_up: int = 5

    @property
    def rows(self) -> int:
        """Rows of one optimizer step, over all processes."""
        return self.batch_tokens // self.context

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.batch_tokens)


@dataclass
class PartConfig:
    """One part of a mixture. data: as DataConfig.train. weight: its share of the rows, beside those of the other parts.
    field: the key of its documents, None: data.field."""

    data: list[str]
    weight: float = 1.0
    field: str | None = None


@dataclass
class DataConfig:
    """train, validation: files (.jsonl, .jsonl.gz, .jsonl.zst, .txt, .parquet, patterns such as train-*.jsonl.zst),
    `shipped:NAME` for text that comes with t2r, or hub data sets (org/name or org/name:subset).
    mix: in place of train, several such lists, each with its weight.
    held_out: in place of validation, this share of the training documents, chosen by their hash; of a .txt file, which
        is one document, its end.
    lookups: this share of the rows is of the same text with facts put into it that it asks for again further on
        (t2r/data/lookups.py): plain text seldom needs one word from far away, so nothing learns to keep it.
    field: the key of a document's text, or of a chat's messages: these go through the source's chat template, and only
        what the assistant says is learned.
    boundaries: documents that share a row do not see each other; false: rows are cut from one long text.
    stream: tokenise while training, in a process beside it; else before, or by `t2r prepare`.
    cache: folder for the tokens, read in place of the text from then on.
    """

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    mix: list[PartConfig] = field(default_factory=list)
    held_out: float = 0.0
    lookups: float = 0.0
    boundaries: bool = True
    stream: bool = False
    field: str = "text"
    cache: str = "~/.cache/t2r/tokens"

    @property
    def has_lookups(self) -> bool:
        specs = [*self.train, *(spec for part in self.mix for spec in part.data)]
        return self.lookups > 0 or any(spec.startswith(tuple(MORE)) for spec in specs)


@dataclass
class DeepSpeedConfig:
    """zero: what is split over the processes: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights.
    offload: what lies in the CPU's memory: the optimizer's state, or with zero 3 all, the weights too.
    teacher: whole on every process, sharded over them, or on the CPU, from where layers are fetched as they are needed.
    json: a DeepSpeed configuration of your own in place of zero and offload; batch sizes, clipping, optimizer,
        schedule and dtype in it must be absent or "auto": they are the stages'.
    """

    zero: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer", "all"] = "none"
    teacher: Literal["whole", "sharded", "cpu"] = "whole"
    json: str | None = None


@dataclass
class LogConfig:
    """trackers: services that get the metrics too; metrics.jsonl has them in any case. project: its name there."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    project: str = "t2r"


@dataclass
class CompareConfig:
    """The comparison that ends a run. recipe: its name or file. limit: items of each task, None: the recipe's.
    data: folder of benchmark files, which `eval:` in the recipe means.
    beside: other untrained conversions of the source to put beside the trained one.
    notes: sentences for the report.
    """

    recipe: str = "quick"
    limit: int | None = None
    data: str | None = None
    beside: list[ConvertConfig] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class RunConfig:
    """`t2r run`: source -> conversion -> stages -> comparison. `t2r finetune` reads the same file, for its stages.

    source: what to convert: hub id, folder, GGUF file, package:NAME. It is also the teacher.
    compare: None: no comparison. seed: of the order of the data.
    device: auto takes a GPU if there is one.
    variants: named lists of `key=value` words. `gpu` is applied on a GPU, `tiny` when the environment has DEMO_TINY=1;
        words of the command line come after them.
    """

    source: str
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    stages: list[StageConfig] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    log: LogConfig = field(default_factory=LogConfig)
    compare: CompareConfig | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    variants: dict[str, list[str]] = field(default_factory=dict)


def load_run(name_or_path: str | Path, overrides: Sequence[str] = (), variant: str | None = None) -> RunConfig:
    """`load` a RunConfig with the words of a `variant` of its own before the overrides, and `check` it."""
    path, words = find(name_or_path, ["configs"]), []
    if variant:
        words = load(path, RunConfig).variants.get(variant, [])
    config = load(path, RunConfig, [*words, *overrides])
    check(config, where=path)
    return config


def check(config: RunConfig, where: object = None) -> None:
    """Raise UserError for values that cannot be right, alone or together."""

    def wrong(key: str, what: str, valid: object = None):
        raise UserError(f"{key} {what}", where=where, nearest=valid)

    for i, stage in enumerate(config.stages):
        check_stage(stage, config, f"stages.{i}", wrong)
    check_data(config, wrong)
    check_deepspeed(config.deepspeed, wrong)
    if config.compare:
        check_compare(config.compare, config.convert, wrong)


def check_stage(stage: StageConfig, config: RunConfig, key: str, wrong: Callable[..., NoReturn]) -> None:
    for name in ("tokens", "context", "micro_batch", "batch_tokens", "clip", "keep", "give_up"):
        if getattr(stage, name) <= 0:
            wrong(f"{key}.{name}", f"is {getattr(stage, name)}, it must be positive")
    counts = ("warmup_tokens", "decay_tokens", "validation_tokens", "validate_every", "save_every")
    for name in (*counts, "weight_decay", "end_lr"):
        if getattr(stage, name) < 0:
            wrong(f"{key}.{name}", f"is {getattr(stage, name)}, it cannot be negative", 0)
    if stage.context < 2:
        wrong(f"{key}.context", "is 1: a token needs a next one to predict", 2)
    row = stage.micro_batch * stage.context
    if stage.batch_tokens % row:
        what = f"is {stage.batch_tokens}, no multiple of micro_batch x context = {row}"
        wrong(f"{key}.batch_tokens", what, max(1, round(stage.batch_tokens / row)) * row)
    if stage.warmup_tokens > stage.tokens:
        wrong(f"{key}.warmup_tokens", f"is {stage.warmup_tokens}, more than the stage's {stage.tokens}", 0)
    if (stage.schedule == "wsd") != (stage.decay_tokens > 0):
        what = f"is {stage.decay_tokens} with schedule {stage.schedule}: wsd, and only wsd, has a decay of its own"
        wrong(f"{key}.decay_tokens", what, stage.tokens // 10 if stage.schedule == "wsd" else 0)
    if stage.warmup_tokens + stage.decay_tokens > stage.tokens:
        what = f"is {stage.decay_tokens}, more than the warm-up leaves of {stage.tokens}"
        wrong(f"{key}.decay_tokens", what, stage.tokens - stage.warmup_tokens)
    check_rates(stage, key, wrong)
    if stage.compile and (config.deepspeed.zero == 3 or config.deepspeed.teacher != "whole"):
        wrong(f"{key}.compile", "needs whole layers, but deepspeed.zero 3 or deepspeed.teacher spreads them", False)
    if stage.end_lr > 1:
        wrong(f"{key}.end_lr", f"is {stage.end_lr}, a fraction of the peak", 0.1)
    if not 0 <= stage.loss.kl <= 1:
        wrong(f"{key}.loss.kl", f"is {stage.loss.kl}, a weight between 0 (cross-entropy) and 1", 1)
    if stage.loss.temperature <= 0 or stage.loss.chunk < 1:
        wrong(f"{key}.loss", "needs a positive temperature and chunk")
    if stage.validate_every and not stage.validation_tokens:
        wrong(f"{key}.validate_every", f"is {stage.validate_every}, but there are no validation_tokens", 0)
    if stage.validation_tokens and not config.data.validation and not config.data.held_out:
        wrong(f"{key}.validation_tokens", "needs data.validation or data.held_out")
    if 0 < stage.validation_tokens < stage.context:
        wrong(f"{key}.validation_tokens", f"is less than a row of {stage.context}", stage.context)


def check_rates(stage: StageConfig, key: str, wrong: Callable[..., NoReturn]) -> None:
    rates = {name: getattr(stage.lr, name) for name in ("gates", "mixer", "body")}
    for name, rate in [*rates.items(), *((f"named.{name}", rate) for name, rate in stage.lr.named.items())]:
        if not 0 <= rate <= LARGEST_LR:
            wrong(f"{key}.lr.{name}", f"is {rate}", f"0 to {LARGEST_LR:g}")
    if stage.kind == "align" and stage.lr.body:
        wrong(f"{key}.lr.body", f"is {stage.lr.body}, but align trains mixers and gates only", 0)
    if not any([*rates.values(), *stage.lr.named.values()]):
        wrong(f"{key}.lr", "is 0 for every group: nothing would be trained")
    if stage.lora:
        if stage.lora.rank < 1 or stage.lora.alpha <= 0:
            wrong(f"{key}.lora", "needs a positive rank and alpha")
        if not stage.lora.targets:
            wrong(f"{key}.lora.targets", "is empty: no layer would get an adapter", "null in place of lora")
        if not (stage.lr.mixer or stage.lr.body):
            wrong(f"{key}.lora", "has lr.mixer and lr.body 0: no adapter would be trained", "lora: null")


def check_data(config: RunConfig, wrong: Callable[..., NoReturn]) -> None:
    data = config.data
    if config.stages and not data.train and not data.mix:
        wrong("data.train", "is empty, but there are stages to train")
    if data.train and data.mix:
        wrong("data.mix", "takes the place of data.train, which is given too", "train: []")
    for i, part in enumerate(data.mix):
        if part.weight <= 0:
            wrong(f"data.mix.{i}.weight", f"is {part.weight}, it must be positive", 1.0)
        if not part.data:
            wrong(f"data.mix.{i}.data", "is empty")
    if not 0 <= data.lookups < 1:
        wrong("data.lookups", f"is {data.lookups}, a share of the rows", 0.15)
    if not 0 <= data.held_out < 1:
        wrong("data.held_out", f"is {data.held_out}, a share of the documents", 0.001)
    if data.validation and data.held_out:
        wrong("data.held_out", "takes the place of data.validation, which is given too", 0)


def check_compare(compare: CompareConfig, convert: ConvertConfig, wrong: Callable[..., NoReturn]) -> None:
    if compare.limit is not None and compare.limit < 1:
        wrong("compare.limit", f"is {compare.limit}, it must be positive")
    labels = [f"{convert.chosen_preset}-start"]
    for i, other in enumerate(compare.beside):
        if other.label in labels:
            wrong(f"compare.beside.{i}", f"is called {other.label} like another start: give it other slots")
        labels.append(other.label)


def check_deepspeed(config: DeepSpeedConfig, wrong: Callable[..., NoReturn]) -> None:
    default = DeepSpeedConfig()
    if config.json is not None and (config.zero, config.offload) != (default.zero, default.offload):
        wrong("deepspeed.json", "replaces zero and offload: set these in the json")
    if config.offload != "none" and not config.zero:
        wrong("deepspeed.offload", f"is {config.offload}, but zero is 0, which splits nothing off", "none")
    if config.offload == "all" and config.zero != 3:
        wrong("deepspeed.offload", f"is all, but zero is {config.zero}: only zero 3 can move weights", "optimizer")


def with_device(config: RunConfig) -> RunConfig:
    """The config with device cpu or cuda in place of auto. Raises UserError for a GPU that is not there."""
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch sees no GPU", nearest="device=cpu", next="t2r env")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return replace(config, device=auto if config.device == "auto" else config.device)
