"""Each task against a plain computation of the same number."""

import json
import math

import pytest
import torch
import zstandard
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig

from t2r.errors import UserError
from t2r.evaluate.efficiency import cache_bytes, greedy, state_bytes
from t2r.evaluate.likelihood import LastWord, MultipleChoice
from t2r.evaluate.perplexity import Perplexity, token_nll
from t2r.evaluate.recall import FACT, Recall
from t2r.evaluate.scoring import Passage, batches, encode_pairs, score
from t2r.evaluate.task import OWN_DATA, Place, rows
from t2r.evaluate.throughput import Throughput
from t2r.modeling.cache import CACHE

HERE = Place()


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
    # three that differ in their last token only, one of them split elsewhere
    passages += [Passage([*range(40, 70), last], start) for last, start in ((7, 30), (8, 30), (9, 20))]
    passages.append(Passage([*range(2, 30), *greedy(model, torch.arange(2, 30)[None], 4)[0]], 28))
    scores = score(model, passages, batch_size)
    expected = [naive_score(model, passage) for passage in passages]
    assert [s.loss for s in scores] == pytest.approx([loss for loss, _ in expected], abs=1e-4)
    assert [s.greedy for s in scores] == [hit for _, hit in expected]
    assert scores[-1].greedy and not scores[1].greedy


def test_a_pair_is_split_where_the_contexts_own_tokens_end(tokenizer, byte_tokenizer):
    ((ids, start),) = encode_pairs(tokenizer, [("ab  ", "cd")])
    assert tokenizer.decode(ids) == "ab  cd" and start == 2  # the spaces belong to the continuation
    with_bos = byte_tokenizer(bos=True)
    ((ids, start),) = encode_pairs(with_bos, [("ab", " cd")])
    assert ids[0] == 0 and start == 3
    for tokens in (tokenizer, with_bos):  # no context: the continuation follows what begins a text
        ((ids, start),) = encode_pairs(tokens, [("", "cd")])
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
    assert [(m.name, m.chance) for m in metrics] == [("acc", 0.5), ("acc_norm", 0.5)]
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
            model(torch.ones(1, length, dtype=torch.long), **{CACHE: cache})
            assert cache_bytes(cache) == state_bytes(model.config, length, dtype.itemsize) > 0


def test_greedy_is_what_generate_gives(model):
    ids = torch.arange(5, 25)[None]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, 20:].tolist()
    tokens, stamps = greedy(model, ids, 12, end=1)
    assert tokens == expected and stamps == sorted(stamps) and len(stamps) == len(tokens)
    assert greedy(model, ids, 12, end=tokens[2])[0] == tokens[: tokens.index(tokens[2]) + 1]


def test_throughput_measures_each_point(model, tokenizer):
    task = Throughput("t", contexts=[24, 40], batches=[1, 2], segment=16, new=4, repeats=1, cpu_tokens=48)
    points = task.prepare(tokenizer, HERE)
    assert points == [(1, 24), (1, 40), (2, 24)] and task.coverage == "3 of 4 points"
    outcome = task.run(model, points)
    found = {m.name: m for m in outcome.metrics}
    for batch, context in points:
        cache = DynamicCache(config=model.config)
        model(torch.ones(batch, context + 3, dtype=torch.long), **{CACHE: cache})
        assert found[f"state, {batch} x {context}"].value == cache_bytes(cache)
        for key in ("decode", "prefill", "first token"):
            assert found[f"{key}, {batch} x {context}"].value > 0
        assert found[f"prefill, {batch} x {context}"].value == pytest.approx(
            batch * context / found[f"first token, {batch} x {context}"].value
        )
    assert not any(name.startswith("peak") for name in found)  # a CPU has none
    assert [m.x for m in outcome.metrics if m.x] == [24, 40]


def test_throughput_ends_where_memory_does(model, tokenizer, monkeypatch):
    task = Throughput("t", contexts=[8, 16, 32], batches=[1, 2], new=2, repeats=1)
    point = Throughput.point

    def small(self, model, batch, context):
        if batch * context > 16:
            raise torch.OutOfMemoryError("no")
        return point(self, model, batch, context)

    monkeypatch.setattr(Throughput, "point", small)
    outcome = task.run(model, task.prepare(tokenizer, HERE))
    assert [(r["batch"], r["context"]) for r in outcome.records] == [(1, 8), (1, 16), (2, 8)]
    assert outcome.text == "batch 1: out of memory from 32 tokens on\nbatch 2: out of memory from 16 tokens on"


def test_batches_halve_where_memory_ends_and_hold_like_lengths():
    device, sizes = torch.device("cpu"), []

    def work(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no")

    batches(list(range(11)), None, device, work)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]

    read = []
    batches([900, 800, 500, 400, 60, 40, 29], 8, device, read.append, length=lambda item: item)
    assert read == [[900, 800, 500], [400], [60, 40], [29]]  # none is padded to more than twice its length

    def never(batch):
        raise torch.OutOfMemoryError("no")

    with pytest.raises(UserError, match="out of memory on cpu: not even one item fits .in --batch-size."):
        batches([1, 2], None, device, never)
    with pytest.raises(UserError, match="not a batch of 2 fits.*nearest valid: auto"):
        batches([1, 2], 4, device, never)


def test_pieces_of_a_document_are_joined(tokenizer, tmp_path):
    pieces = [("a", "x" * 30), ("b", "y" * 50), ("a", "z" * 30), ("c", "short")]
    lines = [json.dumps({"text": text, "title": title}) + "\n" for title, text in pieces]
    with zstandard.open(tmp_path / "d.jsonl.zst", "wt") as file:
        file.writelines(lines)
    options = dict(data="d.jsonl.zst", join="title", block=25, edges=[0, 25], totals=[])
    blocks = Perplexity("p", **options).prepare(tokenizer, Place(tmp_path))
    assert [tokenizer.decode(block) for block in blocks] == ["x" * 25, "x" * 5 + "z" * 20, "y" * 25, "y" * 25]
    few = Perplexity("p", per_document=1, **options).prepare(tokenizer, Place(tmp_path))
    assert [tokenizer.decode(block) for block in few] == ["x" * 25, "y" * 25]
