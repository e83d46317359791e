"""`t2r run` from a source to the report, and ls, cp, validate, as a user meets them."""

import json
import shutil

import pytest
import torch
import yaml

from t2r.cli import main
from t2r.config import load, shipped
from t2r.schema import RunConfig
from t2r.train import engine, finetune


@pytest.fixture(scope="module")
def config(tiny_llama, tmp_path_factory):
    """A run of seconds: two stages and a comparison by one task."""
    folder = tmp_path_factory.mktemp("config")
    lines = [{"text": "".join(chr(97 + (i * j * j) % 23) for j in range(40 + 17 * i))} for i in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = f"""# One task.
tasks: [{{kind: perplexity, data: {folder}/text.jsonl, block: 64, edges: [0, 32, 64], totals: [64], items: 2}}]
"""
    (folder / "recipe.yaml").write_text(recipe)
    stage = "tokens: 256, context: 32, batch_tokens: 64, micro_batch: 2"
    (folder / "mine.yaml").write_text(f"""# Mine.
source: {tiny_llama}
convert: {{slots: 16, sinks: 2, verify: false}}
data: {{train: [{folder}/text.jsonl], cache: {folder}/cache}}
device: cpu
stages:
- {{kind: align, lr: {{gates: 1e-3, mixer: 1e-3}}, {stage}}}
- {{kind: distill, lr: {{body: 1e-3}}, {stage}}}
compare: {{recipe: {folder}/recipe.yaml, beside: [{{preset: paper, slots: 16, verify: false}}], notes: [Of a test.]}}
variants: {{tiny: [stages.0.tokens=64, stages.1.tokens=64]}}
""")
    return folder / "mine.yaml"


def refused(capsys, *words):
    """The one line that the command answers a mistake with."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("t2r: ") and line.count("\n") == 1
    return line


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_run_goes_from_the_source_to_the_report(config, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="needs `pip install matplotlib`")
    monkeypatch.chdir(tmp_path)
    steps, run_step = [], engine.optimizer_step

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 6:  # 4 steps of align, then in distill
            raise KeyboardInterrupt
        return run_step(*args)

    out = tmp_path / "runs" / "mine"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "optimizer_step", interrupted)
        assert main(["run", str(config)]) == 130
    assert (out / "1-align" / "step-000004").is_dir() and not (out / "model").exists()
    assert main(["run", str(config)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "env.json", "start", "paper-16-start", "1-align", "2-distill", "model", "compare"
    }  # fmt: skip
    report = json.loads((out / "compare" / "report.json").read_text())
    assert "\nOf a test.\n" in (out / "compare" / "report.md").read_text()
    for label in ("teacher", "paper-16-start", "exact-start", "trained"):
        assert label in json.dumps(report)
    resolved = load(out / "config.yaml", RunConfig)
    assert resolved.device == "cpu" and resolved.variants == {} and resolved.stages[1].lr.body == 1e-3

    assert f"the run in {'runs/mine'} is finished; nearest valid: --out runs/mine-2" in refused(capsys, "run", config)
    assert "holds a run of another configuration" in refused(capsys, "run", config, "seed=1")


def test_the_environment_asks_for_the_tiny_variant(config, tmp_path, monkeypatch):
    monkeypatch.setenv("DEMO_TINY", "1")
    assert main(["run", str(config), "compare=null", "stages.1.tokens=128", "--out", str(tmp_path / "run")]) == 0
    assert [path.name for path in (tmp_path / "run").glob("*/step-*")] == ["step-000001", "step-000002"]


def test_bad_input_is_one_line_and_leaves_nothing(config, tmp_path, capsys):
    out = tmp_path / "out"

    def refuses(message, *words):
        assert message in refused(capsys, "run", *words, "--out", out)
        assert not out.exists()

    refuses("no configuration 'quickstrt'", "quickstrt")
    refuses("nearest valid: quickstart", "quickstrt")
    refuses("unknown key 'stages.0.tokns' (in ", config, "stages.0.tokns=1")
    refuses("nearest valid: tokens", config, "stages.0.tokns=1")
    refuses("stages.0.tokens is 'x', expected a whole number", config, "stages.0.tokens=x")
    refuses("no data at /none.txt", config, "data.train=[/none.txt]")
    refuses("document 1 has no text under 'body'", config, "data.field=body")
    held = ["stages.0.validation_tokens=64", "data.held_out=1e-9"]
    refuses("data.held_out is 1e-09, which holds out none of the data's documents (20)", config, *held)
    refuses("no such folder or file: /none", config, "source=/none")
    refuses("no recipe 'quik'", config, "compare.recipe=quik")
    refuses("no configuration 'quick': neither", "quick")
    if not torch.cuda.is_available():
        refuses("device is cuda, but torch sees no GPU; nearest valid: device=cpu", config, "device=cuda")


def test_data_is_checked_before_anything_is_converted(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "convert", lambda *args, **options: pytest.fail("converted in vain"))
    (tmp_path / "own.txt").write_text("The tide was out. " * 30)
    words = [f"data.train=[{tmp_path}/own.txt]", f"data.cache={tmp_path}/cache", "data.held_out=0.05"]
    line = refused(capsys, "run", config, *words, "stages.1.validation_tokens=64", "--out", tmp_path / "run")
    assert "the data has 28 tokens, less than one row of 32" in line and "data.held_out of data.train" in line
    words += ["stages.1.context=1024", "stages.1.batch_tokens=2048", "--out", tmp_path / "again"]
    line = refused(capsys, "run", config, *words)
    assert "less than one row of 1024 and the token after it (in data.train)" in line


def test_ls_lists_each_shipped_file_with_its_line(capsys):
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for kind in ("configs", "recipes"):
        for name, about in shipped(kind).items():
            assert any(line.split()[0] == name and line.endswith(about) for line in lines if line.strip())


def test_cp_copies_what_ships_and_never_over_a_file(tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    assert main(["cp", "quickstart", str(mine)]) == 0
    assert load(mine, RunConfig) == load("quickstart", RunConfig)
    assert f"{mine} already exists; nearest valid: {tmp_path / 'mine-2.yaml'}" in refused(capsys, "cp", "quick", mine)
    assert main(["cp", "quick", str(tmp_path)]) == 0 and (tmp_path / "quick.yaml").exists()
    assert "no configuration or recipe 'quck'" in refused(capsys, "cp", "quck", tmp_path / "x.yaml")
    assert "cannot write: No such file or directory" in refused(capsys, "cp", "quick", tmp_path / "none" / "x.yaml")


@pytest.mark.parametrize("name", shipped("configs"))
def test_every_shipped_config_runs_on_a_small_model(name, config, tiny_llama, tmp_path):
    """Two steps of each stage, all options but the sizes as they are shipped."""
    text, settings = config.parent / "text.jsonl", load(name, RunConfig)
    words = [f"source={tiny_llama}", "convert.slots=16", "convert.verify=false", "device=cpu", "compare=null"]
    words += [f"data.train=[{text}]", f"data.cache={tmp_path}/cache"]
    if settings.convert.eviction == "score":
        long = tmp_path / "long.jsonl"
        long.write_text(json.dumps({"text": "".join(chr(97 + (i * i * i) % 23) for i in range(3000))}) + "\n")
        words += ["convert.layer_slots=0=24", f"convert.eviction_text=[{long}]"]
    words += ["data.held_out=0.2" if settings.data.held_out else f"data.validation=[{text}]"]
    small = {"tokens": 128, "context": 32, "batch_tokens": 64, "micro_batch": 2, "warmup_tokens": 64, "save_every": 1}
    for i in range(len(settings.stages)):
        words += [f"stages.{i}.{key}={value}" for key, value in (small | {"validation_tokens": 64}).items()]
    assert main(["run", name, *words, "--out", str(tmp_path / "run")]) == 0
    lines = (tmp_path / "run" / f"{len(settings.stages)}-{settings.stages[-1].kind}" / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [0, 1, 2, 2]


@pytest.mark.parametrize("name", [*shipped("configs"), *shipped("recipes")])
def test_what_ships_is_valid(name, capsys):
    assert main(["validate", name]) == 0
    assert f"{name}.yaml is valid" in capsys.readouterr().out


def test_validate_needs_neither_gpu_nor_data_and_looks_into_variants(config, tmp_path, capsys):
    copy = tmp_path / "copy.yaml"
    raw = yaml.safe_load(config.read_text())
    raw["data"]["train"] = ["/elsewhere/*.jsonl"]
    copy.write_text(yaml.safe_dump(raw))
    assert main(["validate", str(copy), "device=cuda"]) == 0
    said = capsys.readouterr().out
    assert "is valid, but not with the data here: no data at /elsewhere/*.jsonl" in said
    assert f"not checked: {raw['source']}, data sets on the hub, whether the text is long enough" in said
    raw["variants"]["gpu"] = ["stages.0.tokns=1"]
    copy.write_text(yaml.safe_dump(raw))
    assert "unknown key 'stages.0.tokns'" in refused(capsys, "validate", copy)
    shutil.copy(config.parent / "recipe.yaml", copy)
    assert main(["validate", str(copy)]) == 0
    assert "is valid\nnot checked: the data of its tasks, names of lm-eval's tasks\n" in capsys.readouterr().out
    copy.write_text("tasks: [{kind: perplexty}]")
    assert "nearest valid: perplexity" in refused(capsys, "validate", copy)
