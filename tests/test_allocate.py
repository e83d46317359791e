"""`t2r slots`: what is measured is what a conversion becomes, and what is chosen is the best there is."""

import json
from itertools import product

import pytest
import torch
from family_cases import save_source
from transformers import AutoModelForCausalLM

from t2r.convert import convert
from t2r.convert.allocate import Allocation, Scored, Windows, choose, slots
from t2r.convert.checks import sink_distances
from t2r.convert.evict import blocks
from t2r.convert.source import open_source
from t2r.convert.verify import load_source
from t2r.errors import UserError


def test_the_choice_is_the_best_of_all():
    torch.manual_seed(0)
    changes = [{size: float(x) for size, x in zip((16, 32, 64), torch.randn(3), strict=True)} for _ in range(5)]
    for budget in (80, 144, 160, 320):
        every = (sizes for sizes in product((16, 32, 64), repeat=5) if sum(sizes) <= budget)
        best = min(every, key=lambda sizes: sum(c[size] for c, size in zip(changes, sizes, strict=True)))
        assert choose(changes, budget) == list(best)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
def test_a_measured_loss_is_that_of_the_conversion(family, tiny_llama, tmp_path):
    """Layers of 16 and 32 slots with sinks at their true distance; gemma3 has a window of its own, granite factors."""
    save_source(family, tmp_path / "source", tiny_llama)
    source = open_source(str(tmp_path / "source"))
    ids = torch.randint(3, 200, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        windows = Windows(load_source(source), ids, sinks=3)
        sizes = [16, 32]
        loss = windows.measure(sizes)
        changes = windows.changes(sizes, [(32,), ()])
        assert changes[0][32] == pytest.approx(windows.measure([32, 32]) - loss, abs=1e-6)
        assert windows.full == pytest.approx(windows.measure([256, 256]), abs=1e-6)
    option = Allocation(sizes, 0.0, 0.0, 0.0).option
    convert(str(source.path), str(tmp_path / "out"), slots=64, sinks=3, layer_slots=option, verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.inference_mode(), sink_distances(model, lambda gsa: None):
        assert model(ids, labels=ids, use_cache=False).loss.item() == pytest.approx(loss, abs=2e-5)


def test_a_measured_loss_by_score_is_that_of_the_conversion(tiny_llama, tmp_path):
    source = open_source(str(tiny_llama))
    ids, fit_ids = torch.randint(3, 200, (10, 200), generator=torch.Generator().manual_seed(0)).split([2, 8])
    with torch.inference_mode():
        scored = Scored(load_source(source), ids, 3, fit_ids)
        loss, windows = scored.measure([16, 32]), Windows.measure(Windows(scored.model, ids, 3), [16, 32])
        assert scored.changes([16, 32], [(32,), ()])[0][32] == pytest.approx(scored.measure([32, 32]) - loss, abs=1e-6)
    assert abs(loss - windows) > 1e-5
    text = tmp_path / "text.txt"
    text.write_text("The river runs to the sea, and the sea to the river. " * 40)
    convert(str(tiny_llama), str(tmp_path / "out"), sinks=3, layer_slots="0=16,1=32", verify=False, eviction="score",
            eviction_text=[str(text)])  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for (i, size), scores in scored.scores.items():
        for name, values in scores.items() if size == [16, 32][i] else ():
            model.model.layers[i].self_attn.get_parameter(name).data.copy_(values)
    with torch.inference_mode(), sink_distances(model, lambda gsa: None):
        assert model(ids, labels=ids, use_cache=False).loss.item() == pytest.approx(loss, abs=2e-5)


def parts(option):
    """0-3=16,4=32 -> ((0, 3), 16), ((4, 4), 32)"""
    for part in option.split(","):
        layers, _, size = part.partition("=")
        first, _, last = layers.partition("-")
        yield (int(first), int(last or first)), int(size)


def test_the_command_prints_an_option_that_convert_takes(tiny_llama, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The river runs to the sea, and the sea to the river. " * 40)
    slots(str(tiny_llama), slots=32, text=[str(text)], texts=2, context=200)
    last = capsys.readouterr().out.splitlines()[-1]
    words = last.split()
    assert words[:2] == ["t2r", "convert"] and words[4:6] == ["--slots", "32"] and words[6] == "--layer-slots"
    assert sum(slots * (1 + b - a) for (a, b), slots in parts(words[7])) <= 64
    convert(str(tiny_llama), str(tmp_path / "out"), slots=32, layer_slots=words[7], verify=False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i} ships and {i} more " * 60}) + "\n" for i in range(8)))
    slots(str(tiny_llama), slots=32, text=[str(rows)], texts=2, context=200, eviction="score")
    assert " --slots 32 --eviction score --layer-slots " in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(UserError, match="16 documents of 200 tokens, and none is left.*--texts 8"):
        slots(str(tiny_llama), slots=32, text=[str(rows)], texts=16, context=200, eviction="score")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"slots": 60}, "--slots 60"), ({"context": 64}, "--context more"), ({"context": 100_000}, "no document of"),
        ({"sinks": 16}, "16 sinks leave no slot of 16 .*nearest valid: 4"), ({"device": "gpu"}, "no device 'gpu'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_one_line(options, what, tiny_llama):
    with pytest.raises(UserError, match=what):
        slots(str(tiny_llama), **options)


def test_later_pieces_of_long_texts_come_after_the_first_of_all(tiny_llama, tmp_path):
    long, other = (" ".join(f"{word} {n}" for n in range(100)) for word in ("one", "two"))
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.txt").write_text(other)
    tokenizer = open_source(str(tiny_llama)).load_tokenizer()
    ids = blocks(tokenizer, [str(tmp_path / "*.txt")], texts=5, context=8)
    pieces = [long[:128], other[:128], long[128:256], other[128:256], long[256:384]]
    assert ids.tolist() == [tokenizer(piece).input_ids[:8] for piece in pieces]
    assert len(blocks(tokenizer, [str(tmp_path / "a.txt")], texts=99, context=8)) == -(-len(long) // 128)


def test_texts_are_the_first_that_are_long_enough(tiny_llama, tmp_path):
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.txt").write_text("a text that is long enough for eight tokens")
    tokenizer = open_source(str(tiny_llama)).load_tokenizer()
    ids = blocks(tokenizer, [str(tmp_path / "*.txt")], texts=4, context=8)
    assert ids.tolist() == [tokenizer("a text that is long enough for eight tokens").input_ids[:8]]
