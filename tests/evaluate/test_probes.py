"""Needle, pairs, copying and template: what is asked is where it should be, and right answers count."""

import json

import pytest
import torch

from t2r.errors import UserError
from t2r.evaluate.instruct import ASKED, TemplateFollowing
from t2r.evaluate.probes import Copying, Needle, Pairs, PairsLater
from t2r.evaluate.recipe import load_recipe
from t2r.evaluate.scoring import Score, continue_texts
from t2r.evaluate.task import MissingData, Place

HERE = Place()


def test_a_needle_lies_at_its_depth(tokenizer):
    task = Needle("n", items=3, lengths=[200, 3000], depths=[0.0, 0.5, 1.0])
    probes = task.prepare(tokenizer, HERE)
    assert task.coverage == "6 questions in 2 groups"
    for i, probe in enumerate(probes):
        text, answer = (
            tokenizer.decode(ids)
            for ids in (probe.passage.ids[: probe.passage.start], probe.passage.ids[probe.passage.start :])
        )
        hay, question = text.rsplit("\nCode of ", 1)
        name = question.removesuffix(":")
        fact = f"\nCode of {name}:{answer}.\n"
        assert len(hay.encode()) == probe.x and hay.count(fact) == 1
        before = len(hay[: hay.index(fact)].encode())
        assert before == round((i % 3) / 2 * (probe.x - len(fact)))
    assert probes == Needle("n", items=3, lengths=[200, 3000], depths=[0.0, 0.5, 1.0]).prepare(tokenizer, HERE)


def test_each_place_of_a_list_is_asked_for(tokenizer):
    probes = Pairs("p", items=4, counts=[4, 16]).prepare(tokenizer, HERE)
    places = {4: [], 16: []}
    for probe in probes:
        ids, start = probe.passage
        *listed, question = tokenizer.decode(ids[:start]).strip().split("\n")
        assert len(listed) == probe.x == len({line.split()[3] for line in listed})
        (place,) = [i for i, line in enumerate(listed) if line.startswith(question)]
        assert listed[place] == f"{question}{tokenizer.decode(ids[start:])}."
        places[probe.x].append(place)
    assert places == {4: [0, 1, 2, 3], 16: [0, 4, 8, 12]}


def test_text_lies_between_a_list_and_its_question(tokenizer):
    task = PairsLater("p", items=2, counts=[3], distances=[40, 90])
    for probe in task.prepare(tokenizer, HERE):
        ids, start = probe.passage
        text, answer = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])
        listed, question = text.rsplit("\nCode of ", 1)
        assert f"\nCode of {question}{answer}." in listed and listed.count("\nCode of ") == 3
        after = listed[listed.rindex("\nCode of ") :]
        assert len(tokenizer.encode(after[after.index(".") + 1 :], add_special_tokens=False)) == probe.x


def test_a_copy_is_predicted_from_its_second_word(tokenizer):
    for probe in Copying("c", items=2, lengths=[3, 9]).prepare(tokenizer, HERE):
        ids, start = probe.passage
        first, second = tokenizer.decode(ids).split("\n")
        words = first.removeprefix("List: ").split(" ")
        assert len(words) == probe.x and second == f"List again: {' '.join(words)}"
        assert tokenizer.decode(ids[:start]).endswith(f"List again: {words[0]}")


def test_right_answers_count(tokenizer, model, monkeypatch):
    said = [Score(1.0, True, 4), Score(1.0, False, 3)] * 4
    monkeypatch.setattr("t2r.evaluate.probes.score", lambda model, passages, size: said[: len(passages)])
    task = Pairs("p", items=4, counts=[2, 8])
    found = task.run(model, task.prepare(tokenizer, HERE))
    assert [(m.name, m.x, m.value, m.n) for m in found.metrics] == [("2 pairs", 2, 0.5, 4), ("8 pairs", 8, 0.5, 4)]
    task = Copying("c", items=2, lengths=[3])
    items = task.prepare(tokenizer, HERE)
    (metric,) = task.run(model, items).metrics
    rest = [len(probe.passage.ids) - probe.passage.start for probe in items]
    assert metric.value == pytest.approx(50 * (4 / rest[0] + 3 / rest[1]))


def test_a_budget_leaves_no_group_empty(tokenizer):
    task = Pairs("p", items=8, counts=[2, 32], cpu_tokens=300)
    counts = [probe.x for probe in task.prepare(tokenizer, HERE)]
    assert counts.count(32) == 1 and 1 <= counts.count(2) <= 8
    assert len(task.prepare(tokenizer, Place(on_cpu=False))) == 16


@pytest.mark.parametrize(
    "task, message",
    [
        (Needle("n", depths=[2.0]), "depths .2.0. do not lie between"),
        (Needle("n", lengths=[9]), "9 tokens do not hold a fact"),
        (Pairs("p", counts=[500]), "counts .500.: there are"),
        (PairsLater("p", distances=[0]), "distances .0.: 1 token or more"),
        (Copying("c", lengths=[1]), "lengths .1.: a list has two words"),
    ],
)
def test_mistakes(task, message, tokenizer):
    with pytest.raises(UserError, match=message):
        task.prepare(tokenizer, HERE)


GOOD = [
    "Yes.", "Paris", "5", "1, 2, 3, 4, 5", "The cat sat on the mat.", "- apple\n- pear\n- plum",
    "1. red\n2. blue\n3. green\n4. pink", "The sea is wide.", "HELLO", "Cold",
    '```json\n{"name": "Ann", "age": 3}\n```', "It is grey. It is far.", "Surely it is.", "Bye. END", "(Mars)", "12",
]  # fmt: skip
BAD = [
    "Fire is hot.", "It is Paris", "2 + 3 = 5", "1 2 3 4 5", "A cat sat on the mat.", "apple, pear, plum",
    "red blue green pink", "The sea is wide. It is deep.", "Hello", "The opposite of hot is cold",
    "Ann is 3", "It is grey.", "It is, surely.", "Bye", "Mars", "12 is larger",
]  # fmt: skip


def test_obeying_is_told_from_disobeying():
    assert [bool(obeys(text)) for (_, obeys), text in zip(ASKED, GOOD, strict=True)] == [True] * len(GOOD)
    assert [bool(obeys(text)) for (_, obeys), text in zip(ASKED, BAD, strict=True)] == [False] * len(BAD)


def test_the_template(tokenizer, byte_tokenizer, model, monkeypatch):
    with pytest.raises(MissingData, match="no chat template"):
        TemplateFollowing("t").prepare(tokenizer, HERE)
    chatty = byte_tokenizer()
    chatty.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    task = TemplateFollowing("t", items=3, new=8)
    items = task.prepare(chatty, HERE)
    assert chatty.decode(items[1]) == f"[user]{ASKED[1][0]}[assistant]"
    from t2r.evaluate.scoring import Written

    said = [Written("Yes.", True), Written("Paris<|im_end|>", True), Written("It is 5", False)]
    monkeypatch.setattr("t2r.evaluate.instruct.continue_texts", lambda *args: said)
    found = {m.name: list(m.samples) for m in task.run(model, items).metrics}
    assert found == {"obeyed": [1, 0, 0], "ended": [1, 1, 0], "clean": [1, 0, 1]}


def test_continuations_are_greedy_and_end_where_they_should(tokenizer, model):
    prompts = [tokenizer.encode(text) for text in ("once upon", "a", "the longest of these prompts")]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        expected.append(tokenizer.decode(model.generate(ids, max_new_tokens=9, do_sample=False)[0, len(prompt) :]))
    for size in (1, 2, None):
        assert [one.text for one in continue_texts(model, tokenizer, prompts, 9, [], size)] == expected
    stop = expected[0][4:6]
    (cut,) = continue_texts(model, tokenizer, prompts[:1], 9, [stop], 1)
    assert cut.text == expected[0].partition(stop)[0] and not cut.ended


@pytest.mark.parametrize(
    "name", ["recall", "long", "diagnose", "efficiency", "mmlu", "generation", "paper-table3", "paper-table4"]
)
def test_shipped_recipes_are_valid(name):
    recipe = load_recipe(name)
    assert len(recipe.tasks) >= 2 and json.dumps(recipe.to_dict())
