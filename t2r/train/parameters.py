"""What is trained: groups of parameters with their learning rates, low-rank adapters, and how they are read back."""

import math
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from t2r.convert.source import Source
from t2r.errors import UserError, nearest
from t2r.modeling.attention import GSAttention
from t2r.schema import LoRAConfig, StageConfig

GATES = ("f_proj", "write", "keep")
BIASES = ("write", "keep")
SCORES = ("bonus", "recent")  # which token is evicted: a choice, which has no gradient
LORA = ".lora_"


def group_of(name: str) -> str:
    """Which LearningRates field a parameter belongs to, by its name in the model."""
    parts = name.split(".")
    if any(part in GATES for part in parts):
        return "gates"
    if "self_attn" in parts:
        return "scores" if any(part in SCORES for part in parts) else "mixer"
    return "body"


def plain_name(name: str) -> str:
    """A parameter's name as it is in the checkpoint's files, without what training wraps around it."""
    owner, _, bias = name.removesuffix(".original").partition(".parametrizations.")
    name = f"{owner}.{bias}" if bias else name
    return name.replace(".base_layer.", ".")


def parameter_groups(student: nn.Module, config: StageConfig) -> list[dict]:
    """Optimizer groups of the student's parameters, and requires_grad set: a learning rate of 0 freezes.

    Weight decay is for matrices only, never for gates. Each group has its `name`, peak learning rate `peak` and `lr`.
    With `lora`, mixer and body are the adapters; what is named by a pattern is trained itself.
    Raises UserError for a pattern that names nothing.
    """
    groups, used = {}, set()
    for name, parameter in student.named_parameters():
        kind, plain = group_of(name), plain_name(name)
        if kind == "scores":
            parameter.requires_grad_(False)
            continue
        pattern = next((p for p in config.lr.named if fnmatchcase(plain, p)), None)
        if pattern is not None:
            used.add(pattern)
            kind, peak = pattern, config.lr.named[pattern]
        else:
            frozen = config.lora and kind in ("mixer", "body") and LORA not in name
            peak = 0.0 if frozen else getattr(config.lr, kind)
        parameter.requires_grad_(peak > 0)
        if peak > 0:
            decay = config.weight_decay if parameter.dim() >= 2 and group_of(name) in ("mixer", "body") else 0.0
            group = {"params": [], "name": kind, "peak": peak, "lr": peak, "weight_decay": decay}
            groups.setdefault((kind, decay), group)["params"].append(parameter)
    for pattern in set(config.lr.named) - used:
        names = [plain_name(name) for name, _ in student.named_parameters()]
        raise UserError(f"lr.named {pattern!r} is the name of no parameter", nearest=nearest(pattern, names))
    return list(groups.values())


def learning_rate(config: StageConfig, step: int) -> float:
    """Fraction of the peak in optimizer step `step`, counted from 0."""
    warmup = config.warmup_tokens // config.batch_tokens
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    falling = config.decay_tokens // config.batch_tokens if config.schedule == "wsd" else config.steps - warmup
    done = max(0.0, (step - (config.steps - falling)) / max(1, falling))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.end_lr + (1 - config.end_lr) * shape


def set_learning_rates(optimizer, stage: StageConfig, step: int) -> dict[str, float]:
    """Give each optimizer group its rate; returned by name."""
    fraction = learning_rate(stage, step)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * fraction
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


class Offset(nn.Module):
    """A parameter trained as its distance from where it started: bfloat16 has no room for 1 - 1e-3, but for 1e-3."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.detach().clone(), persistent=False)

    def forward(self, offset: Tensor) -> Tensor:
        return self.start + offset.to(self.start.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value - self.start


def train_offsets(student: nn.Module) -> None:
    """Make the clock's biases Offsets."""
    classes: dict[type, type] = {}
    for module in student.modules():
        if isinstance(module, GSAttention) and module.gsa.ring:
            source = type(module)
            for name in BIASES:
                parametrize.register_parametrization(module, name, Offset(getattr(module, name)))
            # torch makes a class for every module, all alike; torch.compile would make a graph for every class
            module.__class__ = classes.setdefault(source, type(module))


def add_adapters(student: nn.Module, lora: LoRAConfig) -> None:
    """Put a low-rank adapter beside each linear layer that `lora.targets` names. Raises UserError."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("lora needs peft", next="pip install peft") from error

    linear = {name.split(".")[-1] for name, module in student.named_modules() if isinstance(module, nn.Linear)}
    for target in lora.targets:
        if target not in linear - {"f_proj", "bonus"}:
            raise UserError(f"lora.targets {target!r} is no linear layer", nearest=nearest(target, linear))
    # peft draws A with the global generator: all processes, and a resumed run, must draw the same
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=0.0)
        inject_adapter_in_model(config, student)


def full_tensors(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each parameter whole and in float32 on the CPU, whatever ZeRO splits. All processes must go through it alike."""
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in parameters:
        full = safe_get_full_fp32_param(parameter)
        full = parameter if full is None else full
        # under ZeRO 3 a parameter's own shape is that of its part
        yield name, full.detach().float().view(getattr(parameter, "ds_shape", parameter.shape)).cpu()


def check_saved(student: nn.Module, source: Source) -> None:
    """Raise UserError for a parameter in training that no tensor of the model's files is: transformers keeps experts
    in other pieces than the files, and under other names."""
    known = set(source.names())
    for name, parameter in student.named_parameters():
        owner, adapter, _ = name.partition(LORA)
        saved = f"{owner}.weight" if adapter else plain_name(name)
        if parameter.requires_grad and saved not in known:
            what = f"{saved} cannot be trained: the files hold it under other names"
            raise UserError(what, where=source.path, nearest='lr.named: {"*.mlp.*": 0}')


def saved_tensors(student: nn.Module, source: Source | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name in the checkpoint's files, float32 tensor) of all that is trained; adapters are added to their weight.

    source: where that weight is read; None leaves adapters out. All processes must go through it alike.
    """
    modules, halves = dict(student.named_modules()), {}
    trained = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
    for name, full in full_tensors(trained):
        owner, adapter, side = name.partition(LORA)
        if adapter:
            halves.setdefault(owner, {})[side[0]] = full
            if len(halves[owner]) == 2 and source:
                pair, scaling = halves.pop(owner), modules[owner].scaling["default"]
                weight = source.tensor(f"{owner}.weight").float()
                yield f"{owner}.weight", weight + scaling * (pair["B"] @ pair["A"])
            continue
        if ".parametrizations." in name:
            owner, _, bias = name.removesuffix(".original").partition(".parametrizations.")
            full = full + modules[owner].parametrizations[bias][0].start.cpu()
        yield plain_name(name), full
