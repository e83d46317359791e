"""`t2r verify`: is a converted folder the model that it was converted from?

Five questions, each a number against a bound: are the tensors the source's; do they give the source's logits when
softmax attention is put back over them; does the exact start equal the source (first M tokens) and the source's own
windowed attention (beyond); and does every way of reading a text (at once, in chunks, token by token, padded, resumed)
give the same logits.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from t2r.convert.source import Source, open_source
from t2r.errors import UserError
from t2r.families import family_of
from t2r.modeling.configuration import GSAConfig

# Read by every check. Written for this purpose; long enough that windows slide.
TEXT = """The harbour master kept two clocks on his wall. One told the time of the town, the other the time of the tide,
and in forty years he had never once mistaken one for the other. When the ferry left at seven, the second clock pointed
at slack water; when it came back, nets lay drying on the quay and children counted the crates of mackerel aloud. "You
can lend a man your boat," he used to say, "but not your patience." In the winter of 1911 a storm took the roof of the
customs house and carried it, almost whole, over the church and into the orchard behind it, where it stayed. The owner
of the orchard, a widow called Agnes Holm, moved her hens into it. She paid no rent, since nobody could say whether a
roof that had changed its place had changed its owner, and the question went from the parish to the county and from the
county to the crown, gathering paper on the way. By the time an answer came, there were apple trees growing through
three of the windows. Years later an engineer from the capital arrived with a leather case and a plan to dredge the
channel. He measured the depth at nine points, wrote 4.2, 3.9, 5.1, 4.4, 4.0, 3.7, 3.7, 6.0 and 2.8 metres in a blue
notebook, and asked which of the two clocks was right. The harbour master looked at him for some time. "That depends,"
he answered, "on whether you mean to sail or to eat." The engineer laughed, but he wrote the sentence under the numbers,
and when the channel was finished somebody had it cut into the stone at the end of the pier, where it can still be read
at low water, if the wind is not too strong and the weed has been scraped away that spring."""


@dataclass(frozen=True)
class Check:
    """One question: the largest deviation found, the bound it must keep (None: for information), and details."""

    name: str
    value: float
    bound: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.bound is None or self.value <= self.bound


@dataclass
class Report:
    """The answers; str() is a table."""

    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        return not self.failed

    def __str__(self) -> str:
        rows, width = [], max(len(check.name) for check in self.checks)
        for check in self.checks:
            mark = "    " if check.bound is None else "ok  " if check.passed else "FAIL"
            bound = "" if check.bound is None else f"<= {check.bound:.0e}"
            rows.append(f"{mark} {check.name:<{width}} {check.value:.1e} {bound}  {check.note}".rstrip())
        n = len(self.failed)
        return "\n".join([*rows, "verified" if self.passed else f"NOT VERIFIED: {n} check{'s' * (n != 1)} failed"])


def verify(model: str | Path, source: str) -> Report:
    """Check the converted folder `model` against `source` (anything that `t2r convert` reads). All in float32.

    Raises UserError when one of them cannot be read, or they are not of one family.
    """
    opened, converted = open_source(source), open_source(model)
    gsa_type = family_of(opened.config.model_type, where=opened.path).gsa_model_type
    if converted.config.model_type != gsa_type:
        raise UserError(
            f"a {converted.config.model_type} model cannot come from a {opened.config.model_type} model", where=model
        )
    report = Report([compare_tensors(opened, converted)])
    if not report.passed:
        return report
    gsa = GSAConfig.of(converted.config)
    tokenizer = opened.load_tokenizer()
    ids = text_tokens(tokenizer, 3 * gsa.slots, opened.config.max_position_embeddings)
    with torch.inference_mode():
        teacher = load_source(opened)
        if rounded(opened, converted):
            before = teacher(ids).logits
            round_like(teacher, converted)
            moved = distance(before, teacher(ids).logits)
            report.checks.append(Check("rounding moves the source's logits by", moved, note="not a fault"))
        logits = teacher(ids).logits
        softmax = softmax_back(converted, opened)
        report.checks.append(
            Check("softmax put back: logits against the source", distance(softmax(ids).logits, logits), 1e-4)
        )
        del softmax
        student = load_gsa(converted)
        report.checks += reading_checks(student, ids)
        if gsa.ring == gsa.slots and gsa.rope:
            report.checks += exact_start_checks(student, teacher, ids, logits, gsa)
    return report


def compare_tensors(source: Source, converted: Source) -> Check:
    """Every tensor of the source against the converted one, after the same rounding: bit for bit."""
    theirs, stored, wrong = set(converted.names()), 0, []
    tied = converted.config.tie_word_embeddings
    for name in source.names():
        if tied and name == "lm_head.weight":
            continue
        stored += 1
        if name not in theirs:
            wrong.append(f"{name} is missing")
        elif not torch.equal(source.tensor(name).to(converted.dtype(name)), converted.tensor(name)):
            wrong.append(f"{name} differs")
    more = f", {len(wrong) - 3} more" if len(wrong) > 3 else ""
    note = ", ".join(wrong[:3]) + more if wrong else f"{stored} tensors equal"
    return Check("tensors that differ from the source", len(wrong), 0, note)


def text_tokens(tokenizer, at_least: int, at_most: int) -> Tensor:
    """[1, T] token ids of TEXT, repeated to at least `at_least` tokens, cut to at most `at_most`."""
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    length = min(max(192, at_least), at_most)
    return ids.repeat(1, -(-length // ids.shape[1]))[:, :length]


def load_source(source: Source):
    """The source as transformers itself loads it, in float32: nothing of our reading of its files is trusted."""
    from transformers import AutoModelForCausalLM, GgufConfig

    if source.is_quantised:
        options = {"gguf_file": source.path.name, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(source.path.parent, dtype=torch.float32, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32, local_files_only=True)
    return model.float().eval()


def load_gsa(converted: Source):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(converted.path, dtype=torch.float32, local_files_only=True).eval()


def softmax_back(converted: Source, source: Source):
    """The source's own class over the converted tensors."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(source.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    names = [name for name in source.names() if name in set(converted.names())]
    tensors = {name: converted.tensor(name).float() for name in names}
    return model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).eval()


def rounded(source: Source, converted: Source) -> bool:
    names = set(converted.names())
    return any(converted.dtype(name) != source.dtype(name) for name in source.names() if name in names)


def round_like(model, converted: Source) -> None:
    """Round each parameter of `model` to the dtype in which `converted` stores it."""
    names = set(converted.names())
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.copy_(parameter.to(converted.dtype(name)))


def reading_checks(model, ids: Tensor) -> list[Check]:
    """The same text read at once, in chunks, token by token, resumed twice from one state, and left-padded."""
    from transformers import DynamicCache

    T = ids.shape[1]
    whole = model(ids).logits

    def read(cuts: list[int], cache=None) -> Tensor:
        cache = DynamicCache() if cache is None else cache
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in zip(cuts, cuts[1:], strict=False)]
        return torch.cat(parts, dim=1)

    half = DynamicCache()
    read([0, T // 2], half)
    resumed = [read([T // 2, T], copy.deepcopy(half)) for _ in range(2)]
    short = T - 37
    batch = torch.cat([ids, torch.cat([ids[:, :37], ids[:, :short]], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :37] = 0
    padded = model(batch, attention_mask=mask).logits
    pairs = {
        "in chunks": (read([0, T // 3, T // 3 + 1, T]), whole),
        "token by token": (read(list(range(T + 1))), whole),
        "resumed from a state, twice": (torch.cat(resumed), whole[:, T // 2 :].expand(2, -1, -1)),
        "in a left-padded batch": (torch.cat([padded[0], padded[1, 37:]]), torch.cat([whole[0], whole[0, :short]])),
    }
    return [Check(f"read {how}: logits against read at once", distance(*pair), 1e-3) for how, pair in pairs.items()]


def exact_start_checks(student, teacher, ids: Tensor, logits: Tensor, gsa: GSAConfig) -> list[Check]:
    """With the clock alone at the gates and sinks at their true distance: the source on the first M tokens, and beyond
    them its windowed attention with sinks."""
    from t2r.modeling.attention import GSAttention

    for module in student.modules():
        if isinstance(module, GSAttention):
            module.f_proj.weight.zero_()
            module.write.fill_({"linear": 1.0, "sigmoid": -120.0}[gsa.gate])
            module.keep.fill_({"linear": 0.0, "sigmoid": 70.0}[gsa.gate])
    student.config.gsa = {**student.config.gsa, "sink_distance": None}
    start, M = student(ids).logits, gsa.slots
    window = torch.where(ring_window(gsa, ids.shape[1]), 0.0, torch.finfo(torch.float32).min)[None, None]
    windowed = teacher(ids, attention_mask=window).logits
    name = "exact start: logits against"
    return [
        Check(f"{name} the source, first {M} tokens", distance(start[:, :M], logits[:, :M]), 1e-3),
        Check(f"{name} the source's window + {gsa.sinks} sinks, beyond", distance(start, windowed), 1e-2),
        Check("the window itself moves the source's logits by", distance(windowed, logits), note="not a fault"),
    ]


def ring_window(gsa: GSAConfig, T: int) -> Tensor:
    """[T, T] bool: whether the clock still holds token j when token i is read."""
    t = torch.arange(T)
    slot = gsa.spec.turn(t)
    overwritten = torch.full((T,), T)  # position of the next token on the same slot
    last: dict[int, int] = {}
    for j, m in enumerate(slot.tolist()):
        if m in last:
            overwritten[last[m]] = j
        last[m] = j
    return (t[None] <= t[:, None]) & (t[:, None] < overwritten[None])


def distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return (a - b).abs().max().item()
