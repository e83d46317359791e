"""The chunked losses against their formulas, by our own code and by liger's kernels."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stage_cases import student_model
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from t2r.data.packing import UNLABELLED
from t2r.errors import UserError
from t2r.schema import LossConfig
from t2r.train.losses import Mix, check_liger, head, mixed_loss

ROOT = Path(__file__).resolve().parents[1]


def tiny_head(width, bias=False, **config):
    """As much of a causal LM as a loss looks at, in float64."""
    lm_head = torch.nn.Linear(width, 50, bias=bias, dtype=torch.float64)
    return SimpleNamespace(lm_head=lm_head, config=SimpleNamespace(**config))


def plain_losses(student, teacher, hidden, theirs, labels, temperature):
    """(KL, cross-entropy) by the formulas, on the labelled tokens, all logits at once."""
    seen = labels != UNLABELLED
    logits, target = head(student)(hidden)[seen], head(teacher)(theirs)[seen]
    ce = cross_entropy(logits, labels[seen], reduction="sum")
    target = log_softmax(target / temperature, -1)
    kl = kl_div(log_softmax(logits / temperature, -1), target, log_target=True, reduction="sum")
    return kl * temperature**2, ce


@pytest.mark.parametrize("way", ["in forward", "recomputed"])
@pytest.mark.parametrize("chunk", [1, 7, 80, 1000])
@pytest.mark.parametrize("mix", [Mix(0.7, 0.3, 2.5), Mix(1.0, 0.0, 1.0), Mix(0.0, 1.0)])
@pytest.mark.parametrize("config", [{}, {"logit_scale": 0.3, "final_logit_softcapping": 2.0}])
def test_chunked_losses_are_the_plain_formulas(mix, chunk, way, config):
    student, teacher = tiny_head(16, bias=True, **config), tiny_head(12)
    hidden, theirs = torch.randn(2, 40, 16).double().requires_grad_(), torch.randn(2, 40, 12).double()
    labels = torch.randint(0, 50, (2, 40))
    labels[0, ::5] = UNLABELLED
    if way == "recomputed":
        student.lm_head.weight.ds_id = 0  # as ZeRO 3 marks what it has in parts
    inputs = [hidden, *student.lm_head.parameters()]
    loss, kl, ce = mixed_loss(student, hidden, labels, mix, LossConfig(chunk=chunk), teacher, theirs)
    gradients = torch.autograd.grad(3 * loss, inputs)
    plain_kl, plain_ce = plain_losses(student, teacher, hidden, theirs, labels, mix.temperature)
    plain = mix.kl * plain_kl + mix.ce * plain_ce
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    assert (kl.item(), ce.item()) == pytest.approx((plain_kl.item(), plain_ce.item()), rel=1e-12)
    for ours, wanted in zip(gradients, torch.autograd.grad(3 * plain, inputs), strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert mixed_loss(student, hidden, labels, mix, LossConfig(chunk=chunk), teacher, theirs).loss == loss
    alone = mixed_loss(student, hidden, labels, Mix(0.0, 1.0), LossConfig(chunk=chunk))
    assert alone.kl.item() == 0 and alone.loss.item() == pytest.approx(plain_ce.item(), rel=1e-12)


LIGER = """
import torch
from types import SimpleNamespace
from t2r.schema import LossConfig
from t2r.train.losses import Mix, mixed_loss
torch.manual_seed(0)
student, teacher = (SimpleNamespace(lm_head=torch.nn.Linear(n, 50, bias=False), config=None) for n in (16, 12))
hidden, theirs = torch.randn(2, 40, 16, requires_grad=True), torch.randn(2, 40, 12)
labels = torch.randint(0, 50, (2, 40))
labels[0, ::5] = -100
for mix in (Mix(0.0, 1.0), Mix(1.0, 0.0, 1.0), Mix(0.7, 0.3, 2.5)):
    found = []
    for backend in ("own", "liger"):
        loss = mixed_loss(student, hidden, labels, mix, LossConfig(backend=backend), teacher, theirs).loss
        found.append([loss, *torch.autograd.grad(loss, [hidden, student.lm_head.weight])])
    for ours, liger in zip(*found):
        assert torch.allclose(ours, liger, rtol=1e-5, atol=1e-5), mix
"""


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs `pip install liger-kernel`")
def test_liger_computes_the_same():
    """Its kernels, by Triton's interpreter, which must be chosen before anything is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run([sys.executable, "-c", LIGER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_liger_is_refused_where_it_cannot_work(monkeypatch):
    with pytest.raises(UserError, match="loss.backend is liger.*nearest valid: own; try: `pip install liger-kernel`"):
        monkeypatch.setattr("t2r.train.losses.find_spec", lambda name: None)
        check_liger(student_model(), "cuda")
    monkeypatch.setattr("t2r.train.losses.find_spec", lambda name: "there")
    with pytest.raises(UserError, match="loss.backend is liger, which needs a GPU; nearest valid: own"):
        check_liger(student_model(), "cpu")
    check_liger(student_model(), "cuda")
    with pytest.raises(UserError, match="liger, which does not know the head of"):
        check_liger(tiny_head(16, bias=True, model_type="x"), "cuda")


def test_a_frozen_head_gets_no_gradient_and_the_rest_does():
    student, hidden = tiny_head(16), torch.randn(1, 40, 16).double().requires_grad_()
    student.lm_head.requires_grad_(False)
    labels = torch.randint(0, 50, (1, 40))
    mixed_loss(student, hidden, labels, Mix(0.0, 1.0), LossConfig(chunk=7)).loss.backward()
    plain = torch.autograd.grad(cross_entropy(head(student)(hidden)[0], labels[0], reduction="sum"), hidden)[0]
    assert torch.allclose(hidden.grad, plain) and student.lm_head.weight.grad is None
