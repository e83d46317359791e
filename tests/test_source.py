"""Every format reads back exactly, and every fault is one line that names it."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from t2r.convert.source import open_source
from t2r.convert.writer import FolderWriter
from t2r.errors import UserError

SHARD = "model-00002-of-00005.safetensors"  # of the `sharded` folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("llama") / "model"
    model = tiny(dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="50KB")
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    assert (folder / SHARD).exists()
    return folder


@pytest.fixture
def folder(sharded, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def state_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


# Folders that are right


@pytest.mark.parametrize("kind", ["one safetensors", "sharded safetensors", "one bin", "sharded bin"])
def test_a_folder_reads_back_exactly(sharded, tmp_path, kind, tiny):
    expected = state_of(sharded)
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder, ignore=shutil.ignore_patterns("model*"))
    if kind.endswith("safetensors"):
        tiny(dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="5GB" if kind.startswith("one") else "60KB")
    elif kind == "one bin":
        torch.save(expected, folder / "pytorch_model.bin")
    else:
        names = sorted(expected)
        files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({name: expected[name] for name in names if files[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    source = open_source(folder)
    assert sorted(source.names()) == sorted(expected)
    assert not source.is_quantised and not source.ignored and source.config.hidden_size == 64
    for name, tensor in source.items():
        assert source.shape(name) == tuple(tensor.shape) and source.dtype(name) == tensor.dtype == torch.bfloat16
        assert source.nbytes(name) == tensor.nbytes == tensor.untyped_storage().nbytes()
        assert torch.equal(tensor, expected[name]), name
    if kind == "sharded safetensors":
        shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert [shards[name] for name in source.names()] == sorted(shards.values())


def test_a_source_goes_through_the_writer_unchanged(sharded, tmp_path):
    source = open_source(sharded)
    plan = {name: (source.shape(name), source.dtype(name)) for name in source.names()}
    with FolderWriter(tmp_path / "out", plan, shard_size=40_000) as out:
        source.config.save_pretrained(out.path)
        source.save_tokenizer(out.path)
        for name, tensor in source.items():
            out.add(name, tensor)
    expected = state_of(sharded)
    written = state_of(tmp_path / "out")
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(sharded)
    assert ours("hello world")["input_ids"] == theirs("hello world")["input_ids"] == [3, 4]
    assert ours.chat_template == theirs.chat_template


def test_generation_config(folder):
    GenerationConfig(eos_token_id=[2, 7], max_new_tokens=5).save_pretrained(folder)
    assert open_source(folder).generation_config().eos_token_id == [2, 7]
    (folder / "generation_config.json").unlink()
    assert open_source(folder).generation_config() is None


def test_a_tied_head_may_be_absent(tmp_path, tiny):
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    assert "lm_head.weight" not in open_source(tmp_path / "model").names()


def test_a_base_model_gets_the_prefix_of_the_causal_one(tmp_path, tiny):
    model = tiny()
    model.model.save_pretrained(tmp_path / "model")
    on_disk = load_file(tmp_path / "model/model.safetensors")
    assert "embed_tokens.weight" in on_disk
    read = dict(open_source(tmp_path / "model").items())
    assert read.keys() == model.state_dict().keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in read.items())


def test_a_derived_buffer_is_named_not_dropped_silently(folder):
    path = folder / "model-00005-of-00005.safetensors"
    buffer = "model.layers.1.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(path), buffer: torch.ones(8)}, path)
    source = open_source(folder)
    assert buffer not in source.names() and list(source.ignored) == [buffer]


# Folders that are wrong


def drop_from(path, *names):
    save_file({name: tensor for name, tensor in load_file(path).items() if name not in names}, path)


def first_tensor(folder, shard=SHARD):
    return sorted(load_file(folder / shard))[0]


def test_missing_things(folder, tmp_path, fault):
    fault(tmp_path / "modle", "no such folder or file", "modle", "nearest valid: model")
    fault("./no/where", "no such folder or file: no/where")
    (tmp_path / "weights.txt").touch()
    fault(tmp_path / "weights.txt", "weights.txt is neither a folder nor a .gguf file")
    (folder / SHARD).unlink()
    fault(folder, f"shard {SHARD} is missing", "model.safetensors.index.json", f"hf download ORG/NAME {SHARD}")
    (folder / "model.safetensors.index.json").unlink()
    fault(folder, "no weights: none of model.safetensors", str(folder), "model-00001-of-00005.safetensors")
    (folder / "config.json").unlink()
    fault(folder, "no config.json", str(folder))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_shard(folder, keep, fault):
    size = (folder / SHARD).stat().st_size
    os.truncate(folder / SHARD, keep % size)
    fault(folder, f"{SHARD} is truncated: {keep % size:,} bytes of at least", f"hf download ORG/NAME {SHARD}")


def test_a_damaged_safetensors_header(folder, fault):
    raw = bytearray((folder / SHARD).read_bytes())
    (folder / SHARD).write_bytes(raw + b"\0" * 4)  # bytes that no tensor owns
    fault(folder, f"{SHARD} is not a readable safetensors file")
    raw[8] = ord("!")
    (folder / SHARD).write_bytes(raw)
    fault(folder, f"{SHARD} is not a readable safetensors file")
    for header in (b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'):
        (folder / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
        fault(folder, f"{SHARD} is not a readable safetensors file")


def test_a_dtype_that_is_not_read(folder, fault):
    path = folder / SHARD
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, path)
    fault(folder, f"tensor {name} has dtype F8_E4M3", SHARD)


def test_an_index_entry_absent_from_its_shard(folder, fault):
    name = first_tensor(folder)
    drop_from(folder / SHARD, name)
    fault(folder, f"tensor {name} is not in {SHARD}, where the index places it")


def test_an_index_entry_in_another_shard(folder, fault):
    name = first_tensor(folder)
    other = "model-00001-of-00005.safetensors"
    edit_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({name: other}))
    fault(folder, f"tensor {name} is not in {other}")


def test_a_tensor_in_two_shards(folder, fault):
    name = first_tensor(folder)
    other = folder / "model-00004-of-00005.safetensors"
    save_file({**load_file(other), name: torch.zeros(2)}, other)
    fault(folder, f"tensor {name} is in two shards: {SHARD} and {other.name}")


@pytest.mark.parametrize("path", ["../model/{}", "{folder}/{}", "a/../../model/{}", "..\\{}", "C:\\{}"])
def test_an_index_that_leaves_the_folder(folder, path, fault):
    path = path.format(SHARD, folder=folder)
    name = first_tensor(folder)
    edit_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({name: path}))
    fault(folder, f"tensor {name}", "leaves the folder", "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("{", "not readable JSON"),
        ("[]", "holds list, not an object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 3}}', "no weight_map"),
        ('{"weight_map": {"a": "b.bin"}}', "tensor a in 'b.bin', which is not a .safetensors file"),
    ],
)
def test_a_damaged_index(folder, text, fragment, fault):
    (folder / "model.safetensors.index.json").write_text(text)
    fault(folder, fragment, "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"model_type": "lama"}, ["unknown model_type 'lama'", "nearest valid: llama"]),
        ({"model_type": None}, ["unknown model_type None"]),
        ({"hidden_size": "wide"}, ["the config cannot be used", "hidden_size", "wide"]),
        ({"num_attention_heads": 7}, ["the config cannot be used", "64", "7"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["the weights are quantised (gptq)"]),
        ({"quantization_config": "gptq"}, ["the config cannot be used"]),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, ["unknown model_type 'evil'"]),
    ],
)
def test_a_config_that_cannot_be_used(folder, change, fragments, fault):
    edit_json(folder / "config.json", lambda config: config.update(change))
    fault(folder, *fragments, str(folder / "config.json"))


def test_a_config_that_is_no_json(folder, fault):
    (folder / "config.json").write_text("model_type: llama")
    fault(folder, "config.json is not readable JSON")


def test_an_adapter_names_the_merge_command(folder, fault):
    (folder / "adapter_config.json").write_text("{}")
    fault(folder, "PEFT adapter", str(folder), "merge_and_unload().save_pretrained(")


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs `pip install peft`")
def test_the_merge_command_merges(tiny_llama, tmp_path):
    """The command that the error ends with, run by a shell, gives a folder that opens and holds the merged weights."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError) as error:
        open_source(tmp_path / "adapter")
    words = shlex.split(str(error.value).rpartition("; try: `")[2].removesuffix("`"))
    run = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    merged = open_source(tmp_path / "adapter-merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(merged.tensor(name), expected[name])
    assert not torch.equal(merged.tensor(name), open_source(tiny_llama).tensor(name))
    assert merged.load_tokenizer().decode([70]) == open_source(tiny_llama).load_tokenizer().decode([70])


def test_a_damaged_bin(folder, fault):
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"model.norm.weight": torch.ones(64)}, path)
    os.truncate(path, path.stat().st_size - 200)
    fault(folder, "pytorch_model.bin is truncated or not a torch file")
    path.write_bytes(b"")
    fault(folder, "pytorch_model.bin is truncated or not a torch file")
    torch.save([torch.ones(2)], path)
    fault(folder, "pytorch_model.bin holds list, not named tensors")
    torch.save({"state_dict": {"a": torch.ones(2)}}, path)
    fault(folder, "entry state_dict of pytorch_model.bin is dict, not a plain tensor")
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, path)
    fault(folder, "tensor a has dtype torch.complex64")


@pytest.mark.parametrize("kind", ["none", "damaged"])
def test_a_missing_tokenizer_leaves_nothing(folder, tmp_path, kind):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if kind == "none":
            (folder / file).unlink()
        else:
            (folder / file).write_text("{")
    source = open_source(folder)
    message = "no tokenizer: none of tokenizer.json" if kind == "none" else "the tokenizer cannot be loaded"
    with pytest.raises(UserError, match=message) as error, FolderWriter(tmp_path / "out", {}) as out:
        source.save_tokenizer(out.path)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_that_shrinks_while_it_is_read(folder):
    source = open_source(folder)
    name = source.names()[-1]
    os.truncate(folder / "model-00005-of-00005.safetensors", 1000)
    with pytest.raises(UserError, match=f"tensor {re.escape(name)} ends early"):
        source.tensor(name)
