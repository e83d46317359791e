"""Configurations: what is read, and that every mistake is named in one line."""

import json
from dataclasses import replace

import pytest
import torch

from t2r.config import find, load, save, shipped
from t2r.errors import UserError
from t2r.schema import RunConfig, StageConfig, check, load_run, with_device
from t2r.train.sharding import engine_config, zero_stage

STAGE = "stages: [{kind: align, tokens: 640, context: 64, batch_tokens: 128, micro_batch: 2, lr: {gates: 1e-3}}]"


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return path

    return write


def test_values_and_overrides(file):
    path = file(f"source: a\ndata: {{train: [x.txt]}}\n{STAGE}")
    config = load(path, RunConfig, ["stages.0.lr.mixer=1e-4", "data.train=[a, b]", "compare.limit=3", "seed=7"])
    (stage,) = config.stages
    assert (stage.kind, stage.tokens, stage.steps, stage.rows) == ("align", 640, 5, 2)
    assert (stage.lr.gates, stage.lr.mixer, stage.lr.body) == (1e-3, 1e-4, 0.0)
    assert (config.data.train, config.compare.limit, config.compare.recipe, config.seed) == (["a", "b"], 3, "quick", 7)
    assert load(path, RunConfig).compare is None


def test_a_saved_config_is_read_back(file, tmp_path):
    words = ["compare.beside=[{preset: paper}]", "variants.gpu=[seed=1]", "data.train=[x]"]
    config = load(file(f"source: a\n{STAGE}"), RunConfig, words)
    save(config, tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml", RunConfig) == config


def test_a_variant_comes_before_the_words_of_the_command_line(file):
    path = file("source: a\nvariants: {gpu: [seed=1, convert.slots=8]}")
    assert load_run(path).seed == 0
    config = load_run(path, ["seed=2"], variant="gpu")
    assert (config.seed, config.convert.slots) == (2, 8)


@pytest.mark.parametrize(
    "text, words, message",
    [
        ("sorce: a", [], "unknown key 'sorce' (in {}); nearest valid: source"),
        ("source: a\nstages: [{kin: lm}]", [], "unknown key 'stages.0.kin' (in {}); nearest valid: kind"),
        ("source: a\nconvert: {slotz: 1}", [], "unknown key 'convert.slotz' (in {}); nearest valid: slots"),
        ("source: a", ["convert.prest=exact"], "unknown key 'convert.prest' (in command line); nearest valid: preset"),
        (
            "source: a\nstages: [{kind: algn, tokens: 1}]",
            [],
            "stages.0.kind is 'algn', expected one of align, distill, lm (in {}); nearest valid: align",
        ),
        ("source: a\nconvert: {slots: x}", [], "convert.slots is 'x', expected a whole number or null (in {})"),
        ("source: a\nconvert: {layer_slots: }", [], "convert.layer_slots is None, expected text (in {})"),
        ("source: a\nseed: 1.5", [], "seed is 1.5, expected a whole number (in {})"),
        ("source: a\ndata: {train: x}", [], "data.train is 'x', expected a list, each item text (in {})"),
        ("source: a\nstages: 3", [], "stages is 3, not a list (in {})"),
        ("source: a\nconvert: 3", [], "convert is 3, not keys and values (in {})"),
        ("seed: 1", [], "source is missing, text (in {})"),
        ("source: a\nstages: [{kind: lm}]", [], "stages.0.tokens is missing, a whole number (in {})"),
        ("- 1", [], "holds a list, not keys and values (in {})"),
        ("source: [", [], "not readable as YAML: "),
        ("source: a", ["seed"], "'seed' is not of the form key=value; nearest valid: stages.0.tokens=100000"),
        (f"source: a\n{STAGE}", ["stages.0.token=1"], "unknown key 'stages.0.token' (in command line)"),
        (f"source: a\n{STAGE}", ["stages.0.tokens=x"], "stages.0.tokens is 'x', expected"),
        ("source: a", ["source.x=1"], "unknown key 'source.x': nothing lies below 'a' (in command line)"),
        (f"source: a\n{STAGE}", ["stages.1.tokens=1"], "no item '1' of 1 in 'stages.1.tokens' (in command line)"),
    ],
)
def test_a_mistake_is_named(file, text, words, message):
    path = file(text)
    with pytest.raises(UserError) as error:
        load(path, RunConfig, words)
    assert str(error.value).startswith(message.replace("{}", str(path)))
    assert "\n" not in str(error.value)


def test_nothing_behind_the_sign_is_the_empty_text(file):
    path = file("source: a\nconvert: {layer_slots: 0=8}")
    assert load(path, RunConfig, ["convert.layer_slots="]).convert.layer_slots == ""
    assert load(path, RunConfig, ["convert.slots="]).convert.slots is None


@pytest.mark.parametrize(
    "word, message",
    [
        ("stages.0.tokens=0", "stages.0.tokens is 0, it must be positive"),
        ("stages.0.warmup_tokens=641", "stages.0.warmup_tokens is 641, more than the stage's 640"),
        ("stages.0.batch_tokens=200", "stages.0.batch_tokens is 200, no multiple of micro_batch x context = 128"),
        ("stages.0.lr.body=1e-4", "stages.0.lr.body is 0.0001, but align trains mixers and gates only"),
        ("stages.0.lr.gates=0", "stages.0.lr is 0 for every group"),
        ("stages.0.lr.mixer=1e3", "stages.0.lr.mixer is 1000.0 (in {}); nearest valid: 0 to 1"),
        ("stages.0.loss.kl=1.5", "stages.0.loss.kl is 1.5, a weight between 0"),
        ("stages.0.validation_tokens=64", "stages.0.validation_tokens needs data.validation"),
        ("data.train=[]", "data.train is empty, but there are stages"),
        ("compare.limit=0", "compare.limit is 0, it must be positive"),
        (
            "compare.beside=[{slots: 8}, {slots: 8, eviction: score}]",
            "compare.beside.1 is called exact-8-start like another",
        ),
        ("compare.beside=[{preset: paper}, {}]", "compare.beside.1 is called exact-start like another start"),
        ("stages.0.schedule=wsd", "stages.0.decay_tokens is 0 with schedule wsd"),
        ("stages.0.decay_tokens=64", "stages.0.decay_tokens is 64 with schedule cosine"),
        (
            "stages.0.schedule=wsd;stages.0.decay_tokens=640;stages.0.warmup_tokens=64",
            "stages.0.decay_tokens is 640, more than the warm-up leaves",
        ),
        ("stages.0.validate_every=2", "stages.0.validate_every is 2, but there are no validation_tokens"),
        ("stages.0.give_up=0", "stages.0.give_up is 0, it must be positive"),
        ("stages.0.lr.named={x: 2}", "stages.0.lr.named.x is 2.0"),
        ("stages.0.lora={rank: 0}", "stages.0.lora needs a positive rank and alpha"),
        ("stages.0.lora={targets: []}", "stages.0.lora.targets is empty"),
        ("stages.0.lora={rank: 8}", "stages.0.lora has lr.mixer and lr.body 0"),
        ("data.mix=[{data: [x]}]", "data.mix takes the place of data.train"),
        ("data={mix: [{data: [x], weight: 0}]}", "data.mix.0.weight is 0.0, it must be positive"),
        ("data={mix: [{data: []}]}", "data.mix.0.data is empty"),
        ("data.held_out=1", "data.held_out is 1.0, a share of the documents"),
        ("data={train: [x], validation: [y], held_out: 0.1}", "data.held_out takes the place of data.validation"),
        ("deepspeed={offload: optimizer, zero: 0}", "deepspeed.offload is optimizer, but zero is 0"),
        ("deepspeed={offload: all, zero: 2}", "deepspeed.offload is all, but zero is 2"),
        ("deepspeed={json: x.json, zero: 2}", "deepspeed.json replaces zero and offload"),
    ],
)
def test_values_that_do_not_fit_together(file, word, message):
    path = file(f"source: a\ndata: {{train: [x]}}\n{STAGE}")
    load_run(path)
    with pytest.raises(UserError) as error:
        load_run(path, word.split(";"))
    assert str(error.value).startswith(message.replace("{}", str(path)))


def test_a_deepspeed_file_of_the_user_s_own(file, tmp_path):
    path, ours = file(f"source: a\ndata: {{train: [x]}}\n{STAGE}"), tmp_path / "ds.json"
    config = load_run(path, [f"deepspeed.json={ours}"])
    (stage,) = config.stages

    def settings(**theirs):
        ours.write_text(json.dumps(theirs))
        return engine_config(config.deepspeed, stage, torch.bfloat16, world=1)

    found = settings(zero_optimization={"stage": 2, "overlap_comm": True}, gradient_clipping="auto", zero_hpz=4)
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True} and found["zero_hpz"] == 4
    assert found["gradient_clipping"] == 1.0 and found["train_micro_batch_size_per_gpu"] == 2
    assert zero_stage(config.deepspeed) == 2
    assert "zero_optimization" not in settings(wall_clock_breakdown=True) and zero_stage(config.deepspeed) == 0
    with pytest.raises(UserError, match="train_batch_size is set here and by the stages' batch_tokens"):
        settings(train_batch_size=8)
    with pytest.raises(UserError, match="optimizer is set here and by the stages' lr"):
        settings(optimizer={"type": "Adam"})
    ours.write_text("{")
    with pytest.raises(UserError, match="deepspeed.json cannot be read"):
        zero_stage(config.deepspeed)


def test_a_missing_file_names_the_nearest_shipped_one():
    message = "no configuration or recipe 'quikstart'.*nearest valid: quickstart; try: `t2r ls`"
    with pytest.raises(UserError, match=message):
        find("quikstart")


@pytest.mark.parametrize("name", shipped("configs"))
def test_shipped_configs_and_their_variants_are_right(name):
    assert shipped("configs")[name].endswith(".")
    config = load_run(name)
    for variant in config.variants:
        assert load_run(name, variant=variant) != config
    check(config)


def test_cuda_without_a_gpu(file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load(file("source: a"), RunConfig)
    assert with_device(config).device == "cpu"
    with pytest.raises(UserError, match="device is cuda, but torch sees no GPU; nearest valid: device=cpu"):
        with_device(replace(config, device="cuda"))


def test_tokens_are_rounded_up_to_whole_steps():
    stage = StageConfig("lm", tokens=1000, batch_tokens=300)
    assert stage.steps == 4


def test_references_see_the_command_line(tmp_path):
    """What a file says by reference to a key follows where the command line gives that key."""
    file = tmp_path / "c.yaml"
    file.write_text("source: a\nconvert: {eviction: score, eviction_text: '${data.train}'}\ndata: {train: [x.txt]}\n")
    assert load(file, RunConfig).convert.eviction_text == ["x.txt"]
    assert load(file, RunConfig, ["data.train=[y.txt]"]).convert.eviction_text == ["y.txt"]
    file.write_text("source: '${nowhere}'\n")
    with pytest.raises(UserError, match="nowhere"):
        load(file, RunConfig)
