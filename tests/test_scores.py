"""Scores for eviction, fitted to a source: against sums and a simulation by hand, and a conversion from end to end."""

import json
from types import SimpleNamespace

import pytest
import torch

from t2r.cli import main
from t2r.convert import convert, evict
from t2r.convert.checks import bonuses, decided
from t2r.convert.evict import FADING, REACH, Attention, choose, distances, fit, log_mean, next_turn
from t2r.convert.source import open_source
from t2r.convert.verify import load_gsa
from t2r.evaluate.models import open_models, window_only
from t2r.modeling.configuration import preset


def some_attention(T, H, G, D, seed=0, sharpness=1.0):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(H * G, T, D, generator=generator), torch.randn(H, T, D, generator=generator)
    return Attention(sharpness * query, key, 0.5, None)


@pytest.mark.parametrize("reach", [None, 20])
def test_what_a_token_is_read_later(reach):
    T, H, G = 60, 2, 3
    text = some_attention(T, H, G, 4)._replace(reach=reach)
    near, far = distances(T)
    assert (near, far) == (7, 30) and distances(1024) == (40, 512)
    expected = torch.zeros(H, T)
    for head in range(H * G):
        for t in range(T):
            first = 0 if reach is None else max(0, t - reach + 1)
            weights = torch.softmax(0.5 * text.key[head // G, first : t + 1] @ text.query[head, t], dim=0)
            for j in range(max(first, t - far + 1), t - near + 1):
                expected[head // G, j] += weights[j - first] ** 2 / G
    torch.testing.assert_close(text.read_later(), expected)


def test_the_log_of_a_mean_is_found():
    """Where one in ten of some tokens is worth 10 and of others each is worth 1, both are worth the same."""
    draw = torch.Generator().manual_seed(1)
    x, truth = torch.randn(4, 2000, 8, generator=draw).double(), 0.5 * torch.randn(2, 8, generator=draw).double()
    torch.testing.assert_close(log_mean(x, (x @ truth.T - 3).exp()), truth, atol=2e-3, rtol=0)
    seldom = (torch.rand(4, 2000, generator=draw) < 0.1) & (x[..., 0] > 0)
    y = torch.where(x[..., 0] > 0, 10.0 * seldom, 1.0)[..., None]
    assert log_mean(x, y)[0, 0].abs() < 0.1
    found = log_mean(x[..., :3], y)
    for step in torch.eye(3).double():  # no smaller deviance nearby
        rates = [(x[..., :3] @ (found + e * step).mT)[..., 0] for e in (-0.02, 0.0, 0.02)]
        low, here, high = ((rate - rate.exp().mean().log() - 1).mul(-y[..., 0] / y.mean()).mean() for rate in rates)
        assert here < low + 1e-5 and here < high + 1e-5
    assert log_mean(x, torch.zeros(4, 2000, 1).double()).abs().max() < 1e-2  # nothing to be read: no order


def test_the_next_token_in_a_slot():
    turn = torch.tensor([[0, 1, 2, 1, 1, 2, 3, 0]]).int()[..., None]
    assert next_turn(turn)[0, :, 0].tolist() == [7, 3, 5, 4, 8, 8, 8, 8]


@pytest.mark.parametrize("times", REACH.values())
def test_settings_that_lose_least_are_chosen(times, monkeypatch):
    """A head whose scores tell all keeps few tokens in any case; one whose scores tell the contrary keeps a window.
    What is lost by each setting is simulated here again, by lists."""
    monkeypatch.setattr(evict, "AWAY", 30)
    T, H, gsa = 120, 2, preset("exact", slots=16, sinks=2)
    texts = [some_attention(T, H, 2, 4, seed, sharpness=3.0) for seed in range(2)]
    later = torch.stack([torch.stack(list(text.squares())).sum(1) for text in texts]).mT  # [N,T,H], all of it
    score = torch.log(later + 1e-3).double() * torch.tensor([1.0, -1.0])
    recent, fading = choose(score, texts, gsa, times)

    def lost(h, kept, rate):
        total = 0.0
        for text, marks in zip(texts, score[:, :, h], strict=True):
            squares, held = list(text.squares())[h], []
            for t in range(T):
                if len(held) == gsa.slots:
                    old = [j for j in held[gsa.sinks :] if t - j >= kept]
                    out = min(old, key=lambda j: marks[j].item() / rate + j)
                    held.remove(out)
                    away = max(t, out + 30)
                    total += squares[t:away, out].sum().item() + times * squares[away:, out].sum().item()
                held.append(t)
        return total

    for h in range(H):
        mine = lost(h, recent[h].item(), fading[h].item())
        assert mine <= min(lost(h, kept, rate) for kept in (1, 3, 7, 14) for rate in (FADING[0], FADING[-1])) + 1e-3
    assert recent[0] < 7 < recent[1] == gsa.slots - gsa.sinks


def test_reach_moves_a_head_from_its_window_to_what_is_read_late():
    """A head that reads the last 14 tokens, and now and then, from AWAY on, those that its scores tell apart."""
    at = torch.arange(160)
    distance, marked = at[:, None] - at, (at % 11 == 5).double()
    squares = ((distance >= 0) & (distance < 14)) + torch.where(distance >= evict.AWAY, 3 * marked, 0.0)
    text = SimpleNamespace(squares=lambda: [squares])
    score = torch.log(marked + 1e-3)[None, :, None]
    kept = [choose(score, [text], preset("exact", slots=16, sinks=2), times)[0].item() for times in REACH.values()]
    assert kept == [14, 1]


def test_a_layer_is_fitted():
    """Bonuses are centred, and order tokens as what is read later does where that is linear in the input."""
    N, T, gsa = 4, 200, preset("exact", slots=16, sinks=2)
    texts = [some_attention(T, 2, 2, 4, seed, sharpness=3.0) for seed in range(N)]
    later = torch.stack([text.read_later() for text in texts]).mT
    hidden = torch.cat([torch.log(later + 1e-6), torch.randn(N, T, 6)], dim=-1)
    found, larger = fit(hidden, texts, [gsa, preset("exact", slots=40, sinks=2)], "far")
    assert larger["recent"].max() <= 38 and not torch.equal(larger["recent"], found["recent"])
    bonus = hidden @ found["bonus.weight"].T + found["bonus.bias"]
    assert bonus[:, gsa.sinks :].mean((0, 1)).abs().max() < 1e-2 * bonus.std()
    told = slice(gsa.sinks, T - distances(T)[1])
    for h in range(2):
        pair = torch.stack([bonus[:, told, h].flatten(), hidden[:, told, h].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.99
    assert (found["recent"] >= 1).all() and (found["recent"] <= 14).all()


def test_settings_are_chosen_on_texts_with_lookups(monkeypatch):
    chosen = []
    monkeypatch.setattr(evict, "choose", lambda *given: chosen.append(given) or choose(*given))
    texts, hidden = [some_attention(200, 2, 2, 4, seed, 3.0) for seed in range(8)], torch.randn(8, 200, 6)
    fit(hidden, texts, [preset("exact", slots=16, sinks=2)], "far")
    ((score, taken, _, times),) = chosen
    assert times == REACH["far"]
    assert [next(n for n, text in enumerate(texts) if text is one) for one in taken] == [7, 5] and len(score) == 2

    monkeypatch.setattr(evict, "blocks", lambda tokenizer, specs, *_: specs)
    assert evict.score_texts(None, ["a", "b"], 4, 8) == ["a", "lookups:a", "b", "lookups:b"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "long.jsonl"
    draw = torch.Generator().manual_seed(2)
    rows = [torch.randint(97, 123, (2000,), generator=draw).tolist() for _ in range(6)]
    file.write_text("".join(json.dumps({"text": "".join(map(chr, row))}) + "\n" for row in rows))
    return file


def test_a_conversion_is_verified_both_ways(tiny_llama, text, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--slots", "16", "--sinks", "2", "--eviction", "score", "--eviction-text", str(text)]
    assert main(["convert", str(tiny_llama), str(out), *words]) == 0
    assert "\nscores fit  in " in (printed := capsys.readouterr().out) and "\nverified\n" in printed
    assert main(["verify", str(out), "--source", str(tiny_llama), "--by-layer"]) == 0
    model = load_gsa(open_source(out))
    ids = torch.tensor([[5 + i * i % 40 for i in range(90)]])
    with torch.inference_mode():
        known = bonuses(model, ids)
        logits = model(ids).logits
        assert all(x.shape == (90, 2) and x.std() > 0 for x in known.values())
        with decided(model, known):
            torch.testing.assert_close(model(ids).logits, logits)
        with decided(model, {i: -x for i, x in known.items()}):
            assert (model(ids).logits - logits).abs().max() > 1e-3
        torch.testing.assert_close(model(ids).logits, logits)  # and nothing is left of it


@torch.inference_mode()
def test_what_is_left_without_scores_is_a_window(tiny_llama, text, tmp_path):
    models = {}
    for eviction in ("score", "oldest"):
        convert(str(tiny_llama), str(tmp_path / eviction), slots=16, sinks=2, eviction=eviction, verify=False,
                eviction_text=[str(text)])  # fmt: skip
        models[eviction] = load_gsa(open_source(tmp_path / eviction))
    entries = open_models([str(tmp_path / eviction) for eviction in models])
    assert [entry.has_learned() for entry in entries] == [True, False]
    ids = torch.tensor([[5 + i * i % 40 for i in range(90)]])
    expected = models["oldest"](ids).logits
    assert (models["score"](ids).logits - expected).abs().max() > 1e-3
    assert window_only(models["score"])
    torch.testing.assert_close(models["score"](ids).logits, expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--preset", "paper", "--sinks", "0"],
            "preset 'paper' has no clock",
        ),
        (["--eviction", "oldest", "--eviction-reach", "near"], "nothing is scored"),
        (["--eviction-text", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--eviction-text", "short.jsonl"], "nearest valid: --eviction-text shipped:train"),
    ],
)
def test_what_cannot_be_is_one_line(words, message, tiny_llama, tmp_path, tmp_path_factory, capsys, monkeypatch):
    out, here = tmp_path / "out", tmp_path_factory.mktemp("here")
    (here / "short.jsonl").write_text(json.dumps({"text": "too short"}) + "\n")
    monkeypatch.chdir(here)
    options = ["--slots", "16", "--sinks", "2", "--eviction", "score", *words]
    assert main(["convert", str(tiny_llama), str(out), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") <= 2 and not list(tmp_path.iterdir())
