"""Routers fitted to a source: what they are fitted to, against sums by hand, and a conversion from end to end."""

import json

import pytest
import torch

from t2r.cli import main
from t2r.convert import convert
from t2r.convert.checks import undecided
from t2r.convert.route import FLOOR, distances, fit, read_later
from t2r.convert.source import open_source
from t2r.convert.verify import load_gsa
from t2r.evaluate.models import open_models, window_only


@pytest.mark.parametrize("reach", [None, 20])
def test_what_a_token_is_read_later(reach):
    T, H, G, D = 60, 2, 3, 4
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(H * G, T, D, generator=generator), torch.randn(H, T, D, generator=generator)
    near, far = distances(T)
    assert (near, far) == (7, 30) and distances(1024) == (48, 304)
    expected = torch.zeros(H, T)
    for head in range(H * G):
        for t in range(T):
            first = 0 if reach is None else max(0, t - reach + 1)
            weights = torch.softmax(0.5 * key[head // G, first : t + 1] @ query[head, t], dim=0)
            for j in range(max(first, t - far + 1), t - near + 1):
                expected[head // G, j] += weights[j - first] ** 2 / G
    torch.testing.assert_close(read_later(query, key, 0.5, reach), expected)


def test_a_linear_truth_is_found():
    """Targets that are linear in the input: the outputs order tokens as they do, and are positive for the share."""
    N, T, W = 4, 200, 8
    generator = torch.Generator().manual_seed(1)
    hidden, truth = torch.randn(N, T, W, generator=generator), torch.randn(2, W, generator=generator)
    mass = (hidden @ truth.T - 1).exp().mT
    found = fit(hidden, mass - FLOOR, sinks=3, share=0.2)
    scores = hidden @ found["router.weight"].T + found["router.bias"]
    for head in range(2):
        pair = torch.stack([scores[..., head].flatten(), (hidden @ truth[head]).flatten()])
        assert torch.corrcoef(pair)[0, 1] > 1 - 1e-5
    seen = scores[:, 3:].flatten(0, 1)
    assert ((seen > 0).float().mean(0) - 0.2).abs().max() < 2e-3
    torch.testing.assert_close(seen.std(0), torch.ones(2), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "long.jsonl"
    draw = torch.Generator().manual_seed(2)
    rows = [torch.randint(97, 123, (2000,), generator=draw).tolist() for _ in range(6)]
    file.write_text("".join(json.dumps({"text": "".join(map(chr, row))}) + "\n" for row in rows))
    return file


def test_a_conversion_with_a_router_is_verified_both_ways(tiny_llama, text, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--slots", "16", "--long-slots", "6", "--sinks", "2", "--long-text", str(text), "--long-share", "0.25"]
    assert main(["convert", str(tiny_llama), str(out), *words]) == 0
    assert "\nrouters fit in " in (printed := capsys.readouterr().out) and "\nverified\n" in printed
    assert main(["verify", str(out), "--source", str(tiny_llama), "--by-layer"]) == 0
    model = load_gsa(open_source(out))
    ids = torch.tensor([[5 + i * i % 40 for i in range(90)]])
    mixers, shares = [layer.self_attn for layer in model.model.layers], []
    for mixer in mixers:
        mixer.router.register_forward_hook(lambda module, args, output: shares.append(output))
    with torch.inference_mode():
        model(ids)
        shifts = undecided(model, ids)
        del shares[len(mixers) :]
        for name, shift in shifts.items():
            model.get_parameter(name).add_(shift)
        model(ids)
    before, after = shares[: len(mixers)], shares[len(mixers) :]
    assert any((x > 0).any() and not (x > 0).all() for x in before)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a > 0, b > 0)  # no choice has changed, and 0 lies in the middle of its gap
        for x in b[0].T:
            if (x > 0).any() and not (x > 0).all():
                torch.testing.assert_close(x[x > 0].min(), -x[x <= 0].max(), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_what_is_left_without_the_router_is_a_window_of_all_slots(tiny_llama, text, tmp_path):
    models = {}
    for name, long in {"routed": 6, "window": 0}.items():
        convert(str(tiny_llama), str(tmp_path / name), slots=16, sinks=2, long_slots=long, verify=False,
                long_share=0.25, long_text=[str(text)])  # fmt: skip
        models[name] = load_gsa(open_source(tmp_path / name))
    entries = open_models([str(tmp_path / name) for name in models])
    assert [entry.has_learned() for entry in entries] == [True, False]
    ids = torch.tensor([[5 + i * i % 40 for i in range(90)]])
    expected = models["window"](ids).logits
    assert (models["routed"](ids).logits - expected).abs().max() > 1e-3
    assert window_only(models["routed"])
    torch.testing.assert_close(models["routed"](ids).logits, expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--long-share", "1.5"], "a share of 1.5 of a text (in --long-share); nearest valid: 0.125"),
        (["--long-slots", "14"], "14 long slots of 16 leave none for the ring beside 2 sinks"),
        (["--long-slots", "4", "--long-text", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--long-slots", "4", "--long-text", "short.jsonl"], "nearest valid: --long-text shipped:train"),
    ],
)
def test_what_cannot_be_is_one_line(words, message, tiny_llama, tmp_path, tmp_path_factory, capsys, monkeypatch):
    out, here = tmp_path / "out", tmp_path_factory.mktemp("here")
    (here / "short.jsonl").write_text(json.dumps({"text": "too short"}) + "\n")
    monkeypatch.chdir(here)
    assert main(["convert", str(tiny_llama), str(out), "--slots", "16", "--sinks", "2", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") <= 2 and not list(tmp_path.iterdir())
