"""What training costs: floating-point operations of a token, and memory of a process. For MFU and `t2r plan`."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from t2r.families import head_dim, window
from t2r.modeling.attention import GSAttention
from t2r.schema import DeepSpeedConfig, StageConfig


class Hardware(NamedTuple):
    """One GPU. flops: dense bfloat16 operations a second at best. memory: bytes. words: of the name CUDA gives it."""

    flops: float
    memory: float
    words: tuple[str, ...]


# the makers' data sheets, without sparsity; the more special name first
HARDWARE = {
    "b200": Hardware(2250e12, 180e9, ("B200",)),
    "h200": Hardware(989e12, 141e9, ("H200",)),
    "h100": Hardware(989e12, 80e9, ("H100",)),
    "a100-80": Hardware(312e12, 80e9, ("A100", "80GB")),
    "a100-40": Hardware(312e12, 40e9, ("A100",)),
    "l40s": Hardware(362e12, 48e9, ("L40S",)),
    "a10": Hardware(125e12, 24e9, ("A10",)),
    "l4": Hardware(121e12, 24e9, ("L4",)),
    "rtx4090": Hardware(165e12, 24e9, ("4090",)),
    "rtx3090": Hardware(71e12, 24e9, ("3090",)),
}


def hardware_of(name: str) -> Hardware | None:
    """The GPU that CUDA calls `name`, if it is known."""
    return next((gpu for gpu in HARDWARE.values() if all(word in name for word in gpu.words)), None)


# Share of a GPU's peak that the recurrence's operations reach, few on much that is read and written. Measured on an
# H200 (kernels/gsa/README.md): 0.02 for 64 slots and heads of 128, 0.01 for 128 slots or heads of 64, 0.005 for 32.
RECURRENCE = 0.012


class Flops(NamedTuple):
    """Operations of one token, multiplications and additions counted apart. student: forward and backward of what is
    trained, of which recurrence is the slots' part. teacher: its forward. Recomputed activations are not counted: they
    are no progress."""

    student: float
    teacher: float
    recurrence: float = 0.0

    @property
    def total(self) -> float:
        return self.student + self.teacher

    def seconds(self, peak: float, products: float, again: bool) -> float:
        """An estimate of a token's time on a GPU of `peak` operations a second. products: the share of it that all but
        the recurrence reaches. again: the student's forward is done once more in the backward pass."""
        more = 4 / 3 if again else 1.0
        rest = more * (self.student - self.recurrence) + self.teacher
        return (rest / products + more * self.recurrence / RECURRENCE) / peak


def linear_parameters(module: nn.Module, trained: bool = False) -> int:
    """Numbers in the weights of linear layers, each multiplied once by a token; only those in training if `trained`."""
    weights = (m.weight for m in module.modules() if isinstance(m, nn.Linear))
    return sum(w.numel() for w in weights if w.requires_grad or not trained)


def gsa_flops(mixer: GSAttention) -> float:
    """Of the recurrence, one layer, forward: every slot decays and takes in k and v, every query reads all slots."""
    slots, width, config = mixer.gsa.slots, 2 * mixer.head_dim, mixer.config
    return 3 * mixer.kv_heads * slots * width + 2 * config.num_attention_heads * slots * width


def softmax_flops(config, context: int, layers: Iterable[int]) -> float:
    """Of attention over the tokens before, in the windows of these layers, forward, on average over a row."""
    reaches = (min(context, window(config, i) or context) for i in layers)
    # the first `reach` tokens of a row see half of that on average, the others all of it
    return 4 * config.num_attention_heads * head_dim(config) * sum(n - n * n / (2 * context) for n in reaches)


def training_flops(student, stage: StageConfig) -> Flops:
    """Of a token in a stage, for a student whose requires_grad is set as the stage trains it."""
    config, mixers = student.config, [m for m in student.modules() if isinstance(m, GSAttention)]
    recurrence = 3 * sum(map(gsa_flops, mixers))  # backward is twice forward
    layers = range(config.num_hidden_layers)
    attention = softmax_flops(config, stage.context, layers)
    kept = 3 * softmax_flops(config, stage.context, set(layers) - {mixer.layer_idx for mixer in mixers})
    new = sum(mixer.f_proj.weight.numel() for mixer in mixers)
    if stage.kind == "align":
        # the mixers' inputs are given, so gradients go back through o_proj only
        parts = [
            linear_parameters(m) + linear_parameters(m.o_proj) + linear_parameters(m, trained=True) for m in mixers
        ]
        backbone = linear_parameters(student.model) - new
        return Flops(2 * sum(parts) + recurrence, 2 * backbone + attention, recurrence)
    both = 4 * linear_parameters(student) + 2 * linear_parameters(student, trained=True) + recurrence + kept
    teacher = 2 * (linear_parameters(student) - new) + attention if stage.kind == "distill" else 0.0
    return Flops(both, teacher, recurrence)


class Memory(NamedTuple):
    """Bytes of one process, by what they hold. An estimate: allocators and kernels take some more."""

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    activations: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(self)


def training_memory(
    student, trained: int, stage: StageConfig, deepspeed: DeepSpeedConfig, zero: int, world: int, width: int
) -> Memory:
    """Of a stage. trained: parameters in training. width: bytes of a computing number, 2 in bfloat16."""
    total, config = sum(p.numel() for p in student.parameters()), student.config
    offloaded, moved = deepspeed.offload != "none", deepspeed.offload == "all"
    weights = 0.0 if moved else width * total / (world if zero == 3 else 1)
    gradients = 4 * trained / (world if zero >= 2 else 1)
    optimizer = 0.0 if offloaded else (12 if width == 2 else 8) * trained / (world if zero else 1)
    teacher = 0.0
    if stage.kind in ("align", "distill"):
        share = {"whole": 1.0, "sharded": 1 / world, "cpu": 0.0}[deepspeed.teacher]
        teacher = share * width * total
    tokens = stage.micro_batch * stage.context
    slots = {m.layer_idx: m.gsa.slots for m in student.modules() if isinstance(m, GSAttention)}
    layers = [layer_bytes(config, slots.get(i), width) for i in range(config.num_hidden_layers)]
    if stage.kind == "align":  # inputs and outputs of all the teacher's attention, and each mixer's own activations
        own = 0 if stage.activation_checkpointing else sum(layers[i] for i in slots) / 2
        kept = len(layers) * 2 * width * config.hidden_size + own + max(layers)
    elif stage.activation_checkpointing:
        kept = len(layers) * width * config.hidden_size + max(layers)
    else:
        kept = sum(layers)
    chunk = min(stage.loss.chunk, tokens)
    logits = 0.0 if stage.kind == "align" else 4 * chunk * config.vocab_size * (5 if stage.kind == "distill" else 3)
    if stage.kind != "align" and student.lm_head.weight.requires_grad:
        logits += 4 * student.lm_head.weight.numel()
    buffers = 2 * min(500_000_000, trained) * width if zero else 0.0
    return Memory(weights, gradients, optimizer, teacher, tokens * kept, logits, buffers)


def layer_bytes(config, slots: int | None, width: int) -> float:
    """Of a token in a layer, what the backward pass needs: inputs of norms and products, in computing width; with slots
    (None: softmax attention) also q, k, v, output and gates of the recurrence in float32."""
    projected = 2 * (config.num_attention_heads + config.num_key_value_heads) * head_dim(config)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    recurrence = 0 if slots is None else projected + 3 * config.num_key_value_heads * slots
    return width * (6 * config.hidden_size + projected + 4 * inner) + 4 * recurrence
