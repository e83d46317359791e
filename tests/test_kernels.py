"""The Triton kernels against the float64 recurrence: in Triton's interpreter without a GPU, on the GPU with one."""

import subprocess
import sys
import warnings

import pytest
import torch
from gsa_cases import EVICTING, PAPER, PER_HEAD, SOFT_CLOCK, assert_same, results
from kernel_cases import DEVICE, HARD_CLOCK, SPECS, TIED, UNTIED, WILD, compare, inputs
from torch.utils.checkpoint import checkpoint

from t2r.kernels.gsa import SlotState, chunk_gsa, fused, gsa, launch
from t2r.kernels.gsa.documents import chunk_table


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("shape", [{"T": 1}, {"T": 33, "G": 3}, {"T": 100, "H": 2, "G": 1}], ids=str)
def test_kernels_equal_the_recurrence(spec, shape):
    compare(spec, shape=shape)


@pytest.mark.parametrize("spec", [PAPER, EVICTING], ids=["paper", "evicting"])
def test_half_precision(spec):
    compare(spec, torch.float16)


@pytest.mark.parametrize("spec", [PAPER, EVICTING, HARD_CLOCK], ids=["paper", "evicting", "hard_clock"])
def test_bfloat16(spec):
    compare(spec, torch.bfloat16, shape={"T": 129, "G": 3, "M": 64}, scale=64**-0.5)


def test_packed_documents_in_bfloat16():
    bounds = torch.tensor([0, 1, 1, 33, 75, 90])
    shape = {"T": 90, "documents": 5, "M": 64}
    compare(PAPER, torch.bfloat16, shape=shape, cu_seqlens=bounds, scale=64**-0.5)


@pytest.mark.parametrize("shape", [{"D": 80, "M": 32}, {"D": 128, "M": 64, "T": 40}], ids=str)
def test_other_sizes(shape):
    compare(SOFT_CLOCK, shape=shape)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_tiles_of_several_query_heads(heads, monkeypatch):
    """G = 3 heads one by one, in two tiles, and in one with a row to spare."""
    tile = launch.tile_for(64, 16, 3, torch.float32)._replace(heads=heads)
    monkeypatch.setattr(launch, "tile_for", lambda *args: tile)
    compare(EVICTING, shape={"G": 3, "T": 40})


@pytest.mark.parametrize("spec", [PAPER, EVICTING], ids=["paper", "evicting"])
def test_packed_documents(spec):
    """Documents of 0, 1, 32 and more tokens in one row, each with a memory of its own."""
    bounds = torch.tensor([0, 1, 1, 33, 75, 90])
    compare(spec, shape={"T": 90, "documents": 5}, cu_seqlens=bounds)


@pytest.mark.parametrize("packed", [False, True])
def test_parts_of_the_backward_pass(packed, monkeypatch):
    """Rows and heads one after the other in the same scratch: the same bits as all at once."""
    shape = {"T": 34, "B": 1 if packed else 2, "H": 2, "G": 2, "documents": 3 if packed else 2}
    kwargs = {"cu_seqlens": torch.tensor([0, 1, 1, 34]).to(DEVICE)} if packed else {}
    mine, moved, _, _ = inputs(EVICTING, **shape)
    whole = results(mine, moved, EVICTING, "triton", **kwargs)
    monkeypatch.setattr(launch, "SCRATCH", 0)
    chunks = launch.cdiv(34, launch.tile_for(64, 16, 2, torch.float32).chunk) if not packed else 34 // 16 + 3
    for room, count in ((chunks, 2 if packed else 4), (2 * chunks, 1 if packed else 2)):
        monkeypatch.setattr(launch, "PROGRAMS", room)
        assert len(launch.parts(shape["B"], 2, chunks, 1)) == count
        again = results(mine, moved, EVICTING, "triton", **kwargs)
        assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("spec", [PAPER, EVICTING], ids=["paper", "evicting"])
@pytest.mark.parametrize(
    "shape",
    [{"T": 70, "D": 80}, {"T": 64, "B": 2, "H": 2}, {"T": 90, "documents": 5, "bounds": (0, 1, 1, 33, 75, 90)}],
    ids=str,
)
def test_the_memory_by_two_kernels(spec, shape, monkeypatch):
    """As for a long text that is alone."""
    monkeypatch.setattr(launch, "LONG", 0)
    bounds = shape.get("bounds")
    kwargs = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    compare(spec, shape={name: x for name, x in shape.items() if name != "bounds"}, **kwargs)


def test_chunk_table_needs_no_host():
    bounds = torch.tensor([0, 1, 1, 33, 75, 90])
    table, first = chunk_table(bounds, 90, 32)
    used = [row for row in table.tolist() if row[1]]
    assert used == [[0, 1], [1, 32], [33, 32], [65, 10], [75, 15]]
    assert first.tolist() == [0, 1, 1, 2, 4, 5] and len(table) == 90 // 32 + 5


@pytest.mark.parametrize("spec", [PAPER, SOFT_CLOCK], ids=["paper", "soft_clock"])
def test_padding(spec):
    real = torch.ones(1, 60, dtype=torch.bool)
    real[0, [*range(5), *range(30, 34), 59]] = False
    positions = torch.where(real, real.cumsum(1) - 1, -1)
    compare(spec, shape={"T": 60}, positions=positions)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_mixed_extreme_gates(spec):
    """Hard overwrites next to slow and closed gates, at every token another mix."""

    def change(args):
        picked = WILD[torch.randint(0, 6, args["gate"].shape, generator=torch.Generator().manual_seed(5))]
        args["gate"].copy_(picked.clamp(max=0) / 8 if spec.gate == "log_alpha" else picked)

    compare(spec, change=change, tolerance=5e-5)


@pytest.mark.parametrize("spec", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("gate", [(-50.0, 0.0), (0.0, -7.0), (0.0, -1e-6), (0.0, 0.0)], ids=str)
def test_extreme_gates(spec, gate):
    """Log alpha a + b |randn|: all forget, tau = 0.1, slow, all keep. At 0 nothing is ever written, at -50 every token
    overwrites all: finite and right either way."""
    a, b = gate
    compare(spec, change=lambda args: args["gate"].abs_().mul_(b).add_(a), shape={"T": 40})


def test_hard_ring_at_its_start():
    """The exact start: gate logits are 0, a write is exactly 1 and keeps exactly nothing. The gates' gradient is that
    of what the overwrite cut off, which no division by alpha = 0 can give."""

    def change(args):
        args["gate"].zero_()
        args["write"].fill_(1.0)
        args["keep"].zero_()

    compare(HARD_CLOCK, change=change, shape={"T": 50})


@pytest.mark.parametrize("hard", [False, True])
def test_causality(hard):
    """Changing a token changes no bit before it, also when its gate is hard and the tile takes another path."""
    mine, moved, _, _ = inputs(TIED, T=60)
    with torch.no_grad():
        before, _ = gsa(**mine, spec=TIED, scale=0.3, initial_state=moved, backend="triton")
        for x in mine.values():
            x[:, 45] += 1.0
        mine["gate"][:, 45] = -50.0 if hard else -0.1
        after, _ = gsa(**mine, spec=TIED, scale=0.3, initial_state=moved, backend="triton")
    assert torch.equal(before[:, :45], after[:, :45]) and not torch.equal(before[:, 45:], after[:, 45:])


def test_strides_of_the_inputs():
    """Heads first in memory, every second channel: the same numbers."""
    mine, _, _, _ = inputs(TIED, H=2)
    plain, _ = gsa(**mine, spec=TIED, scale=0.3, backend="triton")
    q = mine["q"].transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.stack([mine["k"], mine["k"]], dim=-1).flatten(-2)[..., ::2]
    gate = mine["gate"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(x.is_contiguous() for x in (q, k, gate))
    strided, _ = gsa(q, k, mine["v"], gate, spec=TIED, scale=0.3, backend="triton")
    assert torch.equal(plain, strided)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(
    "shape",
    [{"G": 3}, {"G": 1}, {"G": 8}, {"G": 3, "M": 32}, {"G": 4, "D": 128, "M": 64}, {"G": 2, "M": 128}],
    ids=str,
)
def test_decode(spec, shape):
    """Token by token in place: outputs and memory of the recurrence; padding changes nothing."""
    mine, moved, exact, state = inputs(spec, T=5, B=3, H=2, **shape)
    moved = SlotState(*(x.detach().clone() for x in moved))
    addresses = [x.data_ptr() for x in moved]
    positions = torch.stack([moved.position + t for t in range(5)], dim=1)
    positions[1, 2:] = -1
    for t in range(5):
        part = {"spec": spec, "scale": 0.3, "output_final_state": True, "positions": positions[:, t : t + 1]}
        with torch.no_grad():
            cut = {name: x if name in PER_HEAD else x[:, t : t + 1] for name, x in mine.items()}
            o, moved = gsa(**cut, **part, initial_state=moved, overwrite_state=True, backend="triton")
            cut = {name: x if name in PER_HEAD else x[:, t : t + 1] for name, x in exact.items()}
            part["positions"] = part["positions"].cpu()
            want, state = gsa(**cut, **part, initial_state=state, backend="reference")
        assert_same({"o": o.cpu()}, {"o": want}, 2e-5)
    assert_same(moved._asdict(), state._asdict(), 2e-5)
    assert [x.data_ptr() for x in moved] == addresses


def test_decode_leaves_a_given_state_alone():
    mine, moved, _, _ = inputs(PAPER, T=1)
    copies = [x.detach().clone() for x in moved]
    with torch.no_grad():
        gsa(**mine, spec=PAPER, scale=0.3, initial_state=moved, output_final_state=True, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(copies, moved, strict=True))


def test_decode_counts_its_own_positions():
    """Without positions the token is the document's next, for the clock too, also where the position is overwritten."""
    mine, moved, exact, state = inputs(SOFT_CLOCK, T=1, B=3, H=2)
    with torch.no_grad():
        kwargs = {"spec": SOFT_CLOCK, "scale": 0.3, "output_final_state": True, "overwrite_state": True}
        moved = SlotState(*(x.detach().clone() for x in moved))
        o, after = gsa(**mine, **kwargs, initial_state=moved, backend="triton")
        want, expected = gsa(**exact, **kwargs, initial_state=state, backend="reference")
    assert_same({"o": o.cpu()} | after._asdict(), {"o": want} | expected._asdict(), 2e-5)
    assert torch.equal(after.position.cpu(), state.position + 1) and after.position is moved.position


def test_operators_are_sound():
    """torch's own checks of an operator: schema, fake tensors, autograd registration."""
    mine, moved, _, _ = inputs(SOFT_CLOCK, T=20)
    positions = torch.arange(20, device=DEVICE)[None]
    args = [mine[x] for x in "qkv"] + [mine["gate"], None, mine["write"], mine["keep"], mine["q_sink"], None, positions]
    args += [None, *moved[:3], *fused.spelled(SOFT_CLOCK, 0.3), True]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.t2r.gsa_forward, tuple(args), test_utils=checks)


def test_compile_and_checkpoint(monkeypatch):
    """One graph through torch.compile, forward and backward; activation checkpointing gives the same gradients."""
    mine, _, _, _ = inputs(PAPER, T=40)
    names = list(mine)

    def run(*tensors):
        o, _ = gsa(**dict(zip(names, tensors, strict=True)), spec=PAPER, scale=0.3, backend="triton")
        return o.square().sum()

    plain = torch.autograd.grad(run(*mine.values()), list(mine.values()))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(torch._dynamo.utils, "warn_once_cache", set())  # what another test was warned of counts, too
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache")  # every run would begin with it
        compiled(*mine.values())
    for form in (compiled, lambda *x: checkpoint(run, *x, use_reentrant=False)):
        for got, want in zip(torch.autograd.grad(form(*mine.values()), list(mine.values())), plain, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_peers_door():
    """chunk_gsa through the kernels: the same as through the PyTorch form."""
    mine, moved, _, _ = inputs(UNTIED, H=2)
    state = (moved.keys.mT, None)
    got, want = (
        chunk_gsa(
            *(mine[x] for x in "qkv"), mine["s"], mine["gate"], None, state, True, cu_seqlens=None, backend=backend
        )
        for backend in ("triton", "torch")
    )
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    for mine_, theirs in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(mine_, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"D": 8}, "head dims 8"), ({"M": 24}, "24 slots"), ({"G": 9}, "9 query heads"),
        ({"dtype": torch.float64}, "inputs of torch.float64"),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_kernels_do_not_take_is_named(change, reason):
    mine, _, _, _ = inputs(PAPER, **change)
    with pytest.raises(ValueError, match=reason):
        gsa(**mine, spec=PAPER, scale=1.0, backend="triton")
    assert gsa(**mine, spec=PAPER, scale=1.0, backend="auto")[0].isfinite().all()


def test_a_memory_larger_than_a_block_of_threads_is_refused():
    assert launch.tile_for(256, 256, 4, torch.bfloat16) is not None
    assert launch.tile_for(256, 256, 4, torch.float32) is None
    assert launch.tile_for(128, 128, 4, torch.bfloat16, shared=101_376) is None  # sm_89


SMALL_FUNCTIONS = """
import torch, triton, triton.language as tl
from t2r.kernels.gsa.functions import expm1, log, log1p, sigmoid

@triton.jit
def kernel(x, y, N: tl.constexpr, which: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    if which == 0:
        value = expm1(value)
    elif which == 1:
        value = log1p(value)
    elif which == 2:
        value = sigmoid(value)
    else:
        value = log(value)
    tl.store(y + at, value)

for which, exact in enumerate((torch.expm1, torch.log1p, torch.sigmoid, torch.log)):
    signs = -1 if which < 2 else 1
    below = signs * torch.logspace(-12, 2 if which == 0 else -1e-3, 2048)
    x = torch.cat([below, torch.logspace(-12, 0, 2048) * (which > 0)])
    x, y = x.float().to(DEVICE), torch.full((4096,), float("nan"), device=DEVICE)
    kernel[(1,)](x, y, 4096, which)
    want = exact(x.double())
    error = ((y.double() - want) / torch.where(want == 0, 1.0, want)).abs().max().item()
    assert error < (4e-7, 5e-7, 4e-7, 4e-7)[which], (which, error)
"""


def test_small_functions_against_float64(tmp_path):
    """expm1, log1p, log and sigmoid written out for the kernels have float32 precision, also near 0."""
    script = tmp_path / "small.py"  # triton.jit reads a function's source from its file
    script.write_text(SMALL_FUNCTIONS.replace("DEVICE", repr(DEVICE)))
    subprocess.run([sys.executable, script], check=True)
