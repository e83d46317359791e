"""Each task against a plain computation of the same number, and a whole comparison of two tiny models."""

import json
import math
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from t2r import cli
from t2r.convert import convert
from t2r.errors import UserError
from t2r.evaluate import compare
from t2r.evaluate.efficiency import cache_bytes, greedy, state_bytes
from t2r.evaluate.likelihood import LastWord, MultipleChoice, Passage, encode_pair, score
from t2r.evaluate.models import load, open_models, pick_dtype, window_only
from t2r.evaluate.perplexity import Perplexity, token_nll
from t2r.evaluate.recall import FACT, Recall
from t2r.evaluate.recipe import load_recipe
from t2r.evaluate.statistics import mcnemar, paired, perplexity, share, wilson
from t2r.evaluate.task import OWN_DATA, Place, rows

ROOT = Path(__file__).resolve().parents[1]
SLOTS = 16
HERE = Place()


def byte_tokenizer(bos=False):
    """One token a byte, so that every length in a test can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {character: i + 2 for i, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Llama and its conversion."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=258, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, **sizes)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "llama")
    byte_tokenizer().save_pretrained(folder / "llama")
    convert(str(folder / "llama"), str(folder / "gsa"), slots=SLOTS, sinks=2, verify=False)
    return folder


@pytest.fixture(scope="module", params=["llama", "gsa"])
def model(request, folders):
    return AutoModelForCausalLM.from_pretrained(folders / request.param).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def plain_losses(model, ids):
    """[B, T-1] by the definition."""
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


# Likelihoods


@pytest.mark.parametrize("segment", [1, 7, 64, 1000])
def test_token_nll_is_cross_entropy_however_it_is_cut(model, segment):
    ids = torch.randint(2, 258, (2, 70))
    nll = token_nll(model, ids[:, : 10 if segment == 1 else 70], segment)
    assert nll.dtype == torch.float32 and nll.device.type == "cpu"
    assert torch.allclose(nll, plain_losses(model, ids)[:, : nll.shape[1]], atol=1e-4)


def test_perplexity_by_position(model, tokenizer, tmp_path):
    texts = ["x" * 50 + "y" * 45, "short", "abcdefgh" * 8]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    task = Perplexity("p", data="d.jsonl", field="body", block=40, edges=[0, 8, 40], totals=[20, 40])
    blocks = task.prepare(tokenizer, Place(tmp_path))
    joined = [tokenizer.encode(text) for text in texts]
    assert blocks == [joined[0][:40], joined[0][40:80], joined[2][:40]]  # no block crosses a document's end
    assert task.coverage == "3 of 3 blocks"
    nll = plain_losses(model, torch.tensor(blocks))
    # column t - 1 is token t, and token 0 is not predicted
    expected = {"[0, 8)": nll[:, :7], "[8, 40)": nll[:, 7:], "first 20": nll[:, :19], "first 40": nll}
    metrics = {metric.name: metric for metric in task.run(model, blocks).metrics}
    assert metrics.keys() == expected.keys()
    for name, part in expected.items():
        means = part.mean(-1)
        assert metrics[name].value == pytest.approx(means.mean().exp().item(), rel=1e-4)
        error = means.mean().exp() * means.std() / math.sqrt(3)
        assert metrics[name].stderr == pytest.approx(error.item(), rel=1e-3)
    assert [metrics[name].x for name in expected] == [8, 40, None, None]


def naive_score(model, passage):
    """One passage alone, without padding, from all of its logits."""
    ids, start = torch.tensor([passage.ids]), passage.start
    with torch.no_grad():
        logits = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
    target = ids[0, start:]
    return -logits.gather(-1, target[:, None]).sum().item(), bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_scores_depend_neither_on_the_batch_nor_on_its_padding(model, batch_size):
    lengths = [(3, 1), (40, 39), (25, 20), (25, 3), (60, 55), (2, 1), (33, 30)]
    passages = [Passage(torch.randint(2, 258, (length,)).tolist(), start) for length, start in lengths]
    passages.append(Passage([*range(2, 30), *greedy(model, torch.arange(2, 30)[None], 4)[0]], 28))
    scores = score(model, passages, batch_size)
    expected = [naive_score(model, passage) for passage in passages]
    assert [s.loss for s in scores] == pytest.approx([loss for loss, _ in expected], abs=1e-4)
    assert [s.greedy for s in scores] == [hit for _, hit in expected]
    assert scores[-1].greedy and not scores[1].greedy


def test_a_pair_is_split_where_the_contexts_own_tokens_end(tokenizer):
    ids, start = encode_pair(tokenizer, "ab  ", "cd")
    assert tokenizer.decode(ids) == "ab  cd" and start == 2  # the spaces belong to the continuation
    with_bos = byte_tokenizer(bos=True)
    ids, start = encode_pair(with_bos, "ab", " cd")
    assert ids[0] == 0 and start == 3
    for tokens in (tokenizer, with_bos):  # no context: the continuation follows what begins a text
        ids, start = encode_pair(tokens, "", "cd")
        assert ids == [0, *tokenizer.encode("cd")] and start == 1


@pytest.mark.parametrize(
    "format, row",
    [
        ("piqa", {"goal": "Q", "sol1": "one", "sol2": "another", "label": 1}),
        ("arc", {"question": "Q", "choices": {"text": ["one", "another"], "label": ["1", "2"]}, "answerKey": "2"}),
        ("plain", {"query": "Question: Q\nAnswer:", "choices": ["one", "another"], "gold": 1}),
    ],
)
def test_every_format_of_multiple_choice_asks_the_same(format, row, tokenizer, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    (question,) = MultipleChoice("m", data="d.jsonl", format=format).prepare(tokenizer, Place(tmp_path))
    texts = [tokenizer.decode(choice.ids) for choice in question.choices]
    assert texts == ["Question: Q\nAnswer: one", "Question: Q\nAnswer: another"]
    assert {choice.start for choice in question.choices} == {len("Question: Q\nAnswer:")}
    assert question.lengths == [3, 7] and question.gold == 1


def test_hellaswag_is_cleaned_of_its_markup(tokenizer, tmp_path):
    row = {"activity_label": "Tying", "ctx_a": "A [header] knot.", "ctx_b": "she", "endings": ["ends [title] it", "x"]}
    (tmp_path / "d.jsonl").write_text(json.dumps({**row, "label": "1"}))
    (question,) = MultipleChoice("m", data="d.jsonl", format="hellaswag").prepare(tokenizer, Place(tmp_path))
    texts = [tokenizer.decode(choice.ids) for choice in question.choices]
    assert texts == ["Tying: A knot. She ends. it", "Tying: A knot. She x"] and question.gold == 1


def test_data_below_the_folder_of_the_command_line(folders, tokenizer, tmp_path, recipe):
    (tmp_path / "eval" / "words").mkdir(parents=True)
    (tmp_path / "eval" / "words" / "a.jsonl").write_text(json.dumps({"context": "a", "continuation": "b"}))
    path = recipe(tasks=[{"kind": "last_word", "name": "words", "data": "eval:words/a.jsonl"}])
    models, out = [str(folders / "llama"), str(folders / "gsa")], str(tmp_path / "out")
    for data, message in [
        (None, "needs the folder of the data .in --data"),
        (str(tmp_path / "evil"), "no folder .*nearest valid: .*eval"),
        (str(tmp_path), "no data file eval:words/a.jsonl"),
    ]:
        with pytest.raises(UserError, match=message):
            compare(models, path, out, data=data)
    assert compare(models, path, out, data=str(tmp_path / "eval"))["coverage"] == {"words": "1 of 1 items"}


def test_multiple_choice_against_a_naive_implementation(model, tokenizer):
    task = MultipleChoice("m", items=12, batch_size=5)
    items = task.prepare(tokenizer, Place(on_cpu=False))
    raw = list(rows(OWN_DATA / "piqa.jsonl.gz"))[:12]
    acc, acc_norm = [], []
    for item, row in zip(items, raw, strict=True):
        logliks = [-naive_score(model, choice)[0] for choice in item.choices]
        per_character = [ll / len(row[key]) for ll, key in zip(logliks, ("sol1", "sol2"), strict=True)]
        acc.append(logliks.index(max(logliks)) == row["label"])
        acc_norm.append(per_character.index(max(per_character)) == row["label"])
    metrics = task.run(model, items).metrics
    assert [m.name for m in metrics] == ["acc", "acc_norm"]
    assert [m.samples for m in metrics] == [acc, acc_norm]


def test_last_word(model, tokenizer, tmp_path):
    known = tokenizer.decode(greedy(model, torch.tensor([tokenizer.encode("once upon a")]), 1)[0])
    lines = [{"context": "once upon a", "continuation": "time"}, {"context": "the end", "continuation": "is"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = LastWord("l", data="d.jsonl")
    items = task.prepare(tokenizer, Place(tmp_path))
    assert tokenizer.decode(items[0].ids[items[0].start :]) == " time"
    losses = [naive_score(model, item)[0] for item in items]
    accuracy, ppl = task.run(model, items).metrics
    assert accuracy.value == 0 and known != " "
    assert ppl.value == pytest.approx(math.exp(sum(losses) / 2), rel=1e-4)


# Recall


def recall(**options):
    return Recall("r", **{"items": 4, "distances": [24, 64, 128], "every": 64, **options})


def test_a_fact_lies_at_the_stated_distance(tokenizer):
    stops = recall().prepare(tokenizer, HERE)
    stream, seen = [], []
    for read, asks in stops:
        stream += read
        for distance, fact in asks:
            before = tokenizer.decode(stream[: len(stream) - distance])
            assert before.endswith(f"{FACT.format(fact.name)} {fact.value}.\n")
            assert tokenizer.decode(fact.question + fact.answer) == f"{FACT.format(fact.name)} {fact.value}"
            assert tokenizer.decode(stream).count(f"{FACT.format(fact.name)} ") == 1
            seen.append((distance, fact.name))
    assert len(seen) == len(set(seen)) == 12


def test_the_questions_are_the_same_each_time_and_others_with_another_seed(tokenizer):
    assert recall().prepare(tokenizer, HERE) == recall().prepare(tokenizer, HERE)
    assert recall().prepare(tokenizer, HERE) != recall(seed=1).prepare(tokenizer, HERE)


def test_asking_aside_is_asking_after_the_whole_text(model, tokenizer):
    task = recall()
    stops = task.prepare(tokenizer, HERE)
    stream, records = [], iter(task.run(model, stops).records)
    for read, asks in stops:
        stream += read
        for distance, fact in asks:
            passage = Passage([*stream, *fact.question, *fact.answer], len(stream) + len(fact.question))
            loss, hit = naive_score(model, passage)
            record = next(records)
            assert (record["distance"], record["name"], record["hit"]) == (distance, fact.name, hit)
            assert record["loss"] == pytest.approx(loss, abs=1e-3)


class Knowing:
    """In a model's place: answers the questions that it knows, and gives wrong digits to all others."""

    device = torch.device("cpu")

    def __init__(self, config, known):
        self.config, self.known = config, known

    def __call__(self, ids, logits_to_keep=0, **kwargs):
        logits = torch.zeros(*ids.shape, self.config.vocab_size)
        for row, tokens in enumerate(ids.tolist()):
            for question, answer in self.known:
                if tokens[: len(question)] == question:
                    for i, token in enumerate(answer):
                        logits[row, len(question) - 1 + i, token] = 10.0
        return type("Output", (), {"logits": logits})


def test_recall_counts_exact_answers(folders, tokenizer):
    task = recall(items=4)
    stops = task.prepare(tokenizer, HERE)
    facts = {fact.name: fact for stop in stops for _, fact in stop.asks}
    config = AutoModelForCausalLM.from_pretrained(folders / "llama").config
    first, second, third, _ = facts.values()
    wrong = [*third.answer[:-1], third.answer[-1] ^ 1]  # its last digit
    known = [(first.question, first.answer), (second.question, second.answer), (third.question, wrong)]
    outcome = task.run(Knowing(config, known), stops)
    assert [(m.x, m.value, m.n) for m in outcome.metrics] == [(24, 0.5, 4), (64, 0.5, 4), (128, 0.5, 4)]


# Cost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_state_are_those_of_the_real_cache(folders, dtype):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    sliding = MistralConfig(num_key_value_heads=2, head_dim=16, sliding_window=16, **sizes)
    some = [AutoModelForCausalLM.from_pretrained(folders / name, dtype=dtype) for name in ("llama", "gsa")]
    for model in [*some, AutoModelForCausalLM.from_config(sliding, dtype=dtype)]:
        for length in (8, 40):
            cache = DynamicCache(config=model.config)
            model(torch.ones(1, length, dtype=torch.long), past_key_values=cache)
            assert cache_bytes(cache) == state_bytes(model.config, length, dtype.itemsize) > 0


def test_greedy_is_what_generate_gives(model):
    ids = torch.arange(5, 25)[None]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, 20:].tolist()
    tokens, stamps = greedy(model, ids, 12, end=1)
    assert tokens == expected and stamps == sorted(stamps) and len(stamps) == len(tokens)
    assert greedy(model, ids, 12, end=tokens[2])[0] == tokens[: tokens.index(tokens[2]) + 1]


# Statistics


def test_wilson_interval():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    for hits in range(33):
        low, high = wilson(hits, 32)
        assert 0 <= low <= hits / 32 <= high <= 1


def test_mcnemar():
    first = [1] * 2 + [0] * 10 + [1] * 30
    second = [0] * 2 + [1] * 10 + [1] * 30
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(first, first) == 1.0


def test_paired_changes():
    a, b = perplexity("p", [1.0, 2.0, 3.0]), perplexity("p", [1.5, 2.5, 3.5])
    assert a.value == pytest.approx(math.exp(2)) and a.stderr == pytest.approx(math.exp(2) / math.sqrt(3))
    assert paired(a, b) == pytest.approx({"ratio": math.exp(0.5), "stderr": 0.0})
    change = paired(share("s", [True, False, False, True]), share("s", [True, True, True, True]))
    assert change == pytest.approx({"difference": 0.5, "stderr": math.sqrt(1 / 3 / 4), "p": 0.5})
    assert perplexity("p", [2000.0, 2000.0]).value == math.inf


# Models


def test_the_original_is_rounded_as_its_conversion_was(folders, tmp_path):
    convert(str(folders / "llama"), str(tmp_path / "half"), slots=SLOTS, sinks=2, dtype="bfloat16", verify=False)
    entries = open_models([str(folders / "llama"), str(tmp_path / "half")])
    assert pick_dtype(entries, None) == (torch.bfloat16, torch.bfloat16)
    dtype, stored = pick_dtype(entries, "float32")
    original, converted = (load(entry, dtype, stored, torch.device("cpu")) for entry in entries)
    theirs = converted.state_dict()
    for name, tensor in original.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, theirs[name])


def test_window_only_undoes_training(folders):
    start, trained = (AutoModelForCausalLM.from_pretrained(folders / "gsa").eval() for _ in range(2))
    assert not window_only(start)
    ids = torch.randint(2, 258, (1, 60))
    for layer in trained.model.layers:
        torch.nn.init.normal_(layer.self_attn.f_proj.weight, std=100.0)
    assert (trained(ids).logits - start(ids).logits).abs().max() > 1e-2
    assert window_only(trained)
    assert torch.equal(trained(ids).logits, start(ids).logits)


# A whole comparison


TASKS = [
    {"kind": "perplexity", "block": 64, "edges": [0, 16, 64], "totals": [64], "items": 2},
    {"kind": "last_word", "name": "lambada", "items": 3},
    {"kind": "multiple_choice", "name": "piqa", "items": 3},
    {"kind": "recall", "items": 2, "distances": [64, 128]},
    {"kind": "generation", "prompts": ["Hello"], "new": 4},
    {"kind": "memory", "lengths": [512, 131072], "check_at": 32},
    {"kind": "speed", "prompt": 8, "new": 3},
]


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({"tasks": TASKS, **changes}))
        return str(path)

    return write


def test_a_comparison(folders, tmp_path, recipe, capsys):
    trained = tmp_path / "trained"
    model = AutoModelForCausalLM.from_pretrained(folders / "gsa")
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.f_proj.weight, std=100.0)
    model.save_pretrained(trained)
    byte_tokenizer().save_pretrained(trained)
    out = tmp_path / "new" / "report"
    returned = compare([f"teacher={folders / 'llama'}", str(folders / "gsa"), str(trained)], recipe(), str(out))

    report = json.loads((out / "report.json").read_text())
    assert report == returned and report["schema_version"] == 1
    keys = {"versions", "hardware", "date", "device", "dtype", "recipe", "coverage", "notes", "models", "results"}
    assert report.keys() == keys | {"schema_version"}
    assert report["versions"].keys() == {"t2r", "torch", "transformers", "python"}
    assert [task["kind"] for task in report["recipe"]["tasks"]] == [task["kind"] for task in TASKS]
    assert report["recipe"]["tasks"][3]["every"] == 64  # defaults are spelled out
    kinds = {"teacher": "original", "gsa": "converted", "trained": "converted"}
    assert {label: m["what"] for label, m in report["models"].items()} == {
        **kinds,
        "trained, window only": "window ablation",
    }
    for m in report["models"].values():
        assert m["tokens"] > 0 and m["parameters"] > 0 and m["seconds"] >= 0
    results = report["results"]
    assert list(results) == ["perplexity", "lambada", "piqa", "recall", "generation", "memory", "speed"]
    fields = {"unit", "value", "low", "high", "stderr", "n", "x"}
    for task in results.values():
        assert task.keys() == {"metrics", "changes", "text"}
        assert all(metric.keys() == fields for row in task["metrics"].values() for metric in row.values())

    # a conversion equals its original within its slots, and the ablation of the trained one equals the untrained one
    within = results["perplexity"]["changes"]["[0, 16)"]
    assert within["gsa"]["ratio"] == pytest.approx(1, abs=1e-4)
    assert abs(within["trained"]["ratio"] - 1) > 1e-3
    for row in results["perplexity"]["metrics"].values():
        assert row["trained, window only"] == row["gsa"]
    memory = results["memory"]["metrics"]["131,072 tokens"]
    assert memory.keys() == kinds.keys()  # the ablation costs what its model costs
    assert memory["gsa"]["value"] < memory["teacher"]["value"]

    for name in ("perplexity.png", "recall.png", "memory.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert {file.suffix for file in out.iterdir()} == {".png", ".md", ".json", ".jsonl"}
    lines = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert sum(line["task"] == "piqa" and line["model"] == "gsa" for line in lines) == 3
    text = (out / "report.md").read_text()
    assert "|  | teacher | gsa | trained | trained, window only |" in text
    assert "![Recall by distance](recall.png)" in text and "Here: 3 of 300 items." in text
    printed = capsys.readouterr().out
    assert "recall at 128 tokens" in printed and f"wrote {out / 'report.md'}" in printed
    assert [path.name for path in out.parent.iterdir()] == ["report"]


def test_the_command_line(folders, tmp_path, recipe, capsys):
    path, out = recipe(tasks=[{"kind": "last_word", "items": 1}]), tmp_path / "report"
    words = ["compare", f"a={folders / 'llama'}", str(folders / "gsa"), "--recipe", path, "--out", str(out)]
    assert cli.main([*words, "--limit", "1", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert (list(report["models"]), report["dtype"]) == (["a", "gsa"], "bfloat16")
    capsys.readouterr()
    assert cli.main(words) == 2
    printed, error = capsys.readouterr()
    assert printed == "" and error.startswith(f"t2r: {out} already exists") and error.count("\n") == 1


def test_ablation_off(folders, tmp_path, recipe):
    trained = tmp_path / "trained"
    model = AutoModelForCausalLM.from_pretrained(folders / "gsa")
    torch.nn.init.normal_(model.model.layers[0].self_attn.f_proj.weight)
    model.save_pretrained(trained)
    byte_tokenizer().save_pretrained(trained)
    for ablation in (True, False):
        tasks = [{"kind": "last_word", "items": 1}]
        words = [str(folders / "llama"), str(trained)]
        report = compare(words, recipe(tasks=tasks, ablation=ablation), str(tmp_path / f"report-{ablation}"))
        assert ("trained, window only" in report["models"]) == ablation


def test_limit(folders, tmp_path, recipe):
    out = tmp_path / "report"
    tasks = [{"kind": "last_word", "name": "words", "items": 5}]
    report = compare([str(folders / "llama"), str(folders / "gsa")], recipe(tasks=tasks), str(out), limit=2)
    assert report["results"]["words"]["metrics"]["accuracy"]["gsa"]["n"] == 2
    assert report["coverage"] == {"words": "2 of 300 items"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"recipe": "quik"}, "no configuration 'quik'.*nearest valid: quick"),
        ({"tasks": [{"kind": "perplexty"}]}, "tasks.0: unknown kind 'perplexty'.*nearest valid: perplexity"),
        ({"tasks": [{"name": "p"}]}, "tasks.0: no kind"),
        ({"tasks": []}, "no tasks"),
        ({"tasks": [{"kind": "recall", "distance": [3]}]}, "unknown key 'tasks.0.distance'.*nearest valid: distances"),
        ({"tasks": [{"kind": "speed"}, {"kind": "speed"}]}, "tasks.1: a second task is named 'speed'"),
        ({"tasks": [{"kind": "perplexity", "block": "long"}]}, "tasks.0.block is 'long', expected a whole number"),
        ({"tasks": [{"kind": "perplexity", "data": "none.txt"}]}, "no data file none.txt"),
        ({"tasks": [{"kind": "perplexity", "data": "shipped:txt"}]}, "no data file shipped:txt.*nearest valid: text"),
        ({"tasks": [{"kind": "perplexity", "field": "txt"}]}, "no field 'txt'.*nearest valid: text"),
        ({"tasks": [{"kind": "perplexity", "block": 10**6}]}, "no document of 1000000 tokens"),
        ({"tasks": [{"kind": "perplexity", "edges": [8, 4]}]}, r"edges \[8, 4\] do not rise"),
        ({"tasks": [{"kind": "perplexity", "totals": [1]}]}, "token 0 has nothing before it"),
        ({"tasks": [{"kind": "memory", "name": "../m"}]}, "tasks.0.name '../m' does not fit a file name"),
        ({"tasks": [{"kind": "last_word", "items": 0}]}, "tasks.0.items is 0, it must be positive"),
        ({"tasks": [{"kind": "multiple_choice", "format": "pica"}]}, "unknown format 'pica'.*nearest valid: piqa"),
        ({"tasks": [{"kind": "recall", "every": 8, "distances": [16]}]}, "a fact takes .* tokens, more than every = 8"),
        ({"tasks": [{"kind": "recall", "items": 500}]}, "500 facts and 16 after the last, but there are"),
        (
            {"tasks": [{"kind": "recall", "every": 8}]},
            "32 facts and 128 after the last.*nearest valid: a larger `every`",
        ),
        ({"tasks": [{"kind": "generation"}]}, "no prompts"),
        ({"models": ["{llama}"]}, "nothing to compare with"),
        ({"models": ["{llama}", "a={llama}/../llama", "a={gsa}"]}, "two models are called 'a'"),
        ({"models": ["{llama}", "{llama}x"]}, "no such folder.*nearest valid: llama"),
        ({"models": ["{llama}", "{other}"]}, "the tokenizers of llama and other differ"),
        ({"out": "{llama}"}, r"llama already exists.*--out .*llama-2"),
        ({"limit": 0}, "0 items are nothing to compare"),
        ({"device": "gpu"}, "no device 'gpu'.*nearest valid: cpu"),
    ],
)
def test_a_mistake_is_one_line_before_any_model_is_run(change, message, folders, tmp_path, recipe, monkeypatch):
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(folders / "llama").save_pretrained(other)
    byte_tokenizer(bos=True).save_pretrained(other)
    monkeypatch.setattr(import_module("t2r.evaluate.run"), "load", None)
    places = {"llama": folders / "llama", "gsa": folders / "gsa", "other": other}
    words = [word.format(**places) for word in change.get("models", ["{llama}", "{gsa}"])]
    path = change.get("recipe") or recipe(**({"tasks": change["tasks"]} if "tasks" in change else {}))
    options = {key: change[key] for key in ("limit", "device") if key in change}
    out = change.get("out", str(tmp_path / "new" / "report")).format(**places)
    with pytest.raises(UserError, match=message) as error:
        compare(words, path, out, **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "holds no rows"),
        ('{"goal": "a", "sol1": "a", "sol2": "b", "label": 0}\n{', "line 2 cannot be read"),
        ('["goal"]', "line 1 cannot be read: not a JSON object"),
        ('{"goal": 3, "sol1": "a", "sol2": "b", "label": 0}', "field 'goal' is 3, expected str"),
        ('{"goal": "a", "sol1": "a", "sol2": "b", "label": 2}', "no right answer among the choices"),
    ],
)
def test_damaged_data(content, message, tokenizer, tmp_path):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        MultipleChoice("m", data="d.jsonl").prepare(tokenizer, Place(tmp_path))


def test_without_matplotlib_nothing_is_run(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"need matplotlib; try: `pip install 't2r\[demo\]'`"):
        compare([str(folders / "llama"), str(folders / "gsa")], out=str(tmp_path / "report"))
    assert not (tmp_path / "report").exists()


def test_a_run_that_fails_leaves_nothing(folders, tmp_path, recipe, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("t2r.evaluate.run"), "evaluate_one", fail)
    with pytest.raises(KeyboardInterrupt):
        compare([str(folders / "llama"), str(folders / "gsa")], recipe(), str(tmp_path / "new" / "report"))
    assert not (tmp_path / "new").exists()


# What ships


def test_the_quick_recipe_keeps_its_budget():
    tasks = {task.name: task for task in load_recipe("quick").tasks}
    generated = tasks["generation"].new + 20 + 2 * (tasks["speed"].prompt + tasks["speed"].new) + 20
    budget = sum(task.cpu_tokens or 0 for task in tasks.values()) + generated + tasks["memory"].check_at
    assert budget <= 30_000
    assert all(task.cpu_tokens for task in tasks.values() if task.quality and task.name != "generation")


def test_the_data_that_ships():
    files = sorted(OWN_DATA.glob("*.jsonl.gz"))
    assert {file.name: sum(1 for _ in rows(file)) for file in files} == {
        "lambada.jsonl.gz": 300,
        "piqa.jsonl.gz": 300,
        "text.jsonl.gz": 36,
    }
    assert sum(file.stat().st_size for file in files) < 1_200_000
    licences = (OWN_DATA / "LICENSES.md").read_text()
    assert all(f"`{file.name}`" in licences for file in files)
    sources = {row["source"] for row in rows(OWN_DATA / "text.jsonl.gz")}
    assert all(f"source `{source}`" in licences for source in sources)
