"""Specs, random arguments and the comparison that the tests of the GSA op and of its kernels share."""

import torch
from torch.nn.functional import logsigmoid

from t2r.kernels.gsa import GSASpec, SlotState, gsa

PAPER = GSASpec(gate="sigmoid", damping=8.0, feature_map="silu")
SOFT_CLOCK = GSASpec(gate="sigmoid", damping=8.0, ring=12, sinks=2, occupancy=True)
LONG_SLOTS = GSASpec(gate="linear", damping=4.0, ring=10, sinks=3, occupancy=True)
UNTIED = GSASpec(gate="log_alpha", occupancy=True)
SPECS = {"paper": PAPER, "soft_clock": SOFT_CLOCK, "long_slots": LONG_SLOTS, "untied": UNTIED}


def draw(spec, B, T, H, G, D, M, dtype=torch.float64, documents=None, seed=0):
    """Random arguments of gsa() that use everything `spec` allows, as leaves that require grad."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    N = documents or B
    args = {"q": randn(B, T, H * G, D), "k": randn(B, T, H, D), "v": randn(B, T, H, D), "gate": 2 * randn(B, T, H, M)}
    if spec.gate == "log_alpha":
        args["gate"] = logsigmoid(args["gate"])
        args["s"] = torch.rand(B, T, H, M, generator=generator, dtype=dtype)
    if spec.ring and spec.gate == "sigmoid":
        args |= {"write": -4 + randn(H, M), "keep": 4 + randn(H, M)}
    elif spec.ring:
        args |= {"write": 1 + 0.3 * randn(H, M), "keep": 0.3 * randn(H, M)}
    if spec.sinks:
        args["q_sink"] = randn(B, T, H * G, D)
    occupancy = torch.rand(N, H, M, generator=generator, dtype=dtype)
    # a slot of occupancy z holds z times a mean of keys: without the factor K / z would have no bound
    state = [occupancy[..., None] * randn(N, H, M, D), occupancy[..., None] * randn(N, H, M, D), occupancy]
    args = {name: x.requires_grad_() for name, x in args.items()}
    position = torch.randint(0, 50, (N,), generator=generator)
    return args, SlotState(*(x.requires_grad_() for x in state), position)


def results(args, state, spec, backend, scale=0.3, **kwargs):
    """Output, final state and every gradient of a random functional of both, by name."""
    o, final = gsa(
        **args, spec=spec, scale=scale, initial_state=state, output_final_state=True, backend=backend, **kwargs
    )
    out = {"o": o, **{f"final.{name}": x for name, x in final._asdict().items()}}
    leaves = {**args, **{f"initial.{name}": x for name, x in list(state._asdict().items())[:3]}}
    generator = torch.Generator().manual_seed(7)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
        for x in out.values()
        if x.is_floating_point()
    )
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    # an input that never reached the result (a slot's state under the first token of an overwritten slot) counts as 0
    zeros = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves.values(), strict=True))
    return out | {f"d {name}": g for name, g in zip(leaves, zeros, strict=True)}


def assert_same(actual: dict, expected: dict, tolerance: float):
    """Relative RMS error of every entry; absolute where the expected norm is under 1e-6."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        have, want = actual[name].double(), want.double()
        assert torch.isfinite(have).all(), f"{name} is not finite"
        norm = want.norm()
        error = (have - want).norm() / (norm if norm > 1e-6 else 1.0)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"
