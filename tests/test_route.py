"""Routing between the two rings: the turns against a count by hand, what the memory then is, and its gradient."""

import pytest
import torch
from gsa_cases import LONG_SLOTS, draw

from t2r.kernels.gsa import GSASpec, gsa
from t2r.kernels.gsa.documents import document_of
from t2r.kernels.gsa.route import turns

HARD = GSASpec(gate="linear", damping=512.0, ring=10, sinks=3, occupancy=True)
M = 16


def counted(route, positions, before, spec):
    """Turns of one document and head, a token at a time: (turn, other, chosen), and how many are routed then."""
    found = []
    for x, position in zip(route.tolist(), positions.tolist(), strict=True):
        chosen = x > 0 and position >= spec.sinks
        ring = spec.turn(torch.tensor(max(position - before, 0))).item()
        long = spec.ring + before % (M - spec.ring)
        found.append((long, ring, True) if chosen else (ring, long, False))
        before += chosen
    return found, before


def test_turns_are_those_counted_by_hand():
    """Rows that go on from a state, with padding, and packed documents of 0, 1 and more tokens."""
    route = torch.randn(3, 40, 2, generator=torch.Generator().manual_seed(0))
    first, before = torch.tensor([0, 7, 30]), torch.tensor([[0, 0], [4, 1], [20, 0]])
    positions = first[:, None] + torch.arange(40)
    positions[1, 10:] -= 3
    positions[1, 10:13] = -1
    bounds = torch.tensor([0, 5, 5, 6, 40])
    packed = torch.cat([torch.arange(5), torch.arange(1), 50 + torch.arange(34)])[None]
    before_packed = torch.tensor([[0, 0], [3, 2], [0, 0], [41, 5]])
    cases = [(route, positions, before, None, [(b, 0, 40) for b in range(3)])]
    cases += [(route[:1], packed, before_packed, bounds, [(0, 0, 5), (0, 5, 5), (0, 5, 6), (0, 6, 40)])]
    for given, where, start, cu_seqlens, documents in cases:
        found = turns(given, where, start, cu_seqlens, LONG_SLOTS, M)
        for n, (b, begin, end) in enumerate(documents):
            for h in range(2):
                expected, total = counted(given[b, begin:end, h], where[b, begin:end], start[n, h].item(), LONG_SLOTS)
                mine = [x[b, begin:end, h].tolist() for x in found[:3]]
                assert list(zip(*mine, strict=True)) == expected and found.routed[n, h] == total


def test_a_routed_memory_is_attention_over_sinks_and_the_last_tokens_of_each_ring():
    T, H = 90, 2
    args, _ = draw(HARD, 1, T, H, 2, 8, M, seed=3)
    args |= {"gate": torch.zeros_like(args["gate"]), "write": torch.ones(H, M).double()}
    args |= {"keep": torch.zeros(H, M).double(), "q_sink": None}
    o, _ = gsa(**args, spec=HARD, scale=0.3, backend="reference")
    chosen = (args["route"][0] > 0) & (torch.arange(T) >= HARD.sinks)[:, None]
    for h in range(H):
        rings = torch.arange(HARD.sinks, T)[~chosen[HARD.sinks :, h]], torch.arange(T)[chosen[:, h]]
        for t in (0, 2, 3, 11, 40, T - 1):
            near = [ring[ring <= t][-size:] for ring, size in zip(rings, (HARD.ring - 3, M - HARD.ring), strict=True)]
            seen = torch.cat([torch.arange(min(3, t + 1)), *near])
            for g in range(2 * h, 2 * h + 2):
                weights = torch.softmax(0.3 * args["k"][0, seen, h] @ args["q"][0, t, g], dim=0)
                torch.testing.assert_close(o[0, t, g], weights @ args["v"][0, seen, h], atol=1e-12, rtol=1e-12)


def test_the_gradient_of_route_is_that_of_a_soft_share_of_both_turns():
    T, H = 30, 2
    spec = GSASpec(gate="linear", damping=4.0, ring=10, sinks=3, occupancy=True)
    args, _ = draw(spec, 1, T, H, 2, 8, M, seed=5)
    args |= {"write": torch.ones(H, M).double(), "keep": torch.zeros(H, M).double()}
    args |= {"gate": torch.zeros_like(args["gate"])}
    weights = torch.randn(1, T, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    o, _ = gsa(**args, spec=spec, scale=0.3, backend="reference")
    (mine,) = torch.autograd.grad((o * weights).sum(), args["route"])

    positions = torch.arange(T)[None]
    found = turns(args["route"], positions, torch.zeros(1, H, dtype=torch.long), None, spec, M)
    soft = torch.sigmoid(args["route"])
    share = found.chosen + (positions >= 3)[..., None] * (soft - soft.detach())  # of the long slots
    slots = torch.arange(M)
    towards = torch.where(found.chosen, 1, -1)[..., None]
    moved = towards * ((found.turn[..., None] == slots).double() - (found.other[..., None] == slots).double())
    turned = moved * (share - share.detach())[..., None]  # zero, with the gradient of the share
    given = {**args, "gate": args["gate"] + spec.damping * turned, "route": args["route"].detach()}
    o, _ = gsa(**given, spec=spec, scale=0.3, backend="reference")
    (expected,) = torch.autograd.grad((o * weights).sum(), args["route"])
    assert (expected[:, 3:-1] != 0).all() and (mine[:, :3] == 0).all()
    torch.testing.assert_close(mine, expected, atol=1e-12, rtol=1e-9)


def test_routing_goes_through_torch_compile():
    """One graph, the values and gradients of eager mode."""
    args, _ = draw(HARD, 2, 70, 2, 2, 8, M, dtype=torch.float32, seed=8)

    def run(*tensors):
        named = dict(zip(args, tensors, strict=True))
        return gsa(**named, spec=HARD, scale=0.3, backend="torch")[0].square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for value, expected in zip(
        torch.autograd.grad(compiled(*args.values()), args.values()),
        torch.autograd.grad(run(*args.values()), args.values()),
        strict=True,
    ):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
def test_packed_documents_are_found_by_a_compiled_graph():
    """Compiled for a GPU by torch 2.11, searchsorted forgets where a view of its boundaries begins."""
    cu_seqlens = torch.tensor([0, 5, 5, 17, 40], device="cuda")
    found = torch.compile(lambda bounds: document_of(bounds, 40))(cu_seqlens)
    assert found.tolist() == 5 * [0] + 12 * [2] + 23 * [3]
