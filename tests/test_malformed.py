"""Each way a source can be wrong ends `t2r convert` with one line that names the fault. Nothing is left behind,
nothing of the source changes, no code in it runs."""

import json
import os
import pickle
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from t2r.cli import main

INDEX = "model.safetensors.index.json"


def shard_of(source, name):
    return source / json.loads((source / INDEX).read_text())["weight_map"][name]


def change_tensors(name, edit):
    """Replace the tensors of the shard that holds `name` by edit(tensors)."""

    def damage(source):
        file = shard_of(source, name)
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def change_tensor(name, edit):
    return change_tensors(name, lambda tensors: tensors.update({name: edit(tensors[name].clone())}))


def spoilt(value):
    def edit(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return edit


def change_json(file, edit):
    def damage(source):
        content = json.loads((source / file).read_text())
        edit(content)
        (source / file).write_text(json.dumps(content))

    return damage


def config(**values):
    return change_json("config.json", lambda content: content.update(values))


def index(name, file):
    """Have the index place a tensor in another file, or nowhere."""
    return change_json(INDEX, lambda content: content["weight_map"].update({name: file}))


def write(file, content):
    return lambda source: (source / file).write_bytes(content)


def second_shard(edit):
    """Replace the bytes of one shard by edit(bytes)."""

    def damage(source):
        file = next(source.glob("model-00002*"))
        file.write_bytes(edit(file.read_bytes()))

    return damage


def twice_in_the_header(raw):
    """The header names its first tensor a second time, over the same bytes."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    first = next(iter(header))
    text = raw[8 : 8 + size].rstrip()[:-1] + b"," + json.dumps({first: header[first]}).encode()[1:]
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def unknown_architecture(source):
    shutil.rmtree(source)
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)).save_pretrained(source)


def only_pickle(write):
    """No safetensors; write(path) makes pytorch_model.bin."""

    def damage(source):
        for file in source.glob("model*"):
            file.unlink()
        write(source / "pytorch_model.bin")

    return damage


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["T2R_TEST_PAYLOAD"],)


def old_pickle(path):
    torch.save({"model.norm.weight": torch.ones(48)}, path, _use_new_zipfile_serialization=False)


V, NORM, HEAD = "model.layers.0.self_attn.v_proj.bias", "model.norm.weight", "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"

FAULTS = {
    # files
    "a missing shard": (lambda s: next(s.glob("*00002*")).unlink(), "is missing"),
    "a shard that is a folder": (lambda s: [f.unlink() or f.mkdir() for f in s.glob("model-00002*")], "is missing"),
    "a truncated shard": (second_shard(lambda raw: raw[:-1]), "is truncated"),
    "a shard cut in its header": (second_shard(lambda raw: raw[:100]), "is truncated"),
    "an empty shard": (second_shard(lambda raw: b""), "is truncated"),
    "a header of 2^63 bytes": (second_shard(lambda raw: b"\xff" * 7 + b"\x7f" + raw[8:]), "is truncated"),
    "a shard of other bytes": (second_shard(lambda raw: b"\4\0\0\0\0\0\0\0PK\3\4" + raw), "not a readable safetensors"),
    "no weights": (lambda s: [f.unlink() for f in s.glob("model*")], "no weights"),
    "no config": (lambda s: (s / "config.json").unlink(), "no config.json"),
    "no tokenizer": (lambda s: [f.unlink() for f in s.glob("tokenizer*")], "no tokenizer"),
    "a damaged tokenizer": (write("tokenizer.json", b"{}"), "the tokenizer cannot be loaded"),
    "a damaged generation config": (write("generation_config.json", b"{"), "generation_config.json"),
    # the index
    "an index that is no JSON": (write(INDEX, b"{"), "not readable JSON"),
    "an index without a map": (write(INDEX, b"{}"), "no weight_map"),
    "a tensor twice in the index": (write(INDEX, b'{"weight_map": {"a": "b", "a": "c"}}'), "a is there twice"),
    "a tensor missing in the index": (
        change_json(INDEX, lambda content: content["weight_map"].pop(V)),
        f"tensor {V} of model-00001-of-00002.safetensors is not in the index",
    ),
    "an index entry without a tensor": (index("model.more", "model-00001-of-00002.safetensors"), "tensor model.more"),
    "a path out of the folder": (index(V, "../../../etc/passwd.safetensors"), "leaves the folder"),
    "an absolute path": (index(V, "/etc/passwd.safetensors"), "leaves the folder"),
    "a Windows path": (index(V, "..\\model-00001-of-00002.safetensors"), "leaves the folder"),
    "a pickle in the index of safetensors": (index(V, "pytorch_model.bin"), "is not a .safetensors file"),
    # tensors
    "a tensor in two shards": (
        change_tensors(NORM, lambda tensors: tensors.update({V: torch.zeros(32)})),
        f"tensor {V} is in two shards",
    ),
    "a tensor twice in a shard": (second_shard(twice_in_the_header), "is there twice"),
    "NaN": (change_tensor(NORM, spoilt(float("nan"))), f"{NORM} holds NaN"),
    "infinity": (change_tensor(UP, spoilt(float("-inf"))), f"{UP} holds NaN or infinite"),
    "integers for weights": (change_tensor(UP, lambda x: x.to(torch.int8)), f"tensor {UP} has dtype int8"),
    "8-bit floats": (change_tensor(UP, lambda x: x.to(torch.float8_e4m3fn)), f"tensor {UP} has dtype F8_E4M3"),
    "a wrong shape": (change_tensor(UP, lambda x: x.T.contiguous()), f"{UP} has shape [48, 64]"),
    "an unknown tensor": (
        lambda s: (
            change_tensors(V, lambda tensors: tensors.update({"model.extra": torch.ones(1)}))(s),
            index("model.extra", shard_of(s, V).name)(s),
        ),
        "model.extra of the source has no place in the result: it would be dropped",
    ),
    "a tie that is none": (config(tie_word_embeddings=True), f"{HEAD} differs"),
    # pickles
    "a pickle with code": (
        only_pickle(lambda path: torch.save({NORM: torch.ones(48), "x": Payload()}, path)),
        f"pytorch_model.bin is a pickle with code ({os.mkdir.__module__}.mkdir); it was not executed",
    ),
    "a bare pickle with code": (
        only_pickle(lambda path: path.write_bytes(pickle.dumps({"x": Payload()}))),
        "pytorch_model.bin is truncated or not a torch file",
    ),
    "a pickle of before torch 1.6": (only_pickle(old_pickle), "format of before 1.6"),
    "a truncated pickle": (
        only_pickle(lambda path: (torch.save({NORM: torch.ones(48)}, path), os.truncate(path, 300))),
        "is truncated or not a torch file",
    ),
    # the config
    "a config that is no JSON": (write("config.json", b"\xff{"), "config.json is not readable JSON"),
    "a config that is a list": (write("config.json", b"[]"), "config.json holds list"),
    "another architecture": (unknown_architecture, "cannot convert architecture 'gpt2'"),
    "an unknown architecture": (config(model_type="lama"), "unknown model_type 'lama'"),
    "remote code": (config(model_type="evil", auto_map={"AutoConfig": "evil.C"}), "unknown model_type 'evil'"),
    "quantised weights": (config(quantization_config={"quant_method": "awq"}), "the weights are quantised (awq)"),
    "a wrong size": (config(intermediate_size=32), "model.layers.0.mlp.down_proj.weight has shape [48, 64]"),
    "a size that is no number": (config(hidden_size="wide"), "hidden_size"),
    "no heads": (config(num_attention_heads=0), "the config cannot be used: integer modulo by zero"),
    "a negative size": (config(vocab_size=-1), "vocab_size is -1"),
    "heads that do not divide": (config(num_key_value_heads=4), "6 attention heads cannot share 4"),
    "a missing layer": (config(num_hidden_layers=3), "model.layers.2.self_attn.q_proj.weight is missing"),
    "a billion layers": (config(num_hidden_layers=10**9), "the config asks for 1000000000 layers"),
    "a layer too many": (config(num_hidden_layers=1), "it would be dropped"),
    "a bias too many": (config(attention_bias=False), "it would be dropped"),
    "an unknown activation": (config(hidden_act="glue"), "the config describes no model: KeyError: 'glue'"),
    "an unknown rotary embedding": (
        config(rope_parameters={"rope_type": "nope", "rope_theta": 1e4}),
        "the config describes no model: KeyError: 'nope'",
    ),
    "an adapter": (write("adapter_config.json", b"{}"), "merge_and_unload()"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line(name, tiny_llama, tmp_path, capfd, monkeypatch):
    damage, message = FAULTS[name]
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    monkeypatch.setenv("T2R_TEST_PAYLOAD", str(tmp_path / "executed"))
    damage(source)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    capfd.readouterr()
    assert main(["convert", str(source), str(tmp_path / "out"), "--no-verify"]) == 2
    sys.stdout.flush()
    err = capfd.readouterr().err
    assert message in err and "Traceback" not in err
    assert [line for line in err.splitlines() if line.startswith("t2r: ")] == [err.splitlines()[-1]]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}


def test_the_payload_of_these_pickles_does_work(tmp_path, monkeypatch):
    monkeypatch.setenv("T2R_TEST_PAYLOAD", str(tmp_path / "executed"))
    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path / "executed").exists()
