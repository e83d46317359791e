"""Costs: parameters and operations against the models themselves, memory by what must change it, the command."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig

from t2r.cli import main
from t2r.config import shipped
from t2r.modeling.attention import GSAttention
from t2r.plan import empty_student, plan, span
from t2r.schema import load_run
from t2r.train.cost import RECURRENCE, gsa_flops, hardware_of, softmax_flops, training_flops
from t2r.train.parameters import parameter_groups
from t2r.train.stages import STAGES, Batch

SIZES = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
STAGE = "tokens: 1000000, context: 64, batch_tokens: 1024, micro_batch: 4"


@pytest.fixture
def mistral(tmp_path):
    """The config of Mistral 7B, which is transformers' default, without weights."""
    MistralConfig().save_pretrained(tmp_path / "mistral")
    return f"source={tmp_path}/mistral"


@pytest.fixture
def tiny(tmp_path):
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "tiny")
    rates = "{gates: 1e-3, mixer: 1e-3, body: 1e-3}"
    stages = [f"{{kind: {kind}, {STAGE}, lr: {rates}}}" for kind in ("distill", "lm")]
    stages.append(f"{{kind: align, {STAGE}, lr: {{gates: 1e-3, mixer: 1e-3}}}}")
    text = f"source: {tmp_path}/tiny\ndata: {{train: [x]}}\nstages: [{', '.join(stages)}]\n"
    (tmp_path / "c.yaml").write_text(text)
    return tmp_path / "c.yaml"


def test_the_paper_s_model_has_the_paper_s_parameters(mistral):
    report = plan("mistral-7b-paper-20b", [mistral], gpus=64)
    assert (report.parameters, report.new) == (7_308_972_032, 67_239_936)
    (stage,) = report.stages
    assert stage.trained == report.parameters and stage.stage.steps == 9537
    products = 6 * 7.18e9 / 0.3
    slots = (
        3 * 32 * (3 * 8 + 2 * 32) * 64 * 256 / RECURRENCE
    )  # read by 32 heads, decayed and written in 8, forward and back
    hours = (products + slots) * 20e9 / 989e12 / 3600 * 4 / 3  # a third more for recomputed layers
    assert 64 * stage.hours == pytest.approx(hours, rel=0.03)


@pytest.mark.parametrize(
    ("kind", "context", "layers", "measured"),
    [
        ("lm", 2048, "", 212_000),
        ("lm", 8192, "", 200_000),
        ("distill", 1024, None, 156_000),
        ("distill", 8192, None, 130_000),
    ],
)
def test_a_plan_s_time_is_what_was_measured(tmp_path, kind, context, layers, measured):
    """SmolLM2-135M on one H200 (docs/results/speed/lm-h200.json, docs/LOG.md: tenth session): within a quarter."""
    shape = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    LlamaConfig(**shape, **heads, tie_word_embeddings=True).save_pretrained(tmp_path / "smol")
    words = [
        f"source={tmp_path}/smol",
        f"stages.0.kind={kind}",
        f"stages.0.context={context}",
        "stages.0.micro_batch=1",
    ]
    words += [] if layers is None else [f"convert.layer_slots={layers!r}"]
    report = plan("smollm2-135m-exact", words, gpu="h200")
    assert report.stages[0].tokens_per_second == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("kept", ["", "1"], ids=["pure", "hybrid"])
@pytest.mark.parametrize("kind, index", [("distill", 0), ("lm", 1), ("align", 2)])
def test_operations_are_those_that_torch_counts(tiny, kind, index, kept):
    """Matrix products of a step, the recurrence left out of both: torch sees how it is chunked, not what it is. Of
    softmax attention torch counts the whole square, of which half is done."""
    settings = load_run(tiny, [f"convert.keep_softmax='{kept}'"])
    stage = settings.stages[index]
    with torch.device("meta"):
        teacher = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))
    student = empty_student(settings).to_empty(device="cpu")
    student.config._attn_implementation = "eager"
    teacher = teacher.to_empty(device="cpu").requires_grad_(False)
    for p in [*student.parameters(), *teacher.parameters()]:
        torch.nn.init.normal_(p, std=0.02)
    parameter_groups(student, stage)
    ids = torch.randint(3, 96, (4, 64))
    cu_seqlens = torch.arange(0, 257, 64)
    batch = Batch(ids, ids, torch.arange(64).expand(4, 64), cu_seqlens, torch.tensor(256.0))
    student.lm_head.weight.ds_id = 0  # torch cannot count what runs an autograd of its own: chunks are recomputed
    recomputed = {"lm": 2, "distill": 4, "align": 0}[kind] * student.lm_head.weight.numel()
    with FlopCounterMode(display=False, depth=None) as counter:
        STAGES[kind](stage).loss(student, teacher, batch)[0].backward()
    counts = counter.get_flop_counts()
    products = sum(n for op, n in counts["Global"].items() if "bmm" not in str(op))
    flops, mixers = training_flops(student, stage), [m for m in student.modules() if isinstance(m, GSAttention)]
    with_softmax = ["LlamaModel.layers.0", "LlamaModel.layers.1", *(["GSALlamaModel.layers.1"] if kept else [])]
    attention = sum(n for name in with_softmax for op, n in counts.get(name, {}).items() if "bmm" in str(op)) / 2
    ours = 256 * (flops.total + recomputed - 3 * sum(map(gsa_flops, mixers)))
    assert ours == pytest.approx(products + attention, rel=0.02)
    passes = {"lm": 0, "distill": 2, "align": 2}[kind] + (3 if kept and kind != "align" else 0)
    assert attention == 256 * softmax_flops(student.config, 64, passes * [0])


def test_attention_within_a_window_reads_no_more(mistral):
    """The mean over a row, but that a token reads itself whole."""
    config = MistralConfig(sliding_window=24, num_hidden_layers=3)
    pairs = sum(min(t, 24) for t in range(1, 101)) / 100
    assert softmax_flops(config, 100, [0, 2]) == pytest.approx(2 * 4 * 4096 * pairs, rel=0.03)
    assert softmax_flops(config, 20, [1]) == 4 * 4096 * 10


def test_a_plan_counts_the_layers_of_the_conversion(mistral):
    """Eviction by score asks for three tensors; a layer that keeps softmax has no gates."""
    gates = 4096 * 8  # of a slot, in one layer
    biases = 2 * 8
    for options, slots, scored in (
        (["convert.eviction=oldest"], 32 * 64, 0),
        (["convert.eviction=score"], 32 * 64, 32),
        (["convert.eviction=oldest", "convert.keep_softmax=0-7"], 24 * 64, 0),
        (["convert.eviction=oldest", "convert.layer_slots=0=96"], 31 * 64 + 96, 0),
    ):
        new = plan("mistral-7b-exact-700m", [mistral, *options]).new
        assert new == slots * (gates + biases) + scored * (gates + 2 * 8)


def test_what_is_split_off_takes_less_memory(mistral):
    def memory(*words, gpus=8, stage=1):
        return plan("mistral-7b-exact-700m", [mistral, *words], gpus=gpus).stages[stage].memory

    whole = memory("deepspeed.zero=1", "deepspeed.teacher=whole")
    assert whole["optimizer"] == pytest.approx(12 * 7_308_873_728 / 8)
    assert memory("deepspeed.zero=2")["gradients"] == pytest.approx(whole["gradients"] / 8)
    assert memory()["weights"] == pytest.approx(whole["weights"] / 8)
    assert memory()["teacher"] == pytest.approx(whole["teacher"] / 8)
    assert memory("deepspeed.offload=all")["weights"] == memory("deepspeed.offload=all")["optimizer"] == 0
    more = memory("stages.1.activation_checkpointing=false")
    assert more["activations"] > 5 * memory()["activations"]


def test_activations_are_those_of_each_layer(mistral):
    """Layers count one by one, wherever they are; recomputed ones only as far as the largest of them."""

    def activations(*words, stage=1, checkpointing="false"):
        words = [mistral, *words, f"stages.{stage}.activation_checkpointing={checkpointing}"]
        return plan("mistral-7b-exact-700m", words, gpus=8).stages[stage].memory["activations"]

    def slots(which):
        return f"convert.layer_slots='{which}'"

    for stage in (0, 1):
        less, more = activations(stage=stage), activations("convert.slots=128", stage=stage)
        one = activations(slots("0=128"), stage=stage) - less
        assert one == activations(slots("31=128"), stage=stage) - less > 0
        eight = activations(slots("0-7=128"), stage=stage) - less
        share = 8 if stage else (8 / 2 + 1) / (1 / 2 + 1)  # align holds half a layer each, and the largest whole
        assert eight == pytest.approx(share * one) and more > less + eight
    less, more = (activations(f"convert.slots={n}", checkpointing="true") for n in (64, 128))
    assert activations(slots("9=128"), checkpointing="true") == more > less
    kept = [activations(f"convert.keep_softmax={which}") for which in ("0", "0-7")]
    assert activations() - kept[1] == pytest.approx(8 * (activations() - kept[0])) and kept[0] < activations()


def test_a_stage_that_does_not_fit_is_named_with_what_may_help(mistral, capsys):
    words = ["plan", "mistral-7b-exact-700m", mistral, "deepspeed.zero=1", "--gpu", "rtx4090", "--gpus", "8"]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "try     deepspeed.zero=3" in out
    assert main(["plan", "mistral-7b-lora-24gb", mistral, "--gpu", "rtx4090"]) == 0
    assert "80,773,120 trained" in capsys.readouterr().out
    assert main(["plan", "mistral-7b-lora-24gb", mistral, "--gpu", "rtx409"]) == 2
    assert "unknown GPU 'rtx409'; nearest valid: rtx4090" in capsys.readouterr().err
    assert main(["plan", "mistral-7b-paper-20b", mistral, "--gpus", "7"]) == 2
    assert "no multiple of micro_batch x context x 7 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in shipped("configs") if name.startswith("mistral")])
def test_shipped_configs_fit_what_they_say(name, mistral):
    gpus, gpu = {"mistral-7b-paper-20b": (64, "h100"), "mistral-7b-lora-24gb": (1, "rtx4090")}.get(name, (8, "h100"))
    assert plan(name, [mistral], gpu, gpus).passed


def test_times_are_printed_in_a_unit_that_fits(tiny):
    times = {
        0.0387: "38.7 ms",
        0.4: "400 ms",
        7: "7 s",
        59.9: "59.9 s",
        150: "2.5 min",
        5400: "1.5 h",
        5.39e6: "1,497 h",
    }
    assert {seconds: span(seconds) for seconds in times} == times
    report = plan(str(tiny), gpus=2)
    hours = sum(stage.hours for stage in report.stages)
    assert f"together {span(3600 * hours)}, {span(7200 * hours)} of GPU time;" in str(report)


def test_gpus_are_known_by_the_name_that_cuda_gives_them():
    assert hardware_of("NVIDIA H100 80GB HBM3").flops == 989e12
    assert hardware_of("NVIDIA A100-SXM4-80GB").memory == 80e9
    assert hardware_of("NVIDIA A100-SXM4-40GB").memory == 40e9
    assert hardware_of("NVIDIA L40S").memory == 48e9 and hardware_of("NVIDIA L4").memory == 24e9
    assert hardware_of("Some other GPU") is None


def test_more_gpus_than_a_batch_has_forwards_get_smaller_ones(tiny, capsys):
    """16 rows by 4: 8 processes take 2 each and the batch stays; 5 do not share 16."""
    for gpus, words in ((8, "stages.0.micro_batch=2"), (5, "stages.0.batch_tokens=1280")):
        assert main(["plan", str(tiny), "--gpus", str(gpus)]) == 2
        assert f"nearest valid: {words}" in capsys.readouterr().err
        assert plan(str(tiny), [words, *(words.replace("0", str(i), 1) for i in (1, 2))], gpus=gpus).stages
