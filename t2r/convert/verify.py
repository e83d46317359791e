"""`t2r verify`: is a converted folder the model that it was converted from?

Each question is a number against a bound: are the tensors the source's; do they give the source's logits when softmax
attention is put back over them; does every way of reading a text (at once, in chunks, token by token, padded, resumed,
in bfloat16) give the same; does the exact start equal the source (first tokens), its windowed attention (beyond), and
its attention with near sinks where they are far. A model that does not fit into memory is read a layer at a time.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from t2r.convert.checks import (
    Check,
    bonuses,
    clock_alone,
    decided,
    distance,
    exact_start_checks,
    far_sink_checks,
    low_precision_check,
    mixer_reading_checks,
    reading_checks,
    softmax_check,
)
from t2r.convert.paged import Pages
from t2r.convert.source import Source, open_source
from t2r.convert.writer import available_ram
from t2r.errors import UserError
from t2r.families import family_of, trained_context
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


def verify(model: str | Path, source: str, by_layer: bool | None = None) -> Report:
    """Check the converted folder `model` against `source` (anything that `t2r convert` reads). In float32 unless said.

    by_layer: hold one layer in memory at a time; None: where three models of that size do not fit. The ways of reading
    a text are then compared at each mixer, on what that mixer reads, instead of at the logits.

    Raises UserError when one of them cannot be read, or they are not of one family.
    """
    opened, converted = open_source(source), open_source(model)
    kind = opened.config.model_type
    gsa_type = kind if opened.is_foreign else family_of(kind, where=opened.path).gsa_model_type
    if converted.config.model_type != gsa_type:
        if not converted.config.model_type.startswith("gsa_"):
            what = f"this is a {converted.config.model_type} model, not a converted one"
            raise UserError(what, where=model, next=f"t2r convert {model} OUT")
        raise UserError(
            f"a {converted.config.model_type} model cannot come from a {opened.config.model_type} model", where=model
        )
    report = Report([compare_tensors(opened, converted)])
    if not report.passed:
        return report
    if by_layer is None:
        size = 3 * 4 * sum(torch.Size(converted.shape(name)).numel() for name in converted.names())
        ram = available_ram()
        by_layer = ram is not None and ram < size
    layers = GSAConfig.of(converted.config).gsa_layers(converted.config)
    longest = max(gsa.slots for gsa in layers.values())
    ids = text_tokens(opened.load_tokenizer(), 3 * longest, trained_context(opened.config))
    check = check_reading if opened.is_foreign else check_by_layer if by_layer else check_whole
    with torch.inference_mode():
        report.checks += check(opened, converted, ids, layers)
    return report


def check_whole(opened: Source, converted: Source, ids: Tensor, layers: dict[int, GSAConfig]) -> list[Check]:
    """All checks but the tensors', with whole models in memory."""
    checks, teacher = [], load_source(opened)
    if rounded(opened, converted):
        before = teacher(ids).logits
        round_like(teacher, converted)
        moved = distance(before, teacher(ids).logits)
        checks.append(Check("rounding moves the source's logits by", moved, note="not a fault"))
    logits = teacher(ids).logits
    checks.append(softmax_check(softmax_back(converted, opened), ids, logits))
    student, low = load_gsa(converted), load_gsa(converted, torch.bfloat16)
    known = bonuses(student, ids)
    with decided(student, known), decided(low, known):
        checks += [*reading_checks(student, ids), low_precision_check(student, low, ids)]
    if has_exact_start(layers):
        for name, parameter in student.named_parameters():
            parameter.copy_(clock_alone(name, parameter))
        checks += exact_start_checks(student, teacher, ids, logits) + far_sink_checks(student, teacher, ids)
    return checks


def check_reading(opened: Source, converted: Source, ids: Tensor, layers: dict[int, GSAConfig]) -> list[Check]:
    """What can be asked of a model whose source has Gated Slot Attention too, in a project that need not be here."""
    return reading_checks(load_gsa(converted), ids)


def check_by_layer(opened: Source, converted: Source, ids: Tensor, layers: dict[int, GSAConfig]) -> list[Check]:
    """The same, reading weights layer by layer; rounding is part of reading the source's."""
    names = set(converted.names())
    teacher = Pages(
        empty_model(softmax_config(opened)),
        opened,
        lambda name, x: x.to(converted.dtype(name)) if name in names else x,
    ).model
    logits = teacher(ids, use_cache=False).logits
    checks = [softmax_check(Pages(empty_model(softmax_config(opened)), converted).model, ids, logits)]
    pages = Pages(empty_model(converted.config), converted)
    with decided(pages.model, bonuses(pages.model, ids)):
        checks += mixer_reading_checks(pages.model, ids)
    if has_exact_start(layers):
        pages.change = clock_alone
        checks += exact_start_checks(pages.model, teacher, ids, logits) + far_sink_checks(pages.model, teacher, ids)
    return checks


def has_exact_start(layers: dict[int, GSAConfig]) -> bool:
    return all(gsa.ring and gsa.rope and gsa.gate == "linear" for gsa in layers.values())


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


def load_source(source: Source, dtype: torch.dtype = torch.float32):
    """The source as transformers itself loads it, by default in float32: nothing of our reading of its files is
    trusted."""
    from transformers import AutoModelForCausalLM, GgufConfig

    if source.is_quantised:
        options = {"gguf_file": source.path.name, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(source.path.parent, dtype=dtype, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, local_files_only=True)
    return model.to(dtype).eval()


def load_gsa(converted: Source, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(converted.path, dtype=dtype, local_files_only=True).eval()


def softmax_config(source: Source):
    """The source's config for weights that are not quantised."""
    config = copy.deepcopy(source.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def softmax_back(converted: Source, source: Source):
    """The source's own class over the converted tensors."""
    from transformers import AutoModelForCausalLM

    config = softmax_config(source)
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    names = set(converted.names())
    tensors = {name: converted.tensor(name).float() for name in source.names() if name in names}
    return model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).eval()


def empty_model(config):
    """A causal LM of `config` in float32 without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def rounded(source: Source, converted: Source) -> bool:
    names = set(converted.names())
    return any(converted.dtype(name) != source.dtype(name) for name in source.names() if name in names)


def round_like(model, converted: Source) -> None:
    """Round each parameter of `model` to the dtype in which `converted` stores it; where experts are stored one by one,
    to the dtype of the whole."""
    names = set(converted.names())
    for name, parameter in model.named_parameters():
        dtype = converted.dtype(name) if name in names else converted.config.dtype
        parameter.copy_(parameter.to(dtype))
