"""What the tests of the Triton kernels share: their inputs, and how their results are compared with the recurrence."""

import torch
from gsa_cases import EVICTING, PAPER, SOFT_CLOCK, assert_same, draw, results
from interpreter import mend_bfloat16

from t2r.kernels.gsa import GSASpec, SlotState

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    mend_bfloat16()
TIED = GSASpec(gate="log_alpha", occupancy=True)
UNTIED = GSASpec(gate="log_alpha")
HARD_CLOCK = GSASpec(gate="linear", damping=512.0, ring=16, sinks=4, occupancy=True)
SPECS = {"paper": PAPER, "soft_clock": SOFT_CLOCK, "evicting": EVICTING, "tied": TIED, "untied": UNTIED}
WILD = torch.tensor([-400.0, -50.0, -1.0, 0.0, 1.0, 400.0], dtype=torch.float64)
# of the issue: relative RMS error of outputs, states and every gradient
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def inputs(spec, dtype=torch.float32, **shape):
    """float64 arguments, and the same numbers as the kernels get them: rows in `dtype`, the rest in float32."""
    args, state = draw(spec, **{"B": 1, "H": 1, "G": 2, "D": 64, "M": 16, "T": 70} | shape)
    if not spec.gate == "log_alpha" or spec.occupancy:
        args.pop("s", None)
    rows = {name: x.detach().to(dtype) if name[0] in "qkv" else x.detach().float() for name, x in args.items()}
    mine = {name: x.to(DEVICE).requires_grad_() for name, x in rows.items()}
    exact = {name: x.double().requires_grad_() for name, x in rows.items()}
    state = [x.detach().float().to(DEVICE) for x in state[:3]] + [x.to(DEVICE) for x in state[3:]]
    moved = SlotState(*(x.requires_grad_() for x in state[:3]), *state[3:])
    state = SlotState(*(x.detach().cpu().double().requires_grad_() for x in moved[:3]), *(x.cpu() for x in state[3:]))
    return mine, moved, exact, state


def both(spec, dtype=torch.float32, change=None, shape=None, **kwargs):
    """Results of the kernels and what they must be: by the recurrence, or for more than 300 tokens, of which it takes
    minutes, by the PyTorch form in float64, which test_gsa.py holds to 1e-12 of it."""
    mine, moved, exact, state = inputs(spec, dtype, **(shape or {}))
    if change is not None:
        with torch.no_grad():
            change(exact)
            for name, x in exact.items():
                mine[name].copy_(x)
    long = exact["q"].shape[1] > 300
    expected = results(exact, state, spec, "torch" if long else "reference", **kwargs)
    kwargs = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
    return {name: x.cpu() for name, x in results(mine, moved, spec, "triton", **kwargs).items()}, expected


def compare(spec, dtype=torch.float32, tolerance=None, **kwargs):
    assert_same(*both(spec, dtype, **kwargs), tolerance or TOLERANCE[dtype])
