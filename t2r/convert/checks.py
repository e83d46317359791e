"""The questions of `t2r verify` to models in memory: every way of reading a text, the exact start, far sinks."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from t2r.families import FAMILIES
from t2r.modeling.cache import CACHE
from t2r.modeling.configuration import FLOAT32, GSAConfig

SCORES = {"bonus.weight": 0.0, "bonus.bias": 0.0, "recent": 1.0}  # with which the oldest token is evicted


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


def softmax_check(model, ids: Tensor, logits: Tensor) -> Check:
    moved = distance(model(ids, use_cache=False).logits, logits)
    return Check("softmax put back: logits against the source", moved, 1e-4)


def read(model, ids: Tensor, cuts: list[int], cache) -> Tensor:
    """Logits of ids [B,T] from the first cut to the last, read from cut to cut into `cache`."""
    return torch.cat([model(ids[:, a:b], **{CACHE: cache}).logits for a, b in pairwise(cuts)], dim=1)


@contextmanager
def bonus_from(model, give: Callable) -> Iterator[None]:
    """Within, give(module, hidden_states, positions) is the bonus [B,T,H] of each mixer that evicts by score."""
    modules = [module for module in gsa_mixers(model).values() if module.gsa.scored]
    for module in modules:
        module.token_bonus = lambda hidden, positions, module=module: give(module, hidden, positions)
    try:
        yield
    finally:
        for module in modules:
            del module.token_bonus


def bonuses(model, ids: Tensor) -> dict[int, Tensor]:
    """Layer -> bonus [T,H] of each token of the text ids [1,T]."""
    found = {}

    def note(module, hidden, positions) -> Tensor:
        given = type(module).token_bonus(module, hidden, positions)
        found[module.layer_idx] = given[0].float()
        return given

    with bonus_from(model, note):
        model(ids, use_cache=False)
    return found


def decided(model, known: dict[int, Tensor]):
    """Within, tokens have the bonus that `bonuses` found at their position: two ways of reading a text, of which one is
    rounded otherwise, could else evict, rightly, another token."""
    return bonus_from(model, lambda module, hidden, positions: known[module.layer_idx][positions.clamp(min=0)])


def reading_checks(model, ids: Tensor) -> list[Check]:
    """The same text read at once, in chunks, token by token, resumed twice from one state, and left-padded."""
    from transformers import DynamicCache

    T = ids.shape[1]
    whole = model(ids).logits

    half = DynamicCache()
    read(model, ids, [0, T // 2], half)
    resumed = [read(model, ids, [T // 2, T], copy.deepcopy(half)) for _ in range(2)]
    short = T - 37
    batch = torch.cat([ids, torch.cat([ids[:, :37], ids[:, :short]], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :37] = 0
    padded = model(batch, attention_mask=mask).logits
    pairs = {
        "in chunks": (read(model, ids, [0, T // 3, T // 3 + 1, T], DynamicCache()), whole),
        "token by token": (read(model, ids, list(range(T + 1)), DynamicCache()), whole),
        "resumed from a state, twice": (torch.cat(resumed), whole[:, T // 2 :].expand(2, -1, -1)),
        "in a left-padded batch": (torch.cat([padded[0], padded[1, 37:]]), torch.cat([whole[0], whole[0, :short]])),
    }
    return [Check(f"read {how}: logits against read at once", distance(*pair), 1e-3) for how, pair in pairs.items()]


def low_precision_check(model, low, ids: Tensor) -> Check:
    """Decoding in bfloat16: what it adds to the error that bfloat16 makes anyway in reading at once, as a ratio."""
    from transformers import DynamicCache

    T = ids.shape[1]
    decoded = read(low, ids, [0, *range(T - 32, T + 1)], DynamicCache(config=low.config))
    once = low(ids, use_cache=False).logits
    noise = rms(once - model(ids, use_cache=False).logits)
    added = rms(decoded - once) / noise
    return Check("decoding in bfloat16: its error over that of reading at once", added, 2.0)


def mixer_reading_checks(model, ids: Tensor) -> list[Check]:
    """Each mixer's input read at once, in chunks, token by token and left-padded: the largest deviation of its output,
    over the largest output; and what decoding in bfloat16 adds to the error of bfloat16, as in low_precision_check."""
    worst: dict[str, float] = {}
    added: list[float] = []

    def compare(module, args, kwargs, output) -> None:
        x, positions, largest = kwargs["hidden_states"], kwargs["gsa_context"].positions, output[0].abs().max().item()
        T = x.shape[1]
        padded = torch.cat([torch.full((1, 37), -1), positions], dim=1)
        reads = {
            "in chunks": read_mixer(module, x, kwargs, positions, [0, T // 3, T // 3 + 1, T]),
            "token by token": read_mixer(module, x, kwargs, positions, [*range(9), *range(T - 32, T + 1)]),
            "left-padded": read_mixer(module, torch.cat([x[:, :37], x], dim=1), kwargs, padded, [0, T + 37])[:, 37:],
        }
        for how, found in reads.items():
            worst[how] = max(worst.get(how, 0.0), distance(found, output[0]) / largest)
        low = low_precision(module)
        cuts = [[0, T], [0, *range(T - 32, T + 1)]]
        once, decoded = (read_mixer(low, x.to(torch.bfloat16), kwargs, positions, cut) for cut in cuts)
        added.append(rms(decoded - once) / rms(once - output[0]))

    with hooked(gsa_mixers(model).values(), after=compare):
        model(ids, use_cache=False)
    checks = [Check(f"mixers read {how}, against read at once", moved, 1e-4) for how, moved in worst.items()]
    return [*checks, Check("mixers decode in bfloat16: error over that of reading at once", max(added), 2.0)]


def low_precision(module):
    """A copy of a mixer in bfloat16, but for the gate biases, as transformers loads it."""
    low = copy.deepcopy(module)
    for name, parameter in low.named_parameters():
        if name not in FLOAT32:
            parameter.data = parameter.data.to(torch.bfloat16)
    return low


def read_mixer(module, x: Tensor, kwargs: dict, positions: Tensor, cuts: list[int]) -> Tensor:
    """Output [B,T,W] of a mixer that reads x [B,T,W] from cut to cut into one memory."""
    from transformers import DynamicCache

    from t2r.modeling.attention import Context
    from t2r.modeling.cache import adopt

    cache, outputs = DynamicCache(), []
    adopt(cache, [module.layer_idx], module.layer_idx + 1)
    # Padding in front has no position: its rotary embedding and its distance to the sinks are anything.
    front = x.shape[1] - kwargs["hidden_states"].shape[1]

    def part(pair: tuple[Tensor, Tensor], a: int, b: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.cat([y[:, :front], y], dim=1)[:, a:b].to(x.dtype) for y in pair)

    turns = kwargs["gsa_context"].sink_turns
    for a, b in pairwise(cuts):
        given = {
            **kwargs,
            "hidden_states": x[:, a:b],
            "position_embeddings": part(kwargs["position_embeddings"], a, b),
            CACHE: cache,
            "gsa_context": Context(positions[:, a:b], sink_turns={i: part(turn, a, b) for i, turn in turns.items()}),
        }
        outputs.append(module.forward(**given)[0])
    return torch.cat(outputs, dim=1)


def clock_alone(name: str, tensor: Tensor) -> Tensor:
    """A tensor of an exact start that has learned nothing, and evicts the oldest token; others as they are."""
    end = name.rsplit("self_attn.", 1)[-1]
    value = {"f_proj.weight": 0.0, "keep": 0.0, "write": 1.0, **SCORES}.get(end)
    return tensor if value is None else torch.full_like(tensor, value)


def exact_start_checks(student, teacher, ids: Tensor, logits: Tensor) -> list[Check]:
    """With the clock alone at the gates and sinks at their true distance: the source on the first tokens, and beyond
    them its windowed attention with sinks in the layers that have slots."""
    layers = student.model.gsa_layers
    first = min(gsa.ring for gsa in layers.values())
    with sink_distances(student, lambda gsa: None):
        start = student(ids, use_cache=False).logits
    windows = {i: ring_window(gsa, ids.shape[1]) for i, gsa in layers.items()}

    def narrow(module, args, kwargs):
        mask = torch.where(windows[module.layer_idx], 0.0, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask[None, None]}

    mixers = gsa_mixers(teacher, layers).values()
    with hooked(mixers, before=narrow):
        windowed = teacher(ids, use_cache=False).logits
    name = "exact start: logits against"
    return [
        Check(f"{name} the source, first {first} tokens", distance(start[:, :first], logits[:, :first]), 1e-3),
        Check(f"{name} the source's windows with sinks, beyond", distance(start, windowed), 1e-2),
        Check("the windows themselves move the source's logits by", distance(windowed, logits), note="not a fault"),
    ]


def far_sink_checks(student, teacher, ids: Tensor) -> list[Check]:
    """Each mixer's last output where its sinks are further away than it may see: against the source's attention over
    the same sinks and window, brought together so that the sinks are that far away and no further."""
    T = ids.shape[1]
    layers = {i: gsa for i, gsa in student.model.gsa_layers.items() if gsa.sinks and gsa.ring + 8 < T}
    if not layers:
        return []
    inputs, outputs, worst = {}, {}, 0.0

    def note(module, args, kwargs, output) -> None:
        inputs[module.layer_idx], outputs[module.layer_idx] = kwargs["hidden_states"], output[0][:, -1]

    with sink_distances(student, lambda gsa: gsa.ring + 7), hooked(gsa_mixers(student, layers).values(), after=note):
        student(ids, use_cache=False)
    for gsa in {(gsa.ring, gsa.sinks): gsa for gsa in layers.values()}.values():
        alike = {i: other for i, other in layers.items() if (other.ring, other.sinks) == (gsa.ring, gsa.sinks)}
        window = gsa.ring - gsa.sinks
        seen = torch.cat([torch.arange(gsa.sinks), torch.arange(-window, 0)])
        near = torch.cat([torch.arange(gsa.sinks), gsa.ring + 7 + torch.arange(-window, 0) + 1])
        causal = torch.full((gsa.ring, gsa.ring), torch.finfo(torch.float32).min).triu(1)[None, None]
        theirs = {}

        def read_theirs(module, args, kwargs, seen=seen):
            return args, {**kwargs, "hidden_states": inputs[module.layer_idx][:, seen]}

        def note_theirs(module, args, kwargs, output, theirs=theirs) -> None:
            theirs[module.layer_idx] = output[0][:, -1]

        with hooked(gsa_mixers(teacher, alike).values(), read_theirs, note_theirs):
            teacher(ids[:, : gsa.ring], position_ids=near[None], attention_mask=causal, use_cache=False)
        for i, output in theirs.items():
            worst = max(worst, distance(outputs[i], output) / output.abs().max().item())
    return [Check("far sinks: mixers against the source's with near ones", worst, 1e-4)]


def gsa_mixers(model, layers=None) -> dict[int, torch.nn.Module]:
    """Layer -> attention module, of the given layers; by default those of a GSA model that have slots."""
    path = FAMILIES[model.config.model_type.removeprefix("gsa_")].attention
    return {i: model.model.get_submodule(path.format(i)) for i in layers or model.model.gsa_layers}


@contextmanager
def hooked(modules, before=None, after=None) -> Iterator[None]:
    """Forward hooks with keyword arguments on all modules, for a while."""
    modules = list(modules)
    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in modules if before]
    hooks += [m.register_forward_hook(after, with_kwargs=True) for m in modules if after]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def sink_distances(student, distance) -> Iterator[None]:
    """Another sink_distance in each layer, for a while."""
    before = {module: module.gsa for module in gsa_mixers(student).values()}
    for module, gsa in before.items():
        module.gsa = replace(gsa, sink_distance=distance(gsa))
    try:
        yield
    finally:
        for module, gsa in before.items():
            module.gsa = gsa


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


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()
