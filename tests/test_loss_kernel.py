"""The Triton kernel of the losses against its reference in float64: in Triton's interpreter without a GPU."""

import math
from types import SimpleNamespace

import pytest
import torch
from interpreter import mend_bfloat16

from t2r.data.packing import UNLABELLED
from t2r.kernels.loss import Mix, fused, implementation, reference
from t2r.schema import LossConfig
from t2r.train.losses import mixed_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    mend_bfloat16()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of the infinities beyond a row
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}  # relative RMS, of gradients in that type
STEPS = 2 * fused.BLOCK + 100  # words: two whole steps of the kernel and a part
MIXES = [Mix(1.0, 0.0), Mix(0.0, 1.0), Mix(0.9, 0.1)]
IMPLEMENTATIONS = pytest.mark.parametrize("losses", [fused, reference], ids=["kernel", "reference"])


def draw(tokens, V, dtype, spread=3.0):
    """(logits, labels, the teacher's logits), the second of five tokens unlabelled and the last label the last word."""
    logits = (spread * torch.randn(tokens, V, device=DEVICE)).to(dtype)
    teacher = (logits.float() + torch.randn(tokens, V, device=DEVICE)).to(dtype)
    labels = torch.randint(0, V, (tokens,), device=DEVICE)
    labels[1::5], labels[-1] = UNLABELLED, V - 1
    return logits, labels, teacher


def error(ours, exact):
    """Relative RMS error; infinite unless all is finite."""
    exact = exact.double()
    found = ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()
    return found if math.isfinite(found) else math.inf


def compare(logits, labels, teacher, mix):
    wide = None if teacher is None else teacher.double()
    kl, ce, gradient = reference.with_gradient(logits.double(), labels, wide, mix)
    dtype = logits.dtype
    for found in (fused.token_losses(logits, labels, teacher, mix), fused.with_gradient(logits, labels, teacher, mix)):
        assert found[0].dtype == found[1].dtype == torch.float32
        assert error(found[0], kl) < TOLERANCE[torch.float32] and error(found[1], ce) < TOLERANCE[torch.float32]
    assert found[2].dtype == dtype and found[2].data_ptr() == logits.data_ptr()  # the logits' memory
    assert error(found[2], gradient) < TOLERANCE[dtype]
    for x in found:
        assert not x[labels == UNLABELLED].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("V", [2, fused.BLOCK, STEPS])
def test_the_kernel_is_the_reference(V, mix, temperature, dtype):
    compare(*draw(6, V, dtype), mix._replace(temperature=temperature))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_without_a_teacher(dtype):
    logits, labels, _ = draw(6, STEPS, dtype)
    compare(logits, labels, None, Mix(0.9, 0.1, 2.0))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_extreme_logits(temperature, dtype):
    """Largest logits in every place of a step, and models that agree and disagree as much as they can."""
    logits, labels, teacher = draw(8, STEPS, dtype)
    logits[0], logits[2], logits[3], logits[4] = 1e4, -1e4, 1e4 * (-1) ** torch.arange(STEPS), 0
    logits[4, -1] = teacher[4, 0] = 1e4
    teacher[0], teacher[3] = -1e4, logits[3].flip(0)
    logits[5] = torch.linspace(-1e4, 1e4, STEPS)
    teacher[5] = logits[5]
    compare(logits, labels, teacher, Mix(0.9, 0.1, temperature))


def test_a_chunk_without_labels():
    logits, labels, teacher = draw(3, 50, torch.float32)
    compare(logits, torch.full_like(labels, UNLABELLED), teacher, Mix(0.9, 0.1))


@IMPLEMENTATIONS
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_words_without_probability(losses, temperature):
    """-inf of both models is as if the word did not exist; of the teacher alone, no term; of the student, infinite."""
    V, mix = STEPS, Mix(0.9, 0.1, temperature)
    logits, labels, teacher = draw(4, V, torch.float32)
    labels[:] = V - 1
    gone = slice(0, fused.BLOCK + 5)  # more than the first step
    logits[:, gone] = teacher[:, gone] = -math.inf
    rest = [x[:, gone.stop :].contiguous().double() for x in (logits, teacher)]
    kl, ce, gradient = reference.with_gradient(rest[0], labels - gone.stop, rest[1], mix)
    found = losses.with_gradient(logits.clone(), labels, teacher, mix)
    assert error(found[0], kl) < 2e-5 and error(found[1], ce) < 2e-5
    assert error(found[2][:, gone.stop :], gradient) < 2e-5 and not found[2][:, gone].any()

    teacher[0, -2] = -math.inf
    logits[1, -2] = -math.inf
    kl, ce, gradient = losses.with_gradient(logits, labels, teacher, mix)
    assert kl.isfinite().tolist() == [True, False, True, True] and kl[1] == math.inf
    assert ce.isfinite().all() and gradient.isfinite().all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("fault", ["nan", "inf", "nothing"])
def test_what_is_no_number_is_seen(losses, fault):
    logits, labels, teacher = draw(3, STEPS, torch.float32)
    labels[:] = 7
    logits[0] = {"nan": logits[0], "inf": logits[0], "nothing": -math.inf}[fault]
    logits[0, 9] = {"nan": math.nan, "inf": math.inf, "nothing": -math.inf}[fault]
    kl, ce, gradient = losses.with_gradient(logits, labels, teacher, Mix(0.9, 0.1))
    assert kl.isnan().tolist() == ce.isnan().tolist() == gradient.isnan().any(-1).tolist() == [True, False, False]


def test_what_the_kernel_cannot_read():
    logits, labels, teacher = draw(3, 50, torch.float32)
    labels[:] = torch.tensor([-1, 49, 50])
    assert fused.token_losses(logits, labels, teacher, Mix(0.0, 1.0))[1].isnan().tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"logits \[3, 50\] of the student, \[3, 49\] of the teacher"):
        fused.token_losses(logits, labels, teacher[:, :49], Mix(1.0, 0.0))


def test_rows_that_do_not_lie_together():
    """As a head gives them that is longer than the vocabulary."""
    logits, labels, teacher = draw(5, 60, torch.float32)
    exact = reference.with_gradient(logits[:, :50].double(), labels % 50, teacher[:, :50].double(), Mix(0.9, 0.1))
    found = fused.with_gradient(logits[:, :50], labels % 50, teacher[:, :50], Mix(0.9, 0.1))
    assert all(error(x, y) < 2e-5 for x, y in zip(found, exact, strict=True))


def test_which_one_is_chosen():
    x = torch.zeros(1, device=DEVICE)
    assert implementation(x.cpu()) is reference and implementation(x.double()) is reference
    assert implementation(x.bfloat16()) is (fused if DEVICE == "cuda" else reference)


def tiny_head(width, dtype=torch.float32, **config):
    lm_head = torch.nn.Linear(width, 50, dtype=dtype, device=DEVICE)
    return SimpleNamespace(lm_head=lm_head, config=SimpleNamespace(**config))


@pytest.mark.parametrize("mix", [Mix(0.7, 0.3, 2.5), Mix(1.0, 0.0), Mix(0.0, 1.0)], ids=str)
@pytest.mark.parametrize("config", [{}, {"logit_scale": 0.3, "final_logit_softcapping": 2.0}], ids=["plain", "capped"])
def test_the_loss_of_a_model_is_the_same_through_the_kernel(monkeypatch, config, mix):
    """Also where autograd keeps what the logits were made of, a soft cap's tanh, and in several chunks."""
    student, teacher = tiny_head(16, **config), tiny_head(12)
    hidden, theirs = torch.randn(2, 40, 16, device=DEVICE), torch.randn(2, 40, 12, device=DEVICE)
    hidden.requires_grad_()
    labels = torch.randint(0, 50, (2, 40), device=DEVICE)
    labels[0, ::5] = UNLABELLED
    inputs, found = [hidden, *student.lm_head.parameters()], []
    for losses in (reference, fused):
        monkeypatch.setattr("t2r.train.losses.implementation", lambda x, losses=losses: losses)
        sums = mixed_loss(student, hidden, labels, mix, LossConfig(chunk=7), teacher, theirs)
        found.append([*sums, *torch.autograd.grad(3 * sums.loss, inputs)])
        with torch.no_grad():
            seen = mixed_loss(student, hidden.detach(), labels, mix, LossConfig(chunk=7), teacher, theirs)
        found[-1] += seen
    for ours, wanted in zip(*reversed(found), strict=True):
        assert error(ours, wanted) < TOLERANCE[torch.float32]


def test_a_head_that_needs_its_logits_again_is_refused(monkeypatch):
    """Its gradient would be of what the kernel wrote over them."""
    monkeypatch.setattr("t2r.train.losses.implementation", lambda x: fused)
    student, hidden = tiny_head(16), torch.randn(1, 40, 16, device=DEVICE, requires_grad=True)
    student.lm_head = torch.nn.Sequential(student.lm_head, torch.nn.Tanh())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mixed_loss(student, hidden, torch.zeros(1, 40, dtype=torch.long, device=DEVICE), Mix(0.0, 1.0), LossConfig())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("V", [49152, 50257, 151936])
def test_real_vocabularies_on_a_gpu(V, temperature, dtype):
    compare(*draw(512, V, dtype), Mix(0.9, 0.1, temperature))


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits_on_a_gpu():
    V, tokens = 262144, 8200
    logits = torch.zeros(tokens, V, dtype=torch.bfloat16, device="cuda")
    last, labels, _ = draw(8, V, torch.bfloat16)
    logits[-8:] = last
    kl, ce, gradient = reference.with_gradient(last.double(), labels, None, Mix(0.0, 1.0))
    labels = torch.cat([torch.full((tokens - 8,), UNLABELLED, device="cuda"), labels])
    found = fused.with_gradient(logits, labels, None, Mix(0.0, 1.0))
    assert error(found[1][-8:], ce) < 2e-5 and error(found[2][-8:], gradient) < 5e-3
    assert not found[1][:-8].any() and not found[2][:-8].any()


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_nothing():
    """Loss and gradients of a bfloat16 head against float64, without the host waiting for the GPU."""
    student, teacher = tiny_head(64, torch.bfloat16), tiny_head(48, torch.bfloat16)
    hidden = torch.randn(2, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    theirs, labels = torch.randn(2, 300, 48, device="cuda").bfloat16(), torch.randint(0, 50, (2, 300), device="cuda")
    mix, inputs = Mix(0.9, 0.1), [hidden, *student.lm_head.parameters()]

    def step():
        loss = mixed_loss(student, hidden, labels, mix, LossConfig(chunk=50), teacher, theirs).loss
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    student.lm_head.double(), teacher.lm_head.double()
    exact = hidden.detach().double().requires_grad_()
    loss = mixed_loss(student, exact, labels, mix, LossConfig(), teacher, theirs.double()).loss
    wanted = [loss, *torch.autograd.grad(loss, [exact, *student.lm_head.parameters()])]
    assert all(error(x, y) < 1e-2 for x, y in zip(found, wanted, strict=True))
