"""A whole comparison of two tiny models, and what a user can get wrong."""

import json
import os
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from t2r import cli
from t2r.convert import convert
from t2r.errors import UserError
from t2r.evaluate import compare
from t2r.evaluate.likelihood import MultipleChoice
from t2r.evaluate.models import load, open_models, pick_dtype, window_only
from t2r.evaluate.recipe import load_recipe
from t2r.evaluate.run import Plan, Request, finish
from t2r.evaluate.task import OWN_DATA, Place, rows

SLOTS = 16

TASKS = [
    {"kind": "perplexity", "block": 64, "edges": [0, 16, 64], "totals": [64], "items": 2},
    {"kind": "last_word", "name": "lambada", "items": 3},
    {"kind": "multiple_choice", "name": "piqa", "items": 3},
    {"kind": "recall", "items": 2, "distances": [64, 128]},
    {"kind": "generation", "prompts": ["Hello"], "new": 4},
    {"kind": "memory", "lengths": [512, 131072], "check_at": 32},
    {"kind": "speed", "prompt": 8, "new": 3},
]


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


def test_a_comparison(folders, tmp_path, recipe, capsys, byte_tokenizer):
    trained = tmp_path / "trained"
    model = AutoModelForCausalLM.from_pretrained(folders / "gsa")
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.f_proj.weight, std=100.0)
    model.save_pretrained(trained)
    byte_tokenizer().save_pretrained(trained)
    out = tmp_path / "new" / "report"
    words = [f"teacher={folders / 'llama'}", str(folders / "gsa"), str(trained)]
    returned = compare(words, recipe(tasks=TASKS), str(out), log_samples=True)

    report = json.loads((out / "report.json").read_text())
    assert report == returned and report["schema_version"] == 2
    keys = {
        "versions",
        "hardware",
        "date",
        "device",
        "dtype",
        "recipe",
        "coverage",
        "hashes",
        "notes",
        "models",
        "results",
    }
    keys |= {"recovery", "warnings"}
    assert report.keys() == keys | {"schema_version"}
    assert report["versions"].keys() - {"lm-eval"} == {"t2r", "torch", "transformers", "python"}
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
    fields = {"unit", "value", "low", "high", "stderr", "n", "x", "chance"}
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
    assert {file.suffix for file in out.iterdir()} == {".png", ".svg", ".md", ".html", ".json", ".jsonl"}
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


def test_ablation_off(folders, tmp_path, recipe, byte_tokenizer):
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
        ({"recipe": "quik"}, "no recipe 'quik'.*nearest valid: quick"),
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
        ({"limit": 0}, "0 items are nothing to measure"),
        ({"batch_size": 0}, "0 texts at once are nothing to measure"),
        ({"device": "gpu"}, "no device 'gpu'.*nearest valid: cpu"),
    ],
)
def test_a_mistake_is_one_line_before_any_model_is_run(
    change, message, folders, tmp_path, recipe, monkeypatch, byte_tokenizer
):
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(folders / "llama").save_pretrained(other)
    byte_tokenizer(bos=True).save_pretrained(other)
    monkeypatch.setattr(import_module("t2r.evaluate.run"), "load", None)
    places = {"llama": folders / "llama", "gsa": folders / "gsa", "other": other}
    words = [word.format(**places) for word in change.get("models", ["{llama}", "{gsa}"])]
    path = change.get("recipe") or recipe(tasks=change.get("tasks", TASKS))
    options = {key: change[key] for key in ("limit", "batch_size", "device") if key in change}
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


def test_a_run_that_fails_at_once_leaves_nothing(folders, tmp_path, recipe, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("t2r.evaluate.run"), "finish", fail)
    with pytest.raises(KeyboardInterrupt):
        compare([str(folders / "llama"), str(folders / "gsa")], recipe(tasks=TASKS), str(tmp_path / "new" / "report"))
    assert not (tmp_path / "new").exists()


class Interrupted:
    """Counts the runs of tasks and ends one of them."""

    def __init__(self, monkeypatch, at, error):
        self.ran, self.at, self.error = [], at, error
        monkeypatch.setattr(import_module("t2r.evaluate.run"), "finish", self)

    def __call__(self, plan, column, task, *rest):
        if len(self.ran) == self.at:
            raise self.error
        self.ran.append((column.label, task.name))
        finish(plan, column, task, *rest)


def test_an_interrupted_run_keeps_what_is_finished_and_goes_on(folders, tmp_path, recipe, monkeypatch, capsys):
    tasks = [task for task in TASKS if task["kind"] not in ("speed", "generation")]
    models, out = [str(folders / "llama"), str(folders / "gsa")], tmp_path / "report"
    whole = compare(models, recipe(tasks=tasks), str(tmp_path / "whole"))
    words = ["compare", *models, "--recipe", recipe(tasks=tasks), "--out", str(out)]

    first = Interrupted(monkeypatch, 3, KeyboardInterrupt())
    capsys.readouterr()
    assert cli.main(words) == 130
    printed, error = capsys.readouterr()
    line = "t2r: interrupted: 3 of 10 results are kept, the same command goes on from there"
    assert error.splitlines()[-1] == line and printed == "" and not out.exists()
    second = Interrupted(monkeypatch, 2, UserError("out of memory"))
    assert cli.main(words) == 2
    line = "out of memory; 5 of 10 results are kept, the same command goes on from there"
    assert capsys.readouterr()[1].splitlines()[-1].endswith(line)
    # other settings are other numbers: nothing of the first run is taken for them
    Interrupted(monkeypatch, 0, UserError("full"))
    with pytest.raises(UserError, match="full; 4 of 10 results are kept"):
        compare(models, recipe(tasks=[tasks[0], {**tasks[1], "items": 2}, *tasks[2:]]), str(out))
    third = Interrupted(monkeypatch, None, None)
    resumed = compare(models, recipe(tasks=tasks), str(out))
    assert len(first.ran + second.ran + third.ran) == len(set(first.ran + second.ran + third.ran)) == 10
    assert resumed["results"] == whole["results"]
    assert [path.name for path in tmp_path.glob("*report*")] == ["report"]


def test_units_are_named_after_what_is_in_the_models(folders, tmp_path, recipe):
    """Another machine's copy goes on with the units of the first; one changed weight in the midst does not."""
    path = recipe(tasks=[{"kind": "last_word", "items": 1}])

    def units(model):
        plan = Plan(Request((str(folders / "llama"), str(model)), path, str(tmp_path / "report")), on_cpu=True)
        return [file.name for _, _, file in plan.units()]

    first = units(folders / "gsa")
    copied = Path(shutil.copytree(folders / "gsa", tmp_path / "elsewhere" / "gsa", copy_function=shutil.copyfile))
    weights = copied / "model.safetensors"
    os.utime(weights, (1, 1))
    assert units(copied) == first
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    os.utime(weights, (1, 1))
    assert units(copied)[0] == first[0] and units(copied)[1] != first[1]
    shutil.copyfile(folders / "gsa" / "model.safetensors", weights)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert units(copied)[1] != first[1]


def test_several_devices_share_the_work(folders, tmp_path, recipe, capfd):
    tasks = [task for task in TASKS if task["kind"] not in ("speed", "generation")]
    models = [str(folders / "llama"), str(folders / "gsa")]
    one = compare(models, recipe(tasks=tasks), str(tmp_path / "one"), device="cpu")
    two = compare(models, recipe(tasks=tasks), str(tmp_path / "two"), device="cpu,cpu")
    assert two["device"] == "cpu,cpu" and two["results"] == one["results"]
    said = capfd.readouterr().err.splitlines()
    ran = [line.rpartition(" ")[0].rpartition(" ")[0] for line in said if line.endswith(" s")]
    assert sorted(ran) == sorted(2 * [f"{label}: {task}" for label in ("llama", "gsa") for task in one["results"]])


def test_one_model_alone(folders, tmp_path, recipe):
    words = ["eval", str(folders / "gsa"), "--recipe", recipe(tasks=TASKS), "--out", str(tmp_path / "report")]
    assert cli.main(words) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert list(report["models"]) == ["gsa"] and report["recovery"] == {}
    assert all(task["changes"] == {} for task in report["results"].values())
    assert not (tmp_path / "report" / "items.jsonl").exists()
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<svg") == 3 and "<img" not in page and "<script" not in page
    assert not re.search(r"(?:src|href)=.(?!#)", page)  # nothing is fetched


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
