"""The Triton kernels on a GPU, in the shapes and types that they are shipped for."""

from dataclasses import replace

import pytest
import torch
from gsa_cases import EVICTING, PAPER, SOFT_CLOCK, assert_same, results
from kernel_cases import HARD_CLOCK, TIED, TOLERANCE, UNTIED, WILD, both, compare, inputs

from t2r.kernels.gsa import SlotState


# Every shape of tile is compiled once for each spec and type, which takes half a minute: run with -n 16 there. Logits
# are scaled as attention scales them: 0.3 at 128 channels is a softmax so sharp that bfloat16's rounding of the memory
# alone costs 5e-3.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spec", [PAPER, HARD_CLOCK], ids=["paper", "hard_clock"])
def test_lengths_on_a_gpu(spec, dtype):
    if spec.ring:
        spec = replace(spec, ring=64)
    got, want = {}, {}
    for T in (1, 15, 63, 64, 65, 100, 1000, 2049):  # in one test: side by side each would compile the same kernels
        shape = {"T": T, "B": 2, "H": 2, "G": 4, "D": 128, "M": 64}
        mine, expected = both(spec, dtype, shape=shape, scale=128**-0.5)
        got |= {f"{T} tokens: {name}": x for name, x in mine.items()}
        want |= {f"{T} tokens: {name}": x for name, x in expected.items()}
    assert_same(got, want, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spec", [SOFT_CLOCK, EVICTING, TIED, UNTIED], ids=["soft_clock", "evicting", "tied", "untied"])
def test_specs_on_a_gpu(spec, dtype):
    compare(spec, dtype, shape={"T": 257, "B": 2, "H": 2, "G": 4, "D": 128, "M": 64}, scale=128**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [PAPER, HARD_CLOCK, EVICTING], ids=["paper", "hard_clock", "evicting"])
@pytest.mark.parametrize(
    ("G", "D", "M"),
    [(1, 64, 16), (2, 64, 32), (3, 64, 64), (8, 128, 64), (4, 80, 64), (4, 96, 128), (2, 256, 64), (4, 128, 128),
     (1, 128, 128), (2, 128, 128), (4, 128, 256), (1, 256, 256), (5, 64, 128), (6, 128, 16), (7, 128, 32), (3, 64, 32),
     (4, 64, 16)],
)  # fmt: skip
def test_sizes_on_a_gpu(spec, G, D, M):
    compare(spec, torch.bfloat16, shape={"T": 257, "B": 2, "H": 2, "G": G, "D": D, "M": M}, scale=D**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_mixed_extreme_gates_on_a_gpu(dtype):
    def change(args):
        args["gate"].copy_(WILD[torch.randint(0, 6, args["gate"].shape, generator=torch.Generator().manual_seed(5))])

    compare(
        EVICTING,
        dtype,
        change=change,
        shape={"T": 200, "D": 128, "M": 64},
        scale=128**-0.5,
        tolerance=max(5e-5, TOLERANCE[dtype]),
    )


@pytest.mark.gpu
def test_many_documents_on_a_gpu():
    lengths = torch.randint(0, 200, (40,), generator=torch.Generator().manual_seed(0))
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    compare(
        PAPER, torch.bfloat16, shape={"T": int(bounds[-1]), "documents": 40, "M": 64}, cu_seqlens=bounds, scale=0.125
    )


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [PAPER, HARD_CLOCK], ids=["paper", "hard_clock"])
def test_a_long_text_on_a_gpu(spec):
    """65,536 tokens against the PyTorch form in float64; and twice the same bits.

    Eight heads, for d write: a sum over the text of gradients of random sign, not 0 in few slots of a head only (those
    with write < 1). With one head it has four of them, and by chance small sums make a large relative error."""
    mine, moved, exact, state = inputs(spec, torch.bfloat16, T=65536, H=8, G=4, D=128, M=64)
    exact = {name: x.detach().cuda().requires_grad_() for name, x in exact.items()}
    state = SlotState(*(x.detach().cuda().requires_grad_() for x in state[:3]), *moved[3:])
    got = results(mine, moved, spec, "triton", scale=128**-0.5)
    assert_same(got, results(exact, state, spec, "torch", scale=128**-0.5), TOLERANCE[torch.bfloat16])
    again = results(mine, moved, spec, "triton", scale=128**-0.5)
    assert all(torch.equal(got[name], again[name]) for name in got)
