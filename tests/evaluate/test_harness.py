"""lm-eval's tasks on a loaded model: the scores are those of lm-eval's own backend, whatever the batch."""

import copy
import re
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs `pip install 't2r[eval]'`")

from lm_eval.models.huggingface import HFLM

from t2r.errors import UserError
from t2r.evaluate import adapter, compare
from t2r.evaluate.harness import Harness, permuted
from t2r.evaluate.likelihood import LastWord, MultipleChoice
from t2r.evaluate.recipe import load_recipe
from t2r.evaluate.task import Place, locate, rows

RECIPES = Path(__file__).parents[2] / "recipes"

COMMONSENSE = {task.name: task for task in load_recipe("commonsense").tasks}
NINE = {task.name: task for task in load_recipe("paper-table3").tasks}
LONG = {task.name: task for task in load_recipe("paper-table4").tasks}
OTHERS = {task.name: task for name in ("mmlu", "generation") for task in load_recipe(name).tasks}
TASKS = {**COMMONSENSE, **LONG, **OTHERS, "nq": NINE["nq"], "triviaqa": NINE["triviaqa"], "bbh": NINE["bbh"]}


def prepared(name, tokenizer, data, **changes):
    """A task of a shipped recipe on the made-up items; one subject of the large groups, which take long to load."""
    task = copy.copy(TASKS[name])
    task.task = {"bbh": "bbh_cot_fewshot_navigate", "mmlu": "mmlu_anatomy"}.get(name, task.task)
    for key, value in changes.items():
        setattr(task, key, value)
    if name in ("nq", "triviaqa"):
        file = next(iter(task.files.values())).partition("[")[0]
        task.files = {"train": f"{file}[-4:]", "validation": f"{file}[:1]"}
        task.shots = 3
    items = task.prepare(tokenizer, Place(data=data, allow_code=True))
    for one in items["tasks"].values():
        if one.OUTPUT_TYPE == "generate_until":
            one.set_config("generation_kwargs", {"max_gen_toks": 12}, update=True)
    return task, items


def by_name(outcome):
    return {metric.name: metric for metric in outcome.metrics}


# mmlu-shuffled differs from mmlu by its rows only; humaneval needs a metric from the hub
@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("mmlu-shuffled", "humaneval")])
def test_scores_are_those_of_lm_evals_own_backend(name, model, tokenizer, eval_data):
    task, items = prepared(name, tokenizer, eval_data, max_length=4096)
    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, backend="causal", max_length=4096)
    expected = by_name(task.outcome(items, adapter.run(backend, items, task.per_task)))
    assert expected
    for batch_size in (1, 3, None):
        task.batch_size = batch_size
        found = by_name(task.run(model, items))
        assert found.keys() == expected.keys()
        for key, metric in found.items():
            if metric.unit == "ppl":
                assert metric.value == pytest.approx(expected[key].value, rel=1e-5)
            else:
                assert list(metric.samples) == list(expected[key].samples)
                assert metric.chance == expected[key].chance


def test_requests_are_encoded_once_for_all_models(model, tokenizer, eval_data, monkeypatch):
    """As long as they are the same and are cut to the same length; the scores are those of the first time."""
    encoded, original = [], adapter.encode_pairs

    def counted(tokenizer, pairs):
        encoded.append(len(pairs))
        return original(tokenizer, pairs)

    monkeypatch.setattr(adapter, "encode_pairs", counted)
    monkeypatch.setattr(adapter, "PAIRS", 7)
    task, items = prepared("mmlu", tokenizer, eval_data, max_length=4096)
    first, second = task.run(model, items), task.run(model, items)
    assert encoded == [7, 7, 6] and first == second
    task.max_length = 300
    assert task.run(model, items) != first and encoded == [7, 7, 6] * 2


def test_our_means_are_lm_evals(model, tokenizer, eval_data):
    for name in ("arc-easy", "lambada", "mmlu", "qmsum"):
        task, items = prepared(name, tokenizer, eval_data, metrics=[], max_length=4096)
        found = adapter.run(adapter.Adapter(model, tokenizer, 4, 4096), items, None)
        ours = by_name(task.outcome(items, found))
        for key, metric in ours.items():
            theirs = [row[f"{key},none"] for row in found["results"].values() if f"{key},none" in row]
            assert metric.value == pytest.approx(sum(theirs) / len(theirs)), (name, key)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_metric_has_one_unit_whatever_its_values(value):
    names = ["acc_norm", "prompt_level_strict_acc", "exact_match", "em", "contains", "pass@1", "f1", "rouge1", "bleu"]
    sample = {"filter": "none", "metrics": names, "resps": [["said"]], **dict.fromkeys(names, value)}
    units = [metric.unit for metric in Harness("t", task="any").summarise([sample] * 3)]
    assert units == ["share"] * 6 + ["score"] * 3


def test_our_own_kinds_give_the_same_numbers(model, tokenizer, eval_data):
    place = Place(data=eval_data)
    for own, name, pairs in [
        (MultipleChoice("a", data="eval:piqa/validation.jsonl"), "piqa", {"acc": "acc", "acc_norm": "acc_norm"}),
        (MultipleChoice("b", data="eval:arc_easy/validation.jsonl", format="arc"), "arc-easy", {"acc": "acc"}),
        (MultipleChoice("c", data="eval:hellaswag/validation.jsonl", format="hellaswag"), "hellaswag", {"acc": "acc"}),
        (LastWord("d", data="eval:lambada/lambada_openai.jsonl"), "lambada", {"accuracy": "acc"}),
    ]:  # fmt: skip
        ours = by_name(own.run(model, own.prepare(tokenizer, place)))
        theirs = by_name(TASKS[name].run(model, TASKS[name].prepare(tokenizer, place)))
        for key, other in pairs.items():
            assert list(ours[key].samples) == pytest.approx(list(theirs[other].samples), abs=1e-4), (name, key)


def test_a_prompt_holds_the_examples_and_a_group_its_subjects(tokenizer, eval_data):
    task = TASKS["mmlu-shuffled"]
    task.items = 57
    items = task.prepare(tokenizer, Place(data=eval_data))
    assert task.coverage == "57 of 285 items from local files, 5 shots"
    assert len(items["tasks"]) == 57 and len(items["group_map"]["mmlu"]) == 4
    subject = items["tasks"]["mmlu_anatomy"]
    subject.build_all_requests(limit=1)
    prompt = subject.instances[0].args[0]
    assert prompt.count("Answer:") == 6 and prompt.startswith("The following are multiple choice questions")
    assert "What is a small cup made of?\nA. glass\nB. paper\nC. ice\nD. salt\nAnswer: A\n\n" in prompt
    order = subject.eval_docs[0]["choices"]
    options = "".join(f"{letter}. {word}\n" for letter, word in zip("ABCD", order, strict=True))
    assert prompt.endswith(f"What is a cup made of?\n{options}Answer:")
    # of the 5 questions, each with its options in an order of its own, some are not in the order of the file
    orders = [doc["choices"] for doc in subject.eval_docs]
    assert [order[doc["answer"]] for order, doc in zip(orders, subject.eval_docs, strict=True)] == [
        "glass", "wood", "wool", "stone", "gold",
    ]  # fmt: skip
    assert [doc["answer"] for doc in subject.eval_docs] != [0, 1, 2, 3, 0]  # where the file has them


def test_shuffled_options_keep_the_right_answer():
    row = {"question": "Q", "choices": ["a", "b", "c", "d"], "answer": 2}
    orders = {tuple(permuted({**row, "question": str(i)}, 1)["choices"]) for i in range(50)}
    assert len(orders) > 15
    for i in range(50):
        other = permuted({**row, "question": str(i)}, 1)
        assert other["choices"][other["answer"]] == "c" and other == permuted({**row, "question": str(i)}, 1)


def test_the_formats_of_scrolls(tokenizer, eval_data):
    _, items = prepared("qasper", tokenizer, eval_data)
    (doc, *_) = items["tasks"]["t2r_qasper"].eval_docs
    assert doc["question"] == "What is the cup of?" and doc["references"] == ["glass", "of glass"]
    assert doc["text"].startswith("The cup in this story")
    _, items = prepared("quality", tokenizer, eval_data)
    docs = list(items["tasks"]["t2r_quality"].eval_docs)
    assert [doc["choices"][doc["gold"]] for doc in docs] == ["glass", "wood", "wool", "stone", "gold"]
    assert docs[1]["choices"] == ["paper", "wood", "ice", "salt"] and docs[1]["text"].startswith("The door")
    _, items = prepared("qmsum", tokenizer, eval_data)
    (doc, *_) = items["tasks"]["t2r_qmsum"].eval_docs
    assert doc["text"].startswith("Chair: The cup in this story") and doc["references"] == ["It is of glass."]


def test_code_is_run_only_by_leave(tokenizer, eval_data, folders, tmp_path, recipe):
    task = {"kind": "harness", "name": "humaneval", "task": "humaneval", "unsafe_code": True, "optional": True}
    path = recipe(
        tasks=[
            task,
            {"kind": "harness", "name": "piqa", "task": "piqa", "files": {"validation": "piqa/validation.jsonl"}},
        ]
    )
    models = [str(folders / "llama"), str(folders / "gsa")]
    report = compare(models, path, str(tmp_path / "report"), data=str(eval_data))
    assert list(report["results"]) == ["piqa"]
    (note,) = report["notes"]
    assert note.startswith("Left out: humaneval, humaneval runs code that the model writes") and "--allow-code" in note


@pytest.mark.parametrize(
    "change, message",
    [
        ({"task": "piqqa"}, "lm-eval has no task 'piqqa'.*nearest valid: piqa"),
        ({"files": {"validation": "piqa/valid.jsonl"}}, "no data file eval:piqa/valid.jsonl.*valid: piqa/validation"),
        ({"files": {}}, "lm-eval cannot load piqa: .*try: `t2r ... --data DIR`"),
        ({"shots": 3}, "piqa wants 3 examples, but there are 0 beside the items"),
        ({"metrics": ["f1"]}, r"none of the metrics \['f1'\].*nearest valid: .*acc_norm"),
        ({"adapt": "lambda"}, "no way to adapt 'lambda'.*nearest valid: lambada"),
        ({"subset": "goal"}, "holds no rows of piqa"),
        ({"subset": "goals"}, "no field 'goals'.*nearest valid: goal"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(change, message, model, tokenizer, eval_data):
    options = {"task": "piqa", "files": {"validation": "piqa/validation.jsonl"}, **change}
    task = Harness("t", **options)
    with pytest.raises(UserError, match=message) as error:
        task.run(model, task.prepare(tokenizer, Place(data=eval_data)))
    assert "\n" not in str(error.value)


def named_files(name):
    """The files below `--data` that a shipped recipe names."""
    for task in load_recipe(name).tasks:
        own = getattr(task, "data", "")
        files = [*getattr(task, "files", {}).values()] + [own.removeprefix("eval:")] * own.startswith("eval:")
        yield from (file.partition("[")[0] for file in files)


def test_the_layout_of_a_data_folder_is_as_documented(eval_data):
    """What recipes read is what recipes/README.md lists, and rows have the fields that it says."""
    table = re.findall(r"^\| `([^`]+/[^`]+)` \|.*\| (.*) \|$", (RECIPES / "README.md").read_text(), re.MULTILINE)
    fields = {file: re.findall(r"`(\w+)`", words) for file, words in table}
    assert fields.keys() == {file for path in RECIPES.glob("*.yaml") for file in named_files(path.stem)}
    for file, names in fields.items():
        row = next(rows(locate(f"eval:{file}", Place(data=eval_data))))
        assert names or file.endswith(".raw")
        assert set(names) <= row.keys(), file


@pytest.mark.parametrize("name", ["commonsense", "short", "long"])
def test_a_recipe_is_prepared_from_the_documented_layout(name, tokenizer, eval_data):
    recipe = load_recipe(name)
    items = recipe.prepare(tokenizer, Place(data=eval_data))
    assert not recipe.notes and items.keys() == {task.name for task in recipe.tasks}
    assert all(task.coverage for task in recipe.tasks)
