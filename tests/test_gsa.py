"""The GSA op: recurrence, chunked form and step driven against each other, and against what they must equal."""

import pytest
import torch
from gsa_cases import EVICTING, PAPER, PER_HEAD, SOFT_CLOCK, SPECS, UNTIED, assert_same, draw, results
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid, scaled_dot_product_attention, silu

from t2r.kernels.gsa import GSASpec, SlotState, chunk_gsa, chunked, gsa
from t2r.kernels.gsa.spec import EMPTY

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("T", "G", "M"), [(1, 1, 16), (63, 3, 16), (65, 4, 16), (100, 1, 64), (257, 3, 128)])
def test_chunked_equals_recurrence(spec, T, G, M, dtype):
    args, state = draw(spec, B=2, T=T, H=2, G=G, D=8, M=M)
    expected = results(args, state, spec, "reference")
    args, state = draw(spec, B=2, T=T, H=2, G=G, D=8, M=M, dtype=torch.float64)
    cast = {name: x.detach().to(dtype).requires_grad_() for name, x in args.items()}
    state = SlotState(*(x.detach().to(dtype).requires_grad_() for x in state[:3]), *state[3:])
    assert_same(results(cast, state, spec, "torch"), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("bounds", [[0, 150], [0, 1, 1, 64, 150], [0, 15, 79, 143, 150]], ids=str)
@pytest.mark.parametrize("in_flight", [64, 2048])
def test_packed_documents(spec, bounds, in_flight, monkeypatch):
    """Packed in one row = recurrence per document = each document alone, states and gradients included; in one lane,
    and in several that are read segment by segment."""
    monkeypatch.setattr("t2r.kernels.gsa.chunked.SEGMENT", in_flight)
    cu_seqlens, N = torch.tensor(bounds), len(bounds) - 1
    args, state = draw(spec, B=1, T=150, H=2, G=3, D=8, M=16, documents=N)
    packed = results(args, state, spec, "torch", cu_seqlens=cu_seqlens)
    assert_same(packed, results(args, state, spec, "reference", cu_seqlens=cu_seqlens), 1e-12)
    for n in range(N):
        if bounds[n] == bounds[n + 1]:
            assert torch.equal(packed["final.keys"][n], state.keys[n])
            continue
        alone = {k: x if k in PER_HEAD else x[:, bounds[n] : bounds[n + 1]] for k, x in args.items()}
        one = SlotState(*(x[n : n + 1] for x in state))
        o, final = gsa(**alone, spec=spec, scale=0.3, initial_state=one, output_final_state=True)
        torch.testing.assert_close(packed["o"][:, bounds[n] : bounds[n + 1]], o, rtol=1e-12, atol=1e-12)
        assert packed["final.position"][n] == final.position[0]


def test_documents_are_dealt_once_for_all_layers(monkeypatch):
    """The layout of packed documents, which costs a host read, is worked out anew only for new or changed bounds."""
    dealt, deal = [], chunked.deal_documents
    monkeypatch.setattr(
        chunked, "deal_documents", lambda bounds, *args: dealt.append(bounds.tolist()) or deal(bounds, *args)
    )
    args, state = draw(PAPER, B=1, T=90, H=1, G=1, D=8, M=16, documents=2)
    bounds = torch.tensor([0, 30, 90])
    for _ in range(3):
        gsa(**args, spec=PAPER, scale=1.0, cu_seqlens=bounds)
    assert dealt == [[0, 30, 90]]
    bounds[1] = 64
    changed, _ = gsa(**args, spec=PAPER, scale=1.0, cu_seqlens=bounds)
    fresh, _ = gsa(**args, spec=PAPER, scale=1.0, cu_seqlens=torch.tensor([0, 64, 90]), backend="reference")
    torch.testing.assert_close(changed, fresh, rtol=1e-10, atol=1e-12)
    with torch.inference_mode():
        gsa(**args, spec=PAPER, scale=1.0, cu_seqlens=bounds)
        gsa(**args, spec=PAPER, scale=1.0, cu_seqlens=torch.tensor([0, 64, 90]))
    assert dealt == [[0, 30, 90], *3 * [[0, 64, 90]]]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_padding_changes_nothing(spec, backend):
    """Padding left, right and in the middle: outputs 0 there, every other number as without it."""
    args, state = draw(spec, B=1, T=90, H=2, G=2, D=8, M=16)
    plain = results(args, state, spec, backend)
    generator = torch.Generator().manual_seed(3)
    real = torch.ones(120, dtype=torch.bool)
    real[[*range(10), *range(50, 55), *range(105, 120)]] = False
    positions = torch.full((1, 120), -1)
    positions[0, real] = state.position + torch.arange(90)

    def spread(x):
        garbage = torch.randn(1, 120, *x.shape[2:], generator=generator, dtype=x.dtype)
        return garbage.index_copy(1, real.nonzero().flatten(), x)

    padded = {k: x if k in PER_HEAD else spread(x) for k, x in args.items()}
    o, final = gsa(
        **padded, spec=spec, scale=0.3, positions=positions, initial_state=state, output_final_state=True,
        backend=backend,
    )  # fmt: skip
    assert (o[:, ~real] == 0).all()
    torch.testing.assert_close(o[:, real], plain["o"], rtol=1e-10, atol=1e-12)
    for name, x in final._asdict().items():
        torch.testing.assert_close(x, plain[f"final.{name}"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_state_resumes(spec):
    """Reading in two parts, the second from the first's state, is reading at once; steps are the extreme of it."""
    args, state = draw(spec, B=2, T=80, H=2, G=2, D=8, M=16)
    whole, final = gsa(**args, spec=spec, scale=0.3, initial_state=state, output_final_state=True)
    for cuts in ([0, 37, 80], list(range(81))):
        outputs, now = [], state
        for begin, end in zip(cuts, cuts[1:], strict=False):
            part = {k: x if k in PER_HEAD else x[:, begin:end] for k, x in args.items()}
            o, now = gsa(**part, spec=spec, scale=0.3, initial_state=now, output_final_state=True)
            outputs.append(o)
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-10, atol=1e-12)
        for mine, want in zip(now, final, strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gate", [-50.0, -1e-9, 0.0], ids=["all_forget", "slow", "all_keep"])
@pytest.mark.parametrize("occupancy", [False, True])
def test_extreme_gates_are_finite_and_right(gate, occupancy):
    """Log alpha at both ends: finite values and gradients, equal to the recurrence. At 0 nothing is ever written."""
    spec = GSASpec(gate="log_alpha", occupancy=occupancy)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 150, 2, 8, generator=generator, requires_grad=True) for _ in range(3))
    x = torch.full((1, 150, 2, 16), gate, requires_grad=True)

    def run(backend):
        o, final = gsa(q, k, v, x, spec=spec, scale=1.0, output_final_state=True, backend=backend)
        loss = o.square().sum() + sum(part.sum() for part in final[:3])
        return {"o": o, "keys": final.keys, **dict(zip("qkvx", torch.autograd.grad(loss, (q, k, v, x)), strict=True))}

    got = run("torch")
    assert_same(got, run("reference"), 2e-5)
    if gate == 0.0:
        assert (got["keys"] == 0).all() and (got["o"] == 0).all()


@pytest.mark.parametrize("spec", [PAPER, SOFT_CLOCK, EVICTING, UNTIED], ids=SPECS)
def test_mixed_extreme_gates(spec):
    """Hard overwrites next to slow and closed gates, a small ring, in float32: as the float64 recurrence."""
    args, state = draw(spec, B=1, T=200, H=1, G=2, D=8, M=16)
    with torch.no_grad():
        wild = torch.tensor([-400.0, -50.0, -1.0, 0.0, 1.0, 400.0], dtype=torch.float64)
        picked = wild[torch.randint(0, 6, args["gate"].shape, generator=torch.Generator().manual_seed(5))]
        args["gate"].copy_(picked.clamp(max=0) / 8 if spec.gate == "log_alpha" else picked)
    expected = results(args, state, spec, "reference")
    cast = {name: x.detach().float().requires_grad_() for name, x in args.items()}
    state = SlotState(*(x.detach().float().requires_grad_() for x in state[:3]), *state[3:])
    assert_same(results(cast, state, spec, "torch"), expected, 5e-5)


def test_chunk_against_step_over_100k_tokens():
    """100,000 tokens in float32: the chunked form and 100,000 decode steps arrive at the same memory and outputs."""
    T, M = 100_000, 32
    spec = GSASpec(gate="linear", damping=1.0, ring=M // 2, sinks=2, occupancy=True)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, T, 1, 8, generator=generator) for _ in range(3))
    # off-turn writes between 0 and 1e-3, half of the turns skipped, slots outside the ring that live 1,000 tokens
    gate = 1e-3 * torch.rand(1, T, 1, M, generator=generator) - 0.5 * (
        torch.rand(1, T, 1, 1, generator=generator) < 0.5
    )
    write, keep = torch.ones(1, M), torch.full((1, M), 1e-4)
    common = {"spec": spec, "scale": 0.35, "write": write, "keep": keep, "output_final_state": True}
    with torch.no_grad():
        o, final = gsa(q, k, v, gate, **common)
        state, steps = None, []
        for t in range(T):
            part = (x[:, t : t + 1] for x in (q, k, v, gate))
            step, state = gsa(*part, **common, initial_state=state)
            steps.append(step)
    steps = torch.cat(steps, dim=1)
    assert (o - steps).norm() / steps.norm() < 2e-5
    assert (final.keys - state.keys).norm() / state.keys.norm() < 2e-5
    # a float32 recurrence stands still once forget * (1 - z) is under half a unit in the last place of z = 1
    assert (final.occupancy - state.occupancy).abs().max() < 2**-25 / 1e-4
    assert final.position.item() == state.position.item() == T


@settings(max_examples=60, deadline=None)
@given(
    R=st.integers(2, 40), S=st.integers(0, 6), extra=st.integers(0, 5), T=st.integers(1, 150),
    G=st.sampled_from([1, 3]), form=st.sampled_from(["linear", "sigmoid"]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_ring_is_windowed_attention_with_sinks(R, S, extra, T, G, form, seed):
    """At zero gate logits the clock makes GSA softmax attention over the first S and the last R - S tokens, exactly."""
    S = min(S, R - 1)
    spec = GSASpec(gate=form, damping=8.0, ring=R, sinks=S, occupancy=True)
    generator = torch.Generator().manual_seed(seed)
    H, M = 2, R + extra
    q, k, v = (torch.randn(1, T, h, 8, generator=generator, dtype=torch.float64) for h in (H * G, H, H))
    # in the sigmoid form these logits overwrite to e^-50 and keep to 1e-31; extra slots are never written
    ends = {"linear": (1.0, 0.0), "sigmoid": (-400.0, 70.0)}[form]
    write, keep = (torch.full((H, M), end, dtype=torch.float64) for end in ends)
    gate = torch.zeros(1, T, H, M, dtype=torch.float64)
    o, _ = gsa(q, k, v, gate, spec=spec, scale=0.5, write=write, keep=keep)

    t = torch.arange(T)
    seen = (t[None] <= t[:, None]) & ((t[None] < S) | (t[None] > t[:, None] - (R - S)) | (t[:, None] < R))
    heads = (x.transpose(1, 2) for x in (q, k.repeat_interleave(G, 2), v.repeat_interleave(G, 2)))
    expected = scaled_dot_product_attention(*heads, attn_mask=seen, scale=0.5).transpose(1, 2)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-10)


def test_far_sinks_are_read_by_their_own_query():
    """q_sink reads slots 0..S-1 and q the others: the same as attention whose sink columns use q_sink."""
    spec = GSASpec(gate="linear", ring=8, sinks=3, occupancy=True)
    generator = torch.Generator().manual_seed(0)
    q, k, v, q_sink = (torch.randn(1, 70, 2, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    write, keep = torch.ones(2, 8, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.float64)
    gate = torch.zeros(1, 70, 2, 8, dtype=torch.float64)
    o, _ = gsa(q, k, v, gate, spec=spec, scale=0.5, write=write, keep=keep, q_sink=q_sink)
    t = torch.arange(70)
    seen = (t[None] <= t[:, None]) & ((t[None] < 3) | (t[None] > t[:, None] - 5) | (t[:, None] < 8))
    logits = 0.5 * torch.einsum("bihd,bjhd->bhij", q, k)
    sinks = 0.5 * torch.einsum("bihd,bjhd->bhij", q_sink, k)
    logits = torch.where(t < 3, sinks, logits).masked_fill(~seen, -torch.inf)
    expected = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend):
    """Analytic against numerical derivatives of everything, through the clock, occupancy and an initial state."""
    spec = GSASpec(gate="sigmoid", damping=2.0, ring=4, sinks=1, occupancy=True)
    args, state = draw(spec, B=1, T=7, H=1, G=2, D=3, M=5)
    names = list(args)

    def f(*leaves):
        final_args = dict(zip(names, leaves[:-3], strict=True))
        initial = SlotState(*leaves[-3:], *state[3:])
        o, final = gsa(
            **final_args, spec=spec, scale=0.3, initial_state=initial, output_final_state=True, backend=backend
        )
        return o, *final[:3]

    assert torch.autograd.gradcheck(f, (*args.values(), *state[:3]))


def test_linear_gate_has_slope_at_both_ends():
    """At write 1 and keep 0 the linear gate is an exact ring, and the gradient of its logits is alive at every slot."""
    spec = GSASpec(gate="linear", damping=8.0, ring=8, occupancy=True)
    generator = torch.Generator().manual_seed(0)
    q, k, v, target = (torch.randn(1, 40, 1, 8, generator=generator) for _ in range(4))
    gate = torch.zeros(1, 40, 1, 8, requires_grad=True)
    o, _ = gsa(q, k, v, gate, spec=spec, scale=0.35, write=torch.ones(1, 8), keep=torch.zeros(1, 8))
    (grad,) = torch.autograd.grad((o - target).square().sum(), gate)
    on_turn = torch.arange(40)[:, None] % 8 == torch.arange(8)
    late = grad[0, 8:, 0]
    assert (late[on_turn[8:]].abs() > 1e-6).float().mean() > 0.9
    assert (late[~on_turn[8:]].abs() > 1e-6).float().mean() > 0.9


def test_almost_empty_slots_do_no_harm():
    """Write weights down to the smallest float32: finite, and the slot counts as empty until it holds EMPTY."""
    spec = GSASpec(gate="log_alpha", occupancy=True)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 70, 1, 8, generator=generator, requires_grad=True) for _ in range(3))
    tiny = torch.tensor([1e-45, 1e-38, 0.5 * EMPTY, 1e-20])
    s = tiny.expand(1, 70, 1, 4).clone().requires_grad_()
    for backend in ("torch", "reference"):
        o, _ = gsa(q, k, v, torch.zeros(1, 70, 1, 4), s=s, spec=spec, scale=1.0, backend=backend)
        # slot 2 appears with the second token; both slots that count hold the mean of v so far, weighted alike
        assert torch.isfinite(o).all()
        for grad in torch.autograd.grad(o.square().sum(), (q, k, v)):
            assert torch.isfinite(grad).all()
        mean = v[0, :, 0].cumsum(0) / torch.arange(1, 71)[:, None]
        torch.testing.assert_close(o[0, :, 0], mean, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_compute_in_float32(dtype):
    args, state = draw(EVICTING, B=1, T=100, H=2, G=2, D=8, M=16, dtype=torch.float32)
    half = {k: x.detach() if k in PER_HEAD else x.detach().to(dtype) for k, x in args.items()}
    full = {k: x.float() for k, x in half.items()}
    common = {"spec": EVICTING, "scale": 0.3, "initial_state": state, "output_final_state": True}
    o, final = gsa(**half, **common)
    want, want_final = gsa(**full, **common)
    assert o.dtype == dtype and final.keys.dtype == torch.float32
    torch.testing.assert_close(o.float(), want.to(dtype).float(), rtol=0, atol=0)
    torch.testing.assert_close(final.keys, want_final.keys, rtol=0, atol=0)


def naive_gsa(q, k, v, s, g, scale, hk, hv):
    """Two gated linear attention passes, token by token (paper eq. 7): q [B,T,HQ,D], states [B,H,D,M], [B,H,M,E]."""
    G = q.shape[2] // k.shape[2]
    k, v, s, g = (x.repeat_interleave(G, dim=2) for x in (k, v, s, g))
    hk, hv = (x.repeat_interleave(G, dim=1) for x in (hk, hv))
    outputs = []
    for t in range(q.shape[1]):
        alpha, write = g[:, t].exp(), s[:, t]
        hk = hk * alpha[:, :, None] + k[:, t, :, :, None] * write[:, :, None]
        hv = hv * alpha[..., None] + write[..., None] * v[:, t, :, None]
        p = torch.einsum("bhd,bhdm->bhm", q[:, t], hk).mul(scale).softmax(-1)
        outputs.append(torch.einsum("bhm,bhme->bhe", p, hv))
    return torch.stack(outputs, dim=1), hk[:, ::G], hv[:, ::G]


@pytest.mark.parametrize("abc", [False, True])
def test_chunk_gsa_door(abc):
    """The peer-compatible signature: values, states per kv head in [D, M] order, ABC mode, packed documents."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, s, g = (
        torch.randn(2, 90, h, d, generator=generator, dtype=torch.float64)
        for h, d in ((6, 8), (2, 8), (2, 10), (2, 16), (2, 16))
    )
    state = tuple(torch.randn(2, 2, *d, generator=generator, dtype=torch.float64) for d in ((8, 16), (16, 10)))
    g = logsigmoid(g)
    if abc:
        total = s.logcumsumexp(1)
        decay = torch.cat([torch.zeros_like(total[:, :1]), total[:, :-1] - total[:, 1:]], dim=1)
        want, *want_state = naive_gsa(q, k, v, (s - total).exp(), decay, 8**-0.5, *state)
    else:
        want, *want_state = naive_gsa(q, k, v, s, g, 8**-0.5, *state)
    o, final = chunk_gsa(q, k, v, s, None if abc else g, initial_state=state, output_final_state=True, chunk_size=64)
    torch.testing.assert_close(o, want, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(final, want_state, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)

    rows = [x.flatten(0, 1)[None] for x in (q, k, v, s, g)]
    packed, _ = chunk_gsa(
        *rows[:4], None if abc else rows[4], None, state, cu_seqlens=torch.tensor([0, 90, 180]), cu_seqlens_cpu=None
    )
    torch.testing.assert_close(packed.view_as(o), want, rtol=1e-10, atol=1e-10)
    assert chunk_gsa(q, k, v, s, g)[1] == (None, None)


def test_paper_form_is_two_linear_attention_passes():
    """gsa() with the paper's spec is eq. 7-8 written out: silu on q, k, v; alpha = sigmoid(x)^(1/8); s = 1 - alpha."""
    args, _ = draw(PAPER, B=1, T=70, H=2, G=3, D=8, M=16)
    g = logsigmoid(args["gate"]) / 8
    zero = torch.zeros(1, 2, 8, 16, dtype=torch.float64)
    q, k, v = (silu(args[name]) for name in "qkv")
    want, hk, hv = naive_gsa(q, k, v, 1 - g.exp(), g, 1.0, zero, zero.mT)
    o, final = gsa(**args, spec=PAPER, scale=1.0, output_final_state=True)
    torch.testing.assert_close(o, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final.keys.mT, hk, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final.values, hv, rtol=1e-10, atol=1e-10)


BAD = {
    "k must have shape": {"k": torch.zeros(1, 5, 2, 9)},
    "cannot share": {"k": torch.zeros(1, 5, 3, 8)},
    "does not fit": {"spec": GSASpec(gate="linear", ring=32)},
    "write and keep belong": {"write": torch.ones(2, 16)},
    "ready made": {"spec": GSASpec(gate="log_alpha", ring=8), "write": torch.ones(2, 16), "keep": torch.ones(2, 16)},
    "q_sink is read by sink slots only": {"q_sink": torch.zeros(1, 5, 4, 8)},
    "it needs a clock": {"bonus": torch.zeros(1, 5, 2), "recent": torch.ones(2)},
    "belong together": {"bonus": torch.zeros(1, 5, 2)},
    "positions must have shape": {"positions": torch.zeros(5)},
    "one packed row": {"q": torch.zeros(2, 5, 4, 8), "cu_seqlens": torch.tensor([0, 5])},
    "no token": {"q": torch.zeros(1, 0, 4, 8)},
}


@pytest.mark.parametrize("message", BAD)
def test_arguments_that_do_not_fit_are_named(message):
    args = {"q": torch.zeros(1, 5, 4, 8), "k": torch.zeros(1, 5, 2, 8), "v": torch.zeros(1, 5, 2, 8)}
    args |= {"gate": torch.zeros(1, 5, 2, 16), "spec": PAPER, "scale": 1.0, **BAD[message]}
    with pytest.raises(ValueError, match=message):
        gsa(**args)


@pytest.mark.parametrize("kwargs", [{"ring": 4, "sinks": 4}, {"sinks": 1}, {"damping": 0.0}], ids=str)
def test_impossible_specs_are_refused(kwargs):
    with pytest.raises(ValueError):
        GSASpec(**kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("T", "M"), [(63, 16), (257, 64), (1000, 128)])
def test_chunked_on_a_gpu(spec, T, M):
    """The PyTorch form on a GPU in float32 against the float64 recurrence: outputs, states, every gradient."""
    args, state = draw(spec, B=2, T=T, H=2, G=3, D=64, M=M)
    expected = results(args, state, spec, "reference")
    moved = {name: x.detach().float().cuda().requires_grad_() for name, x in args.items()}
    state = SlotState(*(x.detach().float().cuda().requires_grad_() for x in state[:3]), *(x.cuda() for x in state[3:]))
    got = {name: x.cpu() for name, x in results(moved, state, spec, "torch").items()}
    assert_same(got, expected, 2e-5)
