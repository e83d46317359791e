"""What a converted model does with its slots: how long they keep, what they hold, and where its attention goes."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from t2r.evaluate.movement import damaged_weights, trained
from t2r.evaluate.perplexity import Blocks
from t2r.evaluate.statistics import Metric
from t2r.evaluate.task import Outcome, Plot
from t2r.kernels.gsa.evict import evict
from t2r.kernels.gsa.spec import EMPTY, GSASpec, SlotState, gates
from t2r.modeling import attention as attention_module

FLOOR = -80.0  # log of a decay that is as good as 0; sums of it stay exact in float64
MEASURES = ("window", "sinks", "past", "half_life", "occupancy", "effective", "similarity")


@dataclass
class SlotUse(Blocks):
    """Blocks of text read by a converted model, its slots looked into at `queries` positions of the second half.

    Every slot holds a weighted mean of tokens, and every read is a weighted mean of slots: so the attention that each
    earlier token gets is known exactly.
    """

    block: int = 1024
    edges: list[int] = dataclasses.field(default_factory=list)
    queries: int = 16

    about: ClassVar[str] = (
        "Attention of converted layers by what it reaches: the sinks, the window (as many last tokens as the ring has "
        "turns; without a ring, as there are slots), and what lies past it, which only a memory can hold. Half-life: "
        "tokens after which half of what was written is gone, median over slots. Effective: slots that a read spreads "
        "over (exp of its entropy). Similarity: mean cosine of the keys of two slots."
    )
    plot: ClassVar[Plot] = Plot("Attention past the window, by layer", "layer", "share of attention (%)", log=False)
    converted_only: ClassVar[bool] = True

    NOTHING: ClassVar[float] = 0.5  # percent of attention

    @torch.inference_mode()
    def run(self, model, items: list[list[int]]) -> Outcome:
        heads: dict[int, list[dict[str, float]]] = {}
        with spied(model, lambda layer, call: heads.update({layer: self.look(call)})):
            model(torch.tensor(items).to(model.device), use_cache=False, logits_to_keep=1)
        records = [{"layer": i, "head": h, **row} for i in heads for h, row in enumerate(heads[i])]
        mean = {key: statistics.fmean(record[key] for record in records) for key in MEASURES}
        metrics = [
            Metric("attention past the window", "%", mean["past"]),
            Metric("attention inside the window", "%", mean["window"]),
            Metric("attention on sinks", "%", mean["sinks"]),
            Metric("half-life", "tokens", float(numpy.median([record["half_life"] for record in records]))),
            Metric("occupancy", "%", mean["occupancy"]),
            Metric("effective slots", "slots", mean["effective"]),
            Metric("similarity of slots", "cosine", mean["similarity"]),
        ]
        for i in heads:
            past = statistics.fmean(row["past"] for row in heads[i])
            metrics.append(Metric(f"layer {i}", "%", past, x=i))
        warnings = damaged_weights(model) + self.warnings(heads, mean["past"], trained(model))
        return Outcome(metrics, records, table(records), warnings)

    def look(self, call: dict) -> list[dict[str, float]]:
        """The measures of one layer, for each kv head."""
        spec: GSASpec = call["spec"]
        T, M = call["forget"].shape[1], call["forget"].shape[3]
        at = torch.linspace(T // 2, T - 1, self.queries, device=call["k"].device).long()
        token = torch.arange(T, device=at.device)[None, :]
        age, window = at[:, None] - token, spec.ring - spec.sinks or M
        sink, near = (token < spec.sinks) & (age >= 0), (age >= 0) & (age < window)
        reached = {"sinks": sink, "window": near & ~sink, "past": (age >= window) & ~sink}
        found = []
        for head in range(call["k"].shape[2]):
            seen = look_into(call, head, at)
            share = 100 * seen.tokens / seen.tokens.sum(-1, keepdim=True).clamp(min=EMPTY)
            row = {key: (share * mask[None, :, None]).sum(-1).mean().item() for key, mask in reached.items()}
            row["half_life"] = half_life(seen.held, call["write"][:, :, head].double())
            row["occupancy"] = 100 * seen.z.clamp(max=1).mean().item()
            row["effective"] = torch.special.entr(seen.slots).sum(-1).exp().mean().item()
            row["similarity"] = similarity(seen.keys, seen.z)
            found.append(row)
        return found

    def warnings(self, heads: dict, past: float, trained: set[int]) -> list[str]:
        found = []
        for i, rows in heads.items():
            occupancy = statistics.fmean(row["occupancy"] for row in rows)
            if occupancy < 50:
                what = "has learned to forget" if i in trained else "is damaged"
                found.append(f"layer {i} {what}: its slots are {100 - occupancy:.0f} % empty")
        if past < self.NOTHING:
            found.append(f"the memory adds nothing over the window: {past:.2f} % of the attention lies past it")
        return found


class Seen(NamedTuple):
    """One kv head at Q positions of a text of T tokens, float64.

    held [B,T,M]: cumulative log of what a slot keeps from token to token. z [B,Q,M], keys [B,Q,M,D]: occupancy and keys
    of the slots. slots [B,Q,G,M]: the read's share of each. tokens [B,Q,G,T]: its weight on the value of each token.
    """

    held: Tensor
    z: Tensor
    keys: Tensor
    slots: Tensor
    tokens: Tensor


def look_into(call: dict, head: int, at: Tensor) -> Seen:
    """The head of a recorded call at the positions `at` [Q]."""
    spec: GSASpec = call["spec"]
    forget, write = (call[key][:, :, head].double() for key in ("forget", "write"))  # [B,T,M]
    held = torch.log1p(-forget).clamp(min=FLOOR).cumsum(1)
    earlier = torch.arange(forget.shape[1], device=at.device)[None, :] <= at[:, None]
    kept = (held[:, at, None] - held[:, None]).exp()
    kept = torch.where(earlier[None, :, :, None], kept, 0.0)
    weights = kept * write[:, None]
    z = weights.sum(2)
    keys = torch.einsum("bqtm,btd->bqmd", weights, call["k"][:, :, head].double())
    present = z > EMPTY if spec.occupancy else torch.ones_like(z, dtype=torch.bool)
    divisor = torch.where(present, z, 1.0) if spec.occupancy else torch.ones_like(z)
    groups = slice(head * call["groups"], (head + 1) * call["groups"])
    logits = [
        call["scale"] * torch.einsum("bqgd,bqmd->bqgm", q[:, at, groups].double(), keys / divisor[..., None])
        for q in (call["q"], call["q_sink"])
        if q is not None
    ]
    logits = torch.cat([logits[-1][..., : spec.sinks], logits[0][..., spec.sinks :]], dim=-1)
    logits = logits + divisor.log()[:, :, None]
    slots = logits.masked_fill(~present[:, :, None], torch.finfo(logits.dtype).min).softmax(-1)
    slots = slots.masked_fill(~present[:, :, None], 0.0)
    tokens = torch.einsum("bqgm,bqtm->bqgt", slots / divisor[:, :, None], weights)
    return Seen(held, z, keys, slots, tokens)


def half_life(held: Tensor, write: Tensor) -> float:
    """Tokens after which half of what a token has written is gone, the median over the writes in the first half of the
    text, each with its weight; the rest of the text where it never is. held, write [B,T,M]; 0 where nothing is written,
    NaN where a weight is.
    """
    lost = -held.transpose(1, 2).contiguous()  # [B,M,T], rising
    T = lost.shape[-1]
    starts = lost[..., : T // 2]
    half = torch.searchsorted(lost, starts + math.log(2) * (1 - 1e-9)) - torch.arange(T // 2, device=lost.device)
    lives, order = half.flatten().sort()
    weights = write[:, : T // 2].transpose(1, 2).flatten()[order].cumsum(0)
    if not weights[-1] > EMPTY:
        return 0.0 * float(weights[-1])
    return float(lives[torch.searchsorted(weights, weights[-1] / 2)])


def similarity(keys: Tensor, z: Tensor) -> float:
    """Mean cosine of the keys of two slots that hold something: keys [B,Q,M,D], z [B,Q,M]."""
    unit = normalize(keys, dim=-1) * (z > EMPTY)[..., None]
    count = (z > EMPTY).sum(-1).double()
    pairs = (count * (count - 1)).clamp(min=1)
    return ((unit.sum(-2).square().sum(-1) - count) / pairs).mean().item()


@contextmanager
def spied(model, note: Callable[[int, dict], None]) -> Iterator[None]:
    """Within, note(layer, call) is called for each GSA layer's operation: its q, k, gates and options."""
    original, current = attention_module.gsa, []

    def spy(q, k, v, gate, *, spec, scale, **options):
        write, keep, q_sink, bonus, where = map(options.get, ("write", "keep", "q_sink", "bonus", "positions"))
        if where is None:
            where = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2])
        turn = None
        if bonus is not None:
            empty = SlotState.empty(*bonus.shape[::2], gate.shape[-1], 1, 1, q.device, ranked=True)
            turn, *_ = evict(bonus, options["recent"], where, None, empty.rank, empty.stamp, spec.ring, spec.sinks)
        forget, s = gates(gate, where, spec, write, keep, None, turn)
        act = silu if spec.feature_map == "silu" else lambda x: x
        queries = [None if x is None else act(x) for x in (q, q_sink)]
        call = {
            "q": queries[0],
            "q_sink": queries[1],
            "k": act(k),
            "v": act(v),
            "forget": forget,
            "write": s,
            "spec": spec,
        }
        note(current[-1], {**call, "scale": scale, "groups": q.shape[2] // k.shape[2]})
        return original(q, k, v, gate, spec=spec, scale=scale, **options)

    modules = [module for module in model.modules() if isinstance(module, attention_module.GSAttention)]
    hooks = [module.register_forward_pre_hook(lambda m, args: current.append(m.layer_idx)) for module in modules]
    attention_module.gsa = spy
    try:
        yield
    finally:
        attention_module.gsa = original
        for hook in hooks:
            hook.remove()


def table(records: list[dict]) -> str:
    """One line a layer and head."""
    head = ("layer", "head", *(key.replace("_", "-") for key in MEASURES))
    lines = ["  ".join(f"{word:>10}" for word in head)]
    for r in records:
        numbers = "  ".join(f"{r[key]:>10.3g}" for key in MEASURES)
        lines.append(f"{r['layer']:>10}  {r['head']:>10}  {numbers}")
    return "\n".join(lines)
