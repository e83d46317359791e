"""How far each layer's mixer has moved from its zero-token start: it tells a trained layer from a broken one.

An optimizer that normalises its steps moves all layers alike. A layer that something else has changed stands out in
one of its parameters at least, and in a conversion that nobody has trained any change at all does.
"""

import statistics

from t2r.modeling.attention import GSAttention

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
            before = start.get(name, known.get(f"{path}.{name}"))
            if before is not None:
                change = value.detach().float() - before.to(value.device).float()
                found.setdefault((gsa, name), {})[module.layer_idx] = change.square().mean().sqrt().item()
    return found


def trained(model, original=None) -> set[int]:
    """The layers that have moved as all layers have: out of the start, and out of proportion in no parameter."""
    layers: set[int] = set()
    alone: set[int] = set()
    for moved in movement(model, original).values():
        usual = statistics.median_low(moved.values())
        layers |= {i for i in moved if moved[i] > 0}
        alone |= {i for i in moved if moved[i] > OUTLIER * usual}
    return layers - alone
