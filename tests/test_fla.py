"""Models go to flash-linear-attention's format and come back. What fla computes is written out here in float64, with
its own names: a check of the meaning, which comparing tensors is not."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, LlamaConfig

from t2r.cli import main
from t2r.convert import convert
from t2r.convert.fla import export, ours, theirs
from t2r.convert.source import open_source
from t2r.errors import UserError
from t2r.modeling.configuration import GSAConfig


@pytest.fixture(scope="module")
def source(tiny, tiny_llama, tmp_path_factory):
    """A Llama that fla can express: no biases, 4 heads of 16 channels on 2 kv heads, tied embeddings."""
    folder = tmp_path_factory.mktemp("fla") / "source"
    model = tiny(LlamaConfig, vocab_size=259, tie_word_embeddings=True, rms_norm_eps=1e-4)
    model.save_pretrained(folder)
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def paper(source, tmp_path_factory):
    """A converted model of the preset paper whose new tensors are no constants."""
    out = tmp_path_factory.mktemp("fla") / "paper"
    convert(str(source), str(out), preset="paper", slots=12, verify=False)
    tensors = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "g_norm" in name or "f_proj" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def exported(paper):
    out = paper.parent / "exported"
    assert main(["export", str(paper), str(out), "--to", "fla"]) == 0
    return out


def fla_logits(folder, ids):
    """GSAForCausalLM of fla 0.6.0, token by token: ids [T] -> logits [T, vocabulary]."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: x.double() for name, x in load_file(folder / "model.safetensors").items()}
    heads, kv_heads, slots = config["num_heads"], config["num_kv_heads"], config["num_slots"]
    dim = config["hidden_size"] // heads

    def norm(x, name, eps):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weights[name]

    x = weights["model.embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        w = {name: weights[f"model.layers.{i}.attn.{name}_proj.weight"] for name in "qkvfo"}
        h = norm(x, f"model.layers.{i}.attn_norm.weight", config["norm_eps"])
        q, k, v = (silu(h @ w[name].T).unflatten(-1, (-1, dim)) for name in "qkv")
        alpha = torch.sigmoid(h @ w["f"].T).unflatten(-1, (kv_heads, slots)) ** (1 / config["gate_logit_normalizer"])
        keys, values = torch.zeros(2, kv_heads, slots, dim, dtype=torch.float64)
        read = torch.zeros(len(ids), heads, dim, dtype=torch.float64)
        for t in range(len(ids)):
            keys = alpha[t, :, :, None] * keys + (1 - alpha[t])[:, :, None] * k[t, :, None]
            values = alpha[t, :, :, None] * values + (1 - alpha[t])[:, :, None] * v[t, :, None]
            for head in range(heads):
                group = head // (heads // kv_heads)
                read[t, head] = torch.softmax(keys[group] @ q[t, head], -1) @ values[group]
        o = norm(silu(read.flatten(1)), f"model.layers.{i}.attn.g_norm.weight", 1e-5)
        x = x + o @ w["o"].T
        h = norm(x, f"model.layers.{i}.mlp_norm.weight", config["norm_eps"])
        gate, up, down = (weights[f"model.layers.{i}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (silu(h @ gate.T) * (h @ up.T)) @ down.T
    head = weights.get("lm_head.weight", weights["model.embeddings.weight"])
    return norm(x, "model.norm.weight", config["norm_eps"]) @ head.T


def test_the_exported_model_means_what_ours_does(paper, exported):
    ids = torch.randint(3, 259, (150,), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(paper, dtype=torch.float32).eval()
    with torch.inference_mode():
        mine = model(ids[None]).logits[0].double()
    expected = fla_logits(exported, ids)
    assert (mine - expected).abs().max() < 1e-4 * expected.abs().max()
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "gsa" and config["architectures"] == ["GSAForCausalLM"]
    assert (config["num_slots"], config["num_heads"], config["num_kv_heads"], config["norm_eps"]) == (12, 4, 2, 1e-4)


def test_what_comes_back_is_what_went(paper, exported, capfd):
    back = paper.parent / "back"
    assert main(["convert", str(exported), str(back)]) == 0
    printed = capfd.readouterr().out
    assert "verified" in printed and "preset paper: 12 slots" in printed
    card = (back / "README.md").read_text()
    assert "of flash-linear-attention, in t2r's format: 12 slots." in card and "not trained" not in card
    mine, again = load_file(paper / "model.safetensors"), load_file(back / "model.safetensors")
    assert mine.keys() == again.keys() and all(torch.equal(mine[name], again[name]) for name in mine)
    entries = json.loads((back / "conversion.json").read_text())["tensors"].values()
    assert {entry["status"] for entry in entries} == {"copied"}
    before, after = (open_source(folder).config for folder in (paper, back))
    for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(before, name) == getattr(after, name), name
    assert GSAConfig.of(before) == GSAConfig.of(after)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (paper, back)]
    first, second = (model(torch.arange(3, 90)[None]).logits for model in models)
    assert torch.equal(first, second)


def test_a_norm_without_weights_gets_ones(exported, tmp_path):
    """fla's elementwise_affine=False: its largest models trained from scratch have it."""
    folder = shutil.copytree(exported, tmp_path / "plain")
    tensors = {name: x for name, x in load_file(folder / "model.safetensors").items() if "g_norm" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    convert(str(folder), str(tmp_path / "out"), verify=False)
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written["model.layers.1.self_attn.g_norm.weight"], torch.ones(64))


@pytest.mark.parametrize("hidden", [64, 2048, 4096])
def test_the_width_that_fla_works_out(exported, tmp_path, hidden):
    """Where fla's config leaves intermediate_size out: two thirds of hidden_ratio, rounded up to 256."""
    from t2r.convert.fla import read_config

    raw = json.loads((exported / "config.json").read_text()) | {"hidden_size": hidden, "intermediate_size": None}
    assert read_config(raw, tmp_path).intermediate_size == 256 * math.ceil(hidden * 8 // 3 / 256)


def test_names_go_both_ways():
    for name in ("model.embed_tokens.weight", "model.layers.3.post_attention_layernorm.weight", "lm_head.weight"):
        assert ours(theirs(name)) == name
    assert theirs("model.layers.0.self_attn.q_proj.weight") == "model.layers.0.attn.q_proj.weight"
    assert theirs("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gsa": {"rope": True}}, "its layers are not those of the preset paper (rope)"),
        ({"gsa": {"softmax_layers": [0]}}, "(softmax_layers)"),
        ({"attention_bias": True}, "fla's projections have no bias"),
        ({"head_dim": 32}, "4 heads x 32 channels are not the hidden size"),
        ({"hidden_act": "gelu"}, "its activation is gelu, not silu"),
        ({"model_type": "gsa_qwen3"}, "a qwen3 block is not Llama's"),
    ],
)
def test_what_fla_cannot_express_is_refused(paper, tmp_path, change, message):
    folder = shutil.copytree(paper, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["gsa"] |= change.pop("gsa", {})
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as error:
        export(str(folder), str(tmp_path / "out"))
    assert "fla cannot express this model" in str(error.value) and message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_there_is_kept(paper, exported):
    with pytest.raises(UserError, match=f"already exists; try: `t2r export {paper} {exported}-2`"):
        export(str(paper), str(exported))


def test_a_source_is_refused_with_the_command_that_converts_it(source, tmp_path):
    with pytest.raises(UserError, match="a llama model, not a converted one.*t2r convert .* --preset paper"):
        export(str(source), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_map": "t2r"}, "feature_map is 't2r': t2r has SiLU only"),
        ({"use_short_conv": True}, "use_short_conv is True"),
        ({"attn": {"layers": [1]}}, "attn is {'layers': [1]}: layers with softmax attention are not read"),
        ({"expand_k": 0.5}, "expand_k is 0.5"),
        ({"num_heads": None}, "the config cannot be used"),
        ({"num_slots": 13}, "f_proj.weight has shape [24, 64], the config asks for [26, 64]"),
    ],
)
def test_what_t2r_cannot_read_is_refused(exported, tmp_path, capfd, change, message):
    folder = shutil.copytree(exported, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 2
    err = capfd.readouterr().err
    assert message in err and err.splitlines()[-1].startswith("t2r: ")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_slots_of_an_imported_model_are_not_ours_to_choose(exported, tmp_path):
    for option in ({"slots": 64}, {"slots": 0}, {"sinks": 0}):
        with pytest.raises(UserError, match="has its slots already"):
            convert(str(exported), str(tmp_path / "out"), **option)


def test_a_preset_is_chosen_only_if_it_is_what_an_imported_model_has(exported, tmp_path, capfd):
    words = ["convert", str(exported), str(tmp_path / "out"), "--dry-run"]
    for chosen in ([], ["--preset", "paper"]):
        assert main(words + chosen) == 0
        assert "preset paper: 12 slots" in capfd.readouterr().out
    assert main([*words, "--preset", "exact"]) == 2
    err = capfd.readouterr().err
    assert "is of the preset paper already and cannot become exact" in err and "nearest valid: --preset paper" in err
