"""Eviction by score: the slots against a simulation by lists, what the memory then is, and both kernels of it."""

import pytest
import torch
from gsa_cases import PER_HEAD, draw

from t2r.kernels.gsa import GSASpec, SlotState, gsa
from t2r.kernels.gsa.documents import document_of
from t2r.kernels.gsa.evict import evict, one_by_one
from t2r.kernels.gsa.turns import launch

HARD = GSASpec(gate="linear", damping=512.0, ring=10, sinks=3, occupancy=True)
RING, SINKS, M = 10, 3, 12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton kernels run, or are interpreted


def simulated(bonus, positions, recent, rank, stamp):
    """Slots of one document and head by the words of evict.py; rank, stamp: lists, changed in place."""
    found = []
    for x, position in zip(bonus.tolist(), positions.tolist(), strict=True):
        slot = None
        if 0 <= position < SINKS:
            slot = position
        elif position >= 0:
            empty = [m for m in range(SINKS, RING) if rank[m] == -torch.inf]
            old = [m for m in range(SINKS, RING) if position - stamp[m] >= recent]
            slot = empty[0] if empty else min(old, key=lambda m: rank[m])
        if slot is not None:
            rank[slot], stamp[slot] = position + x, position
        found.append(slot)
    return found


def cases():
    """(bonus, positions, cu_seqlens, documents as (row, begin, end)): rows that go on from a state, with padding, and
    packed documents of 0, 1 and more tokens."""
    bonus = 30 * torch.randn(3, 60, 2, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 7, 30])[:, None] + torch.arange(60)
    positions[1, 10:] -= 3
    positions[1, 10:13] = -1
    yield bonus, positions, None, [(b, 0, 60) for b in range(3)]
    packed = torch.cat([torch.arange(5), torch.arange(1), 50 + torch.arange(54)])[None]
    yield bonus[:1], packed, torch.tensor([0, 5, 5, 6, 60]), [(0, 0, 5), (0, 5, 5), (0, 5, 6), (0, 6, 60)]


def memories(documents, positions):
    """A state before each document: as many slots filled as the first token has others before it."""
    state = SlotState.empty(len(documents), 2, M, 8, 8, "cpu", ranked=True)
    generator = torch.Generator().manual_seed(1)
    for n, (b, begin, end) in enumerate(documents):
        first = positions[b, begin].item() if end > begin else 0
        filled = min(first, RING)
        state.stamp[n, :, :filled] = torch.arange(first - filled, first, dtype=torch.int32)
        state.rank[n, :, :filled] = state.stamp[n, :, :filled] + 30 * torch.randn(2, filled, generator=generator)
    return state


@pytest.mark.parametrize("kernel", [False, True], ids=["numpy", "triton"])
def test_slots_are_those_of_a_simulation(kernel):
    recent = torch.tensor([2, 6], dtype=torch.int32)
    for bonus, positions, cu_seqlens, documents in cases():
        state = memories(documents, positions)
        rank, stamp = state.rank.clone(), state.stamp.clone()
        if kernel:
            given = (bonus, recent, positions, cu_seqlens, rank, stamp)
            given = [x if x is None else x.to(DEVICE) for x in given]
            turn, rank, stamp = (x.cpu() for x in (launch(*given, RING, SINKS), *given[4:]))
        else:
            turn = one_by_one(bonus, recent, positions, cu_seqlens, rank, stamp, RING, SINKS)
        for n, (b, begin, end) in enumerate(documents):
            for h in range(2):
                held, ages = state.rank[n, h].tolist(), state.stamp[n, h].tolist()
                expected = simulated(bonus[b, begin:end, h], positions[b, begin:end], recent[h].item(), held, ages)
                mine = turn[b, begin:end, h].tolist()
                real = [m is not None for m in expected]
                assert [m for m, r in zip(mine, real, strict=True) if r] == [m for m in expected if m is not None]
                assert all(0 <= m < M for m in mine)
                torch.testing.assert_close(rank[n, h], torch.tensor(held))
                assert stamp[n, h].tolist() == ages


@pytest.mark.parametrize(("ring", "sinks", "slots"), [(10, 3, 12), (64, 4, 64), (32, 0, 32)], ids=str)
def test_the_kernel_takes_the_first_of_equal_ranks(ring, sinks, slots):
    """As numpy does: whole bonuses, of which many make equal ranks; more tokens than the kernel loads at once."""
    generator = torch.Generator().manual_seed(2)
    bonus = torch.randint(-8, 9, (2, 150, 3), generator=generator).to(torch.bfloat16)
    positions = torch.tensor([0, 40])[:, None] + torch.arange(150)
    positions[1, 70:75] = -1
    recent = torch.tensor([1.0, (ring - sinks) // 2, ring - sinks])
    _, _, _, _, rank, stamp = SlotState.empty(2, 3, slots, 8, 8, "cpu", ranked=True)
    stamp[1, :, :ring] = torch.arange(40 - ring, 40)
    rank[1, :, :ring] = torch.randint(20, 30, (3, ring), generator=generator).float()
    moved = [x.to(DEVICE, copy=True) for x in (rank, stamp)]
    given = (x.to(DEVICE) for x in (bonus, recent, positions))
    turns = launch(*given, None, *moved, ring, sinks).cpu()
    expected = one_by_one(bonus, recent, positions, None, rank, stamp, ring, sinks)
    real = positions >= 0
    assert torch.equal(turns[real], expected[real])
    assert torch.equal(moved[0].cpu(), rank) and torch.equal(moved[1].cpu(), stamp)


def test_without_a_bonus_it_is_the_clock():
    positions = torch.arange(50)[None]
    state = SlotState.empty(1, 2, M, 8, 8, "cpu", ranked=True)
    turn, rank, stamp = evict(
        torch.zeros(1, 50, 2), torch.tensor([1.0, 7.0]), positions, None, *state[4:], RING, SINKS
    )  # fmt: skip
    assert (turn == HARD.turn(positions)[..., None]).all()
    assert (rank[..., :RING] == stamp[..., :RING]).all() and (rank[..., RING:] == -torch.inf).all()


def test_the_memory_is_attention_over_the_tokens_that_were_kept():
    """From one call, and from two with a state between them."""
    T, H = 90, 2
    args, _ = draw(HARD, 1, T, H, 2, 8, M, seed=3)
    bonus, recent = 30 * torch.randn(1, T, H, generator=torch.Generator().manual_seed(4)), torch.tensor([2, 6])
    args |= {"gate": torch.zeros_like(args["gate"]), "write": torch.ones(H, M).double(), "bonus": bonus}
    args |= {"keep": torch.zeros(H, M).double(), "q_sink": None, "recent": recent}
    o, final = gsa(**args, spec=HARD, scale=0.3, backend="reference", output_final_state=True)
    for backend in ("reference", "torch"):
        state, parts = None, []
        for part in (slice(0, 37), slice(37, 38), slice(38, T)):
            some = {name: x if x is None or name in PER_HEAD else x[:, part] for name, x in args.items()}
            out, state = gsa(
                **some, spec=HARD, scale=0.3, backend=backend, initial_state=state, output_final_state=True
            )
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), o, atol=1e-12, rtol=1e-10)
        assert torch.equal(state.rank, final.rank) and torch.equal(state.stamp, final.stamp)
    for h in range(H):
        held, ages = [-torch.inf] * M, [0] * M
        slots = simulated(bonus[0, :, h], torch.arange(T), recent[h].item(), held, ages)
        for t in (0, 2, 3, 11, 40, T - 1):
            seen = torch.tensor(sorted({m: j for j, m in enumerate(slots[: t + 1])}.values()))
            assert seen[-1] == t and (t < RING or seen[-recent[h] :].tolist() == [*range(t - recent[h] + 1, t + 1)])
            for g in range(2 * h, 2 * h + 2):
                weights = torch.softmax(0.3 * args["k"][0, seen, h] @ args["q"][0, t, g], dim=0)
                torch.testing.assert_close(o[0, t, g], weights @ args["v"][0, seen, h], atol=1e-12, rtol=1e-12)


def test_eviction_goes_through_torch_compile():
    """One graph, the values and gradients of eager mode."""
    args, _ = draw(HARD, 2, 70, 2, 2, 8, M, dtype=torch.float32, seed=8)
    given = list(args.values())
    bonus, recent = torch.randn(2, 70, 2), torch.tensor([2.0, 5.0])

    def run(*tensors):
        named = dict(zip(args, tensors, strict=True))
        return gsa(**named, bonus=bonus, recent=recent, spec=HARD, scale=0.3, backend="torch")[0].square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for value, expected in zip(
        torch.autograd.grad(compiled(*given), given), torch.autograd.grad(run(*given), given), strict=True
    ):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
def test_packed_documents_are_found_by_a_compiled_graph():
    """Compiled for a GPU by torch 2.11, searchsorted forgets where a view of its boundaries begins."""
    cu_seqlens = torch.tensor([0, 5, 5, 17, 40], device="cuda")
    found = torch.compile(lambda bounds: document_of(bounds, 40))(cu_seqlens)
    assert found.tolist() == 5 * [0] + 12 * [2] + 23 * [3]
