"""Specs, random arguments and the comparison that the tests of the GSA op and of its kernels share."""

import torch
from torch.nn.functional import logsigmoid

from t2r.kernels.gsa import GSASpec, SlotState, gsa

PAPER = GSASpec(gate="sigmoid", damping=8.0, feature_map="silu")
SOFT_CLOCK = GSASpec(gate="sigmoid", damping=8.0, ring=12, sinks=2, occupancy=True)
EVICTING = GSASpec(gate="linear", damping=4.0, ring=10, sinks=3, occupancy=True)
UNTIED = GSASpec(gate="log_alpha", occupancy=True)
PER_HEAD = ("write", "keep", "recent")  # arguments without a time axis
SPECS = {"paper": PAPER, "soft_clock": SOFT_CLOCK, "evicting": EVICTING, "untied": UNTIED}


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
    ranks = SlotState.empty(N, H, M, D, D, "cpu", dtype, ranked=spec == EVICTING)[4:]
    if spec == EVICTING:
        args |= {
            "bonus": 20 * randn(B, T, H),
            "recent": torch.randint(1, spec.ring - spec.sinks + 1, (H,), generator=generator).to(dtype),
        }
        ranks[1].copy_(torch.randint(0, 50, (N, H, M), generator=generator).clamp(max=position[:, None, None] - 1))
        ranks[0].copy_(ranks[1] + 20 * torch.randn(N, H, M, generator=generator))
        ranks[0][..., spec.ring - 2 :] = -torch.inf
    return args, SlotState(*(x.requires_grad_() for x in state), position, *ranks)


def results(args, state, spec, backend, scale=0.3, **kwargs):
    """Output, final state and every gradient of a random functional of both, by name."""
    o, final = gsa(
        **args, spec=spec, scale=scale, initial_state=state, output_final_state=True, backend=backend, **kwargs
    )
    out = {"o": o, **{f"final.{name}": x for name, x in final._asdict().items()}}
    leaves = {name: x for name, x in args.items() if name not in ("bonus", "recent")}  # a choice has no gradient
    leaves |= {f"initial.{name}": x for name, x in list(state._asdict().items())[:3]}
    generator = torch.Generator().manual_seed(7)
    # gradients of the outputs that all types hold exactly: the reference must be given what is given to the kernels
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).bfloat16().to(x)).sum()
        for x in out.values()
        if x.is_floating_point()
    )
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    # an input that never reached the result (a slot's state under the first token of an overwritten slot) counts as 0
    zeros = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves.values(), strict=True))
    return out | {f"d {name}": g for name, g in zip(leaves, zeros, strict=True)}


def assert_same(actual: dict, expected: dict, tolerance: float):
    """Relative RMS error of every entry; absolute where the expected norm is under 1e-6. A failure names all entries,
    the worst first."""
    assert actual.keys() == expected.keys()
    errors = {}
    for name, want in expected.items():
        # the rank of an empty slot is -inf, of which there is no difference
        have, want = (x.cpu().double() for x in (actual[name], want))
        have, want = (torch.where(torch.isneginf(x), -100.0, x) for x in (have, want))
        norm = want.norm()
        error = ((have - want).norm() / (norm if norm > 1e-6 else 1.0)).item()
        errors[name] = error if torch.isfinite(have).all() else torch.inf  # NaN would have no place in an order
    worst = sorted(errors.items(), key=lambda entry: -entry[1])
    listed = ", ".join(f"{name} {error:.1e}" for name, error in worst)
    assert worst[0][1] <= tolerance, f"relative errors over {tolerance:.0e}: {listed}"
