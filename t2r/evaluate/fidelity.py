"""How far a model is from its original, token by token and layer by layer, on the same text."""

import dataclasses
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy
import torch
from torch import Tensor

from t2r.evaluate.efficiency import greedy
from t2r.evaluate.movement import OUTLIER, median, trained
from t2r.evaluate.perplexity import SEGMENT, Blocks, in_segments
from t2r.evaluate.scoring import ROWS, batches
from t2r.evaluate.statistics import Metric, score
from t2r.evaluate.task import Outcome, Plot
from t2r.modeling import GSAConfig


@dataclass
class Fidelity(Blocks):
    """The predictions of a model against its original's, by position in blocks of text; see Perplexity for the text.

    prompt, new: tokens of text that both continue greedily, and for how long.
    """

    prompt: int = 64
    new: int = 64

    about: ClassVar[str] = (
        "KL: divergence of the model's next-token distribution from the original's, nats a token, by position. "
        "Agreement: percent of tokens on which both have the same first choice. Greedy: tokens that both write alike "
        "after the same prompt before they part."
    )
    plot: ClassVar[Plot] = Plot("Divergence", "position in the text, up to (tokens)", "KL from the original (nats)")
    against_original: ClassVar[bool] = True

    def run(self, model, items: list[list[int]], original) -> Outcome:
        ids = torch.tensor(items)
        parts: list[tuple[Tensor, Tensor]] = []
        read = lambda batch: parts.append(compare_predictions(model, original, torch.tensor(batch)))  # noqa: E731
        batches(items, self.batch_size, model.device, read)
        kl, same = (torch.cat(part).double() for part in zip(*parts, strict=True))
        metrics = []
        for low, high in pairwise(self.edges):
            columns = slice(max(low - 1, 0), high - 1)
            metrics.append(score(f"KL [{low}, {high})", kl[:, columns].mean(-1).tolist(), x=high))
        for low, high in pairwise(self.edges):
            columns = slice(max(low - 1, 0), high - 1)
            metrics.append(score(f"agreement [{low}, {high}) %", (100 * same[:, columns].mean(-1)).tolist()))
        alike = [self.alike(model, original, block[: self.prompt]) for block in ids]
        metrics.append(score(f"greedy, alike of {self.new}", alike))
        records = [{m.name: m.samples[i] for m in metrics} for i in range(len(items))]
        return Outcome(metrics, records)

    def alike(self, model, original, prompt: Tensor) -> int:
        """Tokens of the original's greedy continuation that the model's begins with."""
        ids = prompt[None].to(original.device)
        written, _ = greedy(original, ids, self.new)
        whole = torch.cat([ids, torch.tensor([written], device=ids.device)], dim=1)
        with torch.inference_mode():
            # up to where they part the model's own continuation is the original's, so one forward finds the place
            logits = model(whole[:, :-1], use_cache=False, logits_to_keep=len(written)).logits
        differ = (logits[0].argmax(-1) != whole[0, -len(written) :]).nonzero()
        return int(differ[0]) if len(differ) else len(written)


@torch.inference_mode()
def compare_predictions(model, original, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(original || model) in nats, whether the first choices are the same) after each token but the last: ids [B,T]
    -> two [B,T-1] on the CPU."""
    kls, sames = [], []
    for ours, theirs in zip(in_segments(model, ids, SEGMENT), in_segments(original, ids, SEGMENT), strict=True):
        kl, same = [], []
        for one, other in zip(ours.flatten(0, 1).split(ROWS), theirs.flatten(0, 1).split(ROWS), strict=True):
            p, q = other.float().log_softmax(-1), one.float().log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1))
            same.append(one.argmax(-1) == other.argmax(-1))
        kls.append(torch.cat(kl).view(ours.shape[:2]).cpu())
        sames.append(torch.cat(same).view(ours.shape[:2]).cpu())
    return torch.cat(kls, dim=1), torch.cat(sames, dim=1)


@dataclass
class Layers(Blocks):
    """Each attention layer alone: it reads what the original's layer reads, so that a fault shows where it is."""

    block: int = 512
    edges: list[int] = dataclasses.field(default_factory=list)

    about: ClassVar[str] = (
        "Error of each layer's attention output against the original's, both fed with the original's activations: RMS, "
        "percent of the output. Within: at positions that fit the slots, where an exact start makes no error. A layer "
        "that stands out there is damaged, unless its weights have moved as all layers' have: training does that."
    )
    plot: ClassVar[Plot] = Plot("Error by layer", "layer", "error past the slots (%)", log=False)
    against_original: ClassVar[bool] = True

    FAULT: ClassVar[float] = 5.0  # percent: more than rounding in bfloat16 makes

    @torch.inference_mode()
    def run(self, model, items: list[list[int]], original) -> Outcome:
        ids = torch.tensor(items).to(model.device)
        gsa = GSAConfig.of(model.config).gsa_layers(model.config) if getattr(model.config, "gsa", None) else {}
        with observed(original) as theirs:
            original(ids, use_cache=False, logits_to_keep=1)
        with observed(model, forced={i: theirs[i]["input"] for i in theirs}) as ours:
            model(ids, use_cache=False, logits_to_keep=1)
        metrics, records = [], []
        for i in theirs:
            slots = min(gsa[i].slots, ids.shape[1]) if i in gsa else ids.shape[1]
            a, b = ours[i]["output"].float(), theirs[i]["output"].float()
            count = model.config.num_attention_heads
            split = [x["heads"].float().unflatten(-1, (count, -1)) for x in (ours[i], theirs[i])]
            heads = error(*(x[:, :slots] for x in split), dims=(0, 1, 3))
            within = error(a[:, :slots], b[:, :slots])
            past = error(a[:, slots:], b[:, slots:]) if slots < ids.shape[1] else within
            metrics.append(Metric(f"layer {i}", "%", past.item(), x=i))
            records.append({"layer": i, "within": within.item(), "past": past.item(), "heads": heads.tolist()})
        for key in ("within", "past"):
            values = [record[key] for record in records]  # numpy's are NaN where one of them is
            metrics.insert(0, Metric(f"worst layer, {key}", "%", float(numpy.max(values))))
            metrics.insert(0, Metric(f"median layer, {key}", "%", float(numpy.median(values))))
        inexact = {i for i, layer in gsa.items() if not layer.ring}
        faults, changes = self.outliers(records, trained(model, original), inexact)
        return Outcome(metrics, records, "\n".join([table(records), *changes]), faults)

    def outliers(self, records: list[dict], trained: set[int], inexact: set[int]) -> tuple[list[str], list[str]]:
        """The layers that stand out at positions where nothing has been forgotten yet, with their worst heads: those
        that are damaged, and those that have moved no more than the others in training. Layers without a clock are no
        copy of their source's from the start (inexact), so how far they are from it says nothing."""
        usual = median([record["within"] for record in records if record["layer"] not in inexact] or [0.0])
        bound = max(self.FAULT, OUTLIER * usual)
        faults, changes = [], []
        for record in records:
            layer = record["layer"]
            if not math.isfinite(record["within"]):
                faults.append(f"layer {layer} is damaged: its output is not finite")
            elif record["within"] > bound and layer not in inexact:
                heads = ", ".join(f"{h} ({e:.0f} %)" for h, e in enumerate(record["heads"]) if e > bound)
                what = f"{record['within']:.0f} % error within its slots" + (f", heads {heads}" if heads else "")
                if layer in trained:
                    changes.append(f"layer {layer} is changed by training: {what}")
                else:
                    faults.append(f"layer {layer} is damaged: {what}")
        return faults, changes


def table(records: list[dict]) -> str:
    """One line a layer, with the errors of its heads within the slots."""
    rows = [f"{'layer':>5}  {'within':>8}  {'past':>8}  heads within"]
    for r in records:
        heads = " ".join(f"{value:.3g}" for value in r["heads"])
        rows.append(f"{r['layer']:>5}  {r['within']:>8.3g}  {r['past']:>8.3g}  {heads}")
    return "\n".join(rows)


def error(ours: Tensor, theirs: Tensor, dims: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    """RMS of the difference, percent of the RMS of `theirs`."""
    return 100 * ((ours - theirs).square().sum(dims) / theirs.square().sum(dims).clamp(min=1e-30)).sqrt()


@contextmanager
def observed(model, forced: dict[int, Tensor] | None = None) -> Iterator[dict[int, dict[str, Tensor]]]:
    """layer -> {"input", "heads", "output"} of its attention, filled by the forwards within: what it reads, what o_proj
    reads and what it puts out. forced: inputs to read in place of the model's own."""
    found: dict[int, dict[str, Tensor]] = {}
    hooks = []

    def watch(i: int, module) -> None:
        def before(_, args, kwargs):
            if forced is not None:
                kwargs = {**kwargs, "hidden_states": forced[i]}
            found.setdefault(i, {})["input"] = kwargs["hidden_states"]
            return args, kwargs

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.o_proj.register_forward_pre_hook(lambda _, args: found[i].update(heads=args[0])))
        hooks.append(module.register_forward_hook(lambda _, args, output: found[i].update(output=output[0])))

    for name, module in model.named_modules():
        if (layer := re.fullmatch(r"model\.layers\.(\d+)\.\w+", name)) and hasattr(module, "o_proj"):
            watch(int(layer[1]), module)
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
