"""How far each layer's mixer has moved from its zero-token start: it tells a trained layer from a broken one.

An optimizer that normalises its steps moves all layers alike. A layer that something else has changed stands out in
one of its parameters at least, and in a conversion that nobody has trained any change at all does.
"""

import math
import re
import statistics
from collections.abc import Iterable

from t2r.convert import all_finite
from t2r.modeling.attention import GSAttention

LAYER = re.compile(r"\blayers\.(\d+)\.")
OUTLIER = 4.0  # times the median over layers; layers of trained SmolLM2-135M lie within 1.9


def movement(model, original=None) -> dict[tuple[bool, str], dict[int, float]]:
    """(whether a mixer is GSA, its parameter) -> layer -> RMS of the parameter's distance from the start.

    The start is the original's own value, or what GSA begins its new parameters with; without the original only the
    latter are known.
    """
    known = dict(original.named_parameters()) if original is not None else {}
    found: dict[tuple[bool, str], dict[int, float]] = {}
    for path, module in model.named_modules():
        if not hasattr(module, "o_proj"):
            continue
        gsa = isinstance(module, GSAttention)
        start = module.new_tensors() if gsa else {}
        for name, value in module.named_parameters():
            if name.startswith("bonus.") or name == "recent":  # fitted at conversion: its start is not known
                continue
            before = start.get(name, known.get(f"{path}.{name}"))
            if before is not None:
                change = value.detach().float() - before.to(value.device).float()
                found.setdefault((gsa, name), {})[module.layer_idx] = change.square().mean().sqrt().item()
    return found


def median(values: Iterable[float]) -> float:
    """The lower median of those that are finite; 0 where none is."""
    return statistics.median_low([value for value in values if math.isfinite(value)] or [0.0])


def damaged_weights(model) -> list[str]:
    """A line for each weight with numbers that are not finite."""
    names = [name for name, weight in model.named_parameters() if not all_finite(weight.detach())]
    where = [f"layer {found[1]}" if (found := LAYER.search(name)) else "the model" for name in names]
    return [f"{place} is damaged: {name} is not finite" for place, name in zip(where, names, strict=True)]


def trained(model, original=None) -> set[int]:
    """The layers that have moved as all layers have: out of the start, and out of proportion in no parameter."""
    layers: set[int] = set()
    alone: set[int] = set()
    for moved in movement(model, original).values():
        usual = median(moved.values())
        layers |= {i for i in moved if moved[i] > 0}
        alone |= {i for i in moved if not moved[i] <= OUTLIER * usual}
    return layers - alone
