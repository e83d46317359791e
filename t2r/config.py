"""Configurations: typed dataclasses, filled from a YAML file and `key=value` words, where every mistake is named.

`load` knows no particular schema: the run of this file and the recipes of a comparison are both read by it.
"""

import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Literal, TypeVar

from t2r.errors import UserError, nearest

Schema = TypeVar("Schema")
FOLDERS = ("configs", "recipes")
# pretrained weights do not survive much more than this; a typing slip such as 1e3 for 1e-3 is caught by it
LARGEST_LR = 1.0


@dataclass
class ConvertConfig:
    """How the source becomes a GSA model: the options of `t2r convert`. None: the preset's, or the source's dtype.
    verify: prove the result before training it.
    """

    preset: Literal["exact", "paper"] = "exact"
    slots: int | None = None
    sinks: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    verify: bool = True


@dataclass
class LearningRates:
    """Peak learning rate of each group of parameters; 0 freezes the group.

    gates: what GSA adds to decide on writing (f_proj, write, keep). mixer: the q, k, v, o projections and g_norm.
    body: everything else (embeddings, MLPs, norms, head).
    """

    gates: float = 0.0
    mixer: float = 0.0
    body: float = 0.0


@dataclass
class LossConfig:
    """kl: weight of KL(teacher || student) in `distill`, the rest is cross-entropy. temperature: of both in the KL.
    chunk: tokens whose logits exist at once, the memory knob of `distill` and `lm`; it changes no result.
    """

    kl: float = 1.0
    temperature: float = 1.0
    chunk: int = 1024


@dataclass
class StageConfig:
    """One stage of training.

    kind: align (each mixer imitates the teacher's on the teacher's own inputs), distill (the logits imitate the
        teacher's), lm (the next token).
    tokens: to train on. context: tokens of a row. batch_tokens: of one optimizer step, over all processes.
    micro_batch: rows of one forward of one process; the rest of a batch is accumulated.
    schedule: of the learning rates, after a linear warm-up of warmup_tokens, down to end_lr times the peak.
    weight_decay: of matrices, never of gates, norms and biases. clip: largest gradient norm.
    dtype: of the computation; the weights that are trained are float32 in any case. auto: bfloat16 on a GPU.
    activation_checkpointing: recompute each layer in the backward pass, for less memory.
    validation_tokens: held out tokens to evaluate the stage's loss on, before and after it.
    save_every: optimizer steps between checkpoints, 0: only at the end. keep: how many checkpoints stay.
    """

    kind: Literal["align", "distill", "lm"]
    tokens: int
    context: int = 1024
    batch_tokens: int = 32768
    micro_batch: int = 1
    lr: LearningRates = field(default_factory=LearningRates)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_tokens: int = 0
    end_lr: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    loss: LossConfig = field(default_factory=LossConfig)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    activation_checkpointing: bool = False
    validation_tokens: int = 0
    save_every: int = 0
    keep: int = 1

    @property
    def rows(self) -> int:
        """Rows of one optimizer step, over all processes."""
        return self.batch_tokens // self.context

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.batch_tokens)


@dataclass
class DataConfig:
    """train, validation: files (.jsonl, .jsonl.gz, .jsonl.zst, .txt, .parquet, patterns such as train-*.jsonl.zst),
    `shipped:NAME` for text that comes with t2r, or names of hub data sets. field: the key of a document's text.
    cache: folder for the tokens, read in place of the text from then on.
    """

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    field: str = "text"
    cache: str = "~/.cache/t2r/tokens"


@dataclass
class DeepSpeedConfig:
    """zero: what is split over the processes: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights."""

    zero: Literal[0, 1, 2, 3] = 1


@dataclass
class CompareConfig:
    """The comparison that ends a run. recipe: its name or file. limit: items of each task, None: the recipe's.
    data: folder of benchmark files, which `eval:` in the recipe means.
    beside: other untrained conversions of the source to put beside the trained one.
    """

    recipe: str = "quick"
    limit: int | None = None
    data: str | None = None
    beside: list[ConvertConfig] = field(default_factory=list)


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
    compare: CompareConfig | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    variants: dict[str, list[str]] = field(default_factory=dict)


def shipped(kind: str) -> dict[str, str]:
    """Name -> first comment line of every YAML file in the package's folder `kind`: configs or recipes."""
    found = {}
    for file in sorted(files(f"t2r.{kind}").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            first = file.read_text(encoding="utf-8").partition("\n")[0]
            found[file.name.removesuffix(".yaml")] = first.removeprefix("#").strip()
    return found


def find(name_or_path: str | Path) -> Path:
    """The file of a configuration: a path, or the name of a shipped one. Raises UserError with the nearest name."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    names = {name: folder for folder in FOLDERS for name in shipped(folder)}
    if str(name_or_path) in names:
        return Path(str(files(f"t2r.{names[str(name_or_path)]}") / f"{name_or_path}.yaml"))
    raise UserError(
        f"no configuration {str(name_or_path)!r}: neither a file nor the name of a shipped one",
        nearest=nearest(path.stem, names) or ", ".join(names) or None,
        next="t2r ls",
    )


def read(path: Path) -> dict:
    """A YAML file as plain data. Raises UserError unless it holds a mapping."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        raw = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")), resolve=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"not readable as YAML: {error}", where=path) from error
    if not isinstance(raw, dict):
        raise UserError(f"holds {plural(raw)}, not keys and values", where=path)
    return raw


def load(name_or_path: str | Path, schema: type[Schema], overrides: Sequence[str] = ()) -> Schema:
    """An instance of the dataclass `schema`, from a YAML file or the name of a shipped one, and `key=value` words.

    A key of an override is dotted (stages.0.lr.gates=1e-3), its value YAML. Raises UserError for a missing file, an
    unknown key, a wrong type and a required key that is not there, with the full key, the file and the nearest.
    """
    path = find(name_or_path)
    raw = read(path)
    override(raw, overrides)
    return build(schema, raw, path)


def load_run(name_or_path: str | Path, overrides: Sequence[str] = (), variant: str | None = None) -> RunConfig:
    """`load` a RunConfig with the words of a `variant` of its own before the overrides, and `check` it."""
    words = []
    if variant:
        words = load(name_or_path, RunConfig).variants.get(variant, [])
    config = load(name_or_path, RunConfig, [*words, *overrides])
    check(config, where=find(name_or_path))
    return config


def override(raw: dict, words: Iterable[str]) -> None:
    """Set dotted keys of plain data in place. Keys are checked later, with those of the file."""
    import yaml
    from omegaconf import OmegaConf

    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"{word!r} is not of the form key=value", nearest="stages.0.tokens=100000")
        try:
            # through OmegaConf, whose YAML reads 1e-3 as a number
            value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"the value of {word!r} is not readable as YAML", where="command line") from error
        *parents, last = key.split(".")
        place = raw
        for part in parents:
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
            place = place[part] if isinstance(place, dict) else place[index(place, part, key)]
        if isinstance(place, dict):
            place[last] = value
        else:
            place[index(place, last, key)] = value


def index(place: object, part: str, key: str) -> int:
    if not isinstance(place, list):
        raise UserError(f"unknown key {key!r}: nothing lies below {plural(place)}", where="command line")
    if not part.isdigit() or int(part) >= len(place):
        raise UserError(f"no item {part!r} of {len(place)} in {key!r}", where="command line", nearest=len(place) - 1)
    return int(part)


def build(schema: type[Schema], raw: object, path: Path, prefix: str = "") -> Schema:
    """Plain data -> dataclass, each leaf converted and checked by OmegaConf's structured configs."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(raw, dict):
        raise UserError(f"{prefix.rstrip('.')} is {plural(raw)}, not keys and values", where=path)
    hints, values = typing.get_type_hints(schema), {}
    for key, value in raw.items():
        full = f"{prefix}{key}"
        if key not in hints:
            close = nearest(str(key), hints) or ", ".join(hints)
            raise UserError(f"unknown key {full!r}", where=path, nearest=close)
        kind, item = inner(hints[key])
        if is_dataclass(kind) and not (value is None and kind is not hints[key]):
            values[key] = build(kind, value, path, f"{full}.")
        elif kind is list and is_dataclass(item):
            if not isinstance(value, list):
                raise UserError(f"{full} is {plural(value)}, not a list", where=path)
            values[key] = [build(item, one, path, f"{full}.{i}.") for i, one in enumerate(value)]
        else:
            try:
                leaf = OmegaConf.structured(one_field(schema.__name__, key, hints[key]))
                OmegaConf.update(leaf, key, value)
                values[key] = getattr(OmegaConf.to_object(leaf), key)
            except (OmegaConfBaseException, TypeError) as error:
                choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
                close = nearest(str(value), map(str, choices)) or ", ".join(map(str, choices)) or None
                raise UserError(
                    f"{full} is {value!r}, expected {spelled(hints[key])}", where=path, nearest=close
                ) from error
    required = [f.name for f in fields(schema) if f.default is MISSING and f.default_factory is MISSING]
    for name in required:
        if name not in values:
            raise UserError(f"{prefix}{name} is missing, {spelled(hints[name])}", where=path)
    return schema(**values)


def inner(hint: object) -> tuple[object, object]:
    """A type without its `| None`, list[X] as (list, X)."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is list:
        return list, typing.get_args(hint)[0]
    return hint, None


def one_field(name: str, key: str, hint: object) -> type:
    """An OmegaConf schema of one typed field."""
    return make_dataclass(name, [(key, hint, field(default="???"))])


def spelled(hint: object) -> str:
    """A type in a user's words."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    if hint in names:
        return names[hint]
    parts = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(map(spelled, parts))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, parts))
    if typing.get_origin(hint) is list:
        return f"a list, each item {spelled(parts[0])}"
    if typing.get_origin(hint) is dict:
        return f"keys and values, each value {spelled(parts[1])}"
    return "keys and values"


def plural(value: object) -> str:
    names = {list: "a list", dict: "keys and values", type(None): "empty"}
    return names.get(type(value), repr(value))


def save(config: object, path: Path) -> None:
    """Write a configuration as YAML, every value spelled out."""
    from omegaconf import OmegaConf

    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def check(config: RunConfig, where: object = None) -> None:
    """Raise UserError for values that cannot be right, alone or together."""

    def wrong(key: str, what: str, valid: object = None):
        raise UserError(f"{key} {what}", where=where, nearest=valid)

    for i, stage in enumerate(config.stages):
        key = f"stages.{i}"
        for name in ("tokens", "context", "micro_batch", "batch_tokens", "clip", "keep"):
            if getattr(stage, name) <= 0:
                wrong(f"{key}.{name}", f"is {getattr(stage, name)}, it must be positive")
        for name in ("warmup_tokens", "validation_tokens", "save_every", "weight_decay", "end_lr"):
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
        for name in ("gates", "mixer", "body"):
            if not 0 <= getattr(stage.lr, name) <= LARGEST_LR:
                wrong(f"{key}.lr.{name}", f"is {getattr(stage.lr, name)}", f"0 to {LARGEST_LR:g}")
        if stage.kind == "align" and stage.lr.body:
            wrong(f"{key}.lr.body", f"is {stage.lr.body}, but align trains mixers and gates only", 0)
        if not (stage.lr.gates or stage.lr.mixer or stage.lr.body):
            wrong(f"{key}.lr", "is 0 for every group: nothing would be trained")
        if stage.end_lr > 1:
            wrong(f"{key}.end_lr", f"is {stage.end_lr}, a fraction of the peak", 0.1)
        if not 0 <= stage.loss.kl <= 1:
            wrong(f"{key}.loss.kl", f"is {stage.loss.kl}, a weight between 0 (cross-entropy) and 1", 1)
        if stage.loss.temperature <= 0 or stage.loss.chunk < 1:
            wrong(f"{key}.loss", "needs a positive temperature and chunk")
        if stage.validation_tokens and not config.data.validation:
            wrong(f"{key}.validation_tokens", "needs data.validation")
        if 0 < stage.validation_tokens < stage.context:
            wrong(f"{key}.validation_tokens", f"is less than a row of {stage.context}", stage.context)
    if config.stages and not config.data.train:
        wrong("data.train", "is empty, but there are stages to train")
    if config.compare and config.compare.limit is not None and config.compare.limit < 1:
        wrong("compare.limit", f"is {config.compare.limit}, it must be positive")


def with_device(config: RunConfig) -> RunConfig:
    """The config with device cpu or cuda in place of auto. Raises UserError for a GPU that is not there."""
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch sees no GPU", nearest="device=cpu", next="t2r env")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return replace(config, device=auto if config.device == "auto" else config.device)
