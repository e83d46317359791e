"""What a converted folder is to others: a model that loads without t2r, a card, a repository on the hub."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from t2r.cli import main
from t2r.convert import convert
from t2r.convert.standalone import bundle, claim

# Runs where there is only torch and transformers: logits, tokens, and the same again from a copy that
# transformers has saved.
WITHOUT_T2R = """
import sys

site, folder, out = sys.argv[1:]
sys.path.append(site)
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

found = {}
for where in (folder, out + "/copy"):
    settings = {"trust_remote_code": True}
    text = AutoTokenizer.from_pretrained(folder, **settings)("without t2r, in eighty letters" * 3, return_tensors="pt")
    ids = text.input_ids[:, :80]
    model = AutoModelForCausalLM.from_pretrained(where, **settings).eval()
    base = AutoModel.from_pretrained(where, **settings).eval()
    with torch.inference_mode():
        found[where] = {
            "ids": ids,
            "logits": model(ids).logits,
            "hidden": base(ids).last_hidden_state,
            "tokens": model.generate(ids, max_new_tokens=8, do_sample=False),
        }
    model.save_pretrained(out + "/copy")
torch.save((found, [name for name in sys.modules if name.partition(".")[0] in ("t2r", "omegaconf")]), out + "/found.pt")
"""


@pytest.fixture(scope="module")
def only_transformers(tmp_path_factory):
    """A folder of packages: torch, transformers and what these two say that they need, as links."""
    folder, waiting, seen = tmp_path_factory.mktemp("site"), ["torch", "transformers"], set()
    while waiting:
        if (name := canonicalize_name(waiting.pop())) in seen:
            continue
        seen.add(name)
        package = distribution(name)
        for top in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(package.locate_file(top))
        needed = map(Requirement, package.requires or [])
        waiting += [one.name for one in needed if not one.marker or one.marker.evaluate({"extra": ""})]
    return folder


@pytest.mark.parametrize("options", [{}, {"preset": "paper"}, {"keep_softmax": "1"}], ids=["exact", "paper", "hybrid"])
def test_a_folder_loads_without_t2r(tiny_llama, only_transformers, tmp_path, options):
    """In a Python without this one's site-packages and paths, isolated (-I -S), in an empty working directory."""
    folder = tmp_path / "model"
    convert(str(tiny_llama), str(folder), slots=32, verify=False, **options)
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-I", "-S", "-c", WITHOUT_T2R, only_transformers, folder, tmp_path]
    run = subprocess.run(words, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found, foreign = torch.load(tmp_path / "found.pt")
    assert foreign == [] and len(found) == 2

    model, base = (cls.from_pretrained(folder).eval() for cls in (AutoModelForCausalLM, AutoModel))
    assert type(model).__module__ == "t2r.modeling.models"
    text = AutoTokenizer.from_pretrained(folder)("without t2r, in eighty letters" * 3, return_tensors="pt")
    ids = text.input_ids[:, :80]
    with torch.inference_mode():
        expected = {
            "ids": ids,
            "logits": model(ids).logits,
            "hidden": base(ids).last_hidden_state,
            "tokens": model.generate(ids, max_new_tokens=8, do_sample=False),
        }
    for where, values in found.items():
        for key, value in expected.items():
            assert torch.equal(values[key], value), (where, key)


def test_where_t2r_is_installed_its_own_classes_run(tiny_llama, tmp_path):
    convert(str(tiny_llama), str(tmp_path / "model"), verify=False)
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; "
        f"model = A.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True); "
        "print(type(model).__mro__[1].__module__, any('t2r_standalone' in name for name in sys.modules))"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.split() == ["t2r.modeling.models", "False"], run.stderr


def test_the_one_file_holds_one_family():
    """Nothing of t2r or Triton is imported, no name of t2r's modules has two meanings, the table has one entry."""
    text = bundle("llama")
    compile(text, "t2r_standalone.py", "exec")
    assert not re.search(r"^\s*(from|import) (t2r|triton|\.)", text, re.MULTILINE)
    assert 'FAMILIES = {"llama": FAMILIES["llama"]}' in text


def test_a_name_with_two_meanings_is_an_error():
    owner = {}
    claim(owner, "pad", "from torch.nn.functional import pad")
    claim(owner, "pad", "from torch.nn.functional import pad")
    with pytest.raises(ValueError, match="pad means from torch.nn.functional import pad and t2r.x"):
        claim(owner, "pad", "t2r.x")


@pytest.fixture(scope="module")
def converted(tiny_llama, tmp_path_factory):
    source = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("publish") / "tiny")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    convert(str(source), str(source.parent / "out"))
    return source.parent / "out"


def test_the_card_says_what_was_made_of_what(converted):
    card = ModelCard.load(converted / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert "gated-slot-attention" in card.data.tags and "base_model" not in card.data.to_dict()  # a folder is no hub id
    report = json.loads((converted / "conversion.json").read_text())
    for file in report["source_files"]:
        assert f"| {file['name']} | {file['bytes']:,} | {file['sha256']} |" in card.text
    assert "| `model.layers.*.self_attn.v_proj.bias` | 2 | copied | 32 | bfloat16 |" in card.text
    assert "| `model.layers.*.self_attn.write` | 2 | new | 2 x 64 | float32 |" in card.text
    assert "`tiny` with **Gated Slot Attention** in place of softmax attention: 64 slots, 4 sinks." in card.text
    assert "It was not trained" in card.text and "long slots" not in card.text
    assert "\nverified\n" in card.text and "trust_remote_code=True" in card.text
    assert sum(int(n) for n in re.findall(r"^\| `\S+` \| (\d+) \|", card.text, re.MULTILINE)) == len(report["tensors"])


def test_push_uploads_the_public_files_in_one_commit(converted, tmp_path, capfd, monkeypatch):
    folder = shutil.copytree(converted, tmp_path / "model")
    (folder / "state").mkdir()
    (folder / "state/optimizer.pt").touch()
    (folder / "secret.env").touch()
    names = sorted(path.name for path in converted.iterdir())
    calls = []

    class Hub:
        def __init__(self, **library):
            assert library["library_name"] == "t2r"

        def whoami(self):
            calls.append(("whoami",))

        def create_repo(self, repo, private, exist_ok):
            calls.append(("create", repo, private, exist_ok))
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
            calls.append(("upload", repo_id, folder_path, allow_patterns))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert main(["push", str(folder), "me/model", "--dry-run"]) == 0
    printed = capfd.readouterr().out
    assert calls == [] and all(f"  {name}\n" in printed for name in names) and f"{len(names)} files, " in printed
    assert main(["push", str(folder), "me/model", "--private"]) == 0
    assert calls == [("whoami",), ("create", "me/model", True, True), ("upload", "me/model", folder, names)]
    assert "pushed to https://huggingface.co/me/model" in capfd.readouterr().out


def test_push_refuses_in_one_line(converted, tiny_llama, capfd, monkeypatch):
    def refuses(folder, repo, message):
        capfd.readouterr()
        assert main(["push", str(folder), repo]) == 2
        err = capfd.readouterr().err
        assert message in err and err.count("\n") == 1, err

    refuses(converted, "model", "'model' is no repository; nearest valid: NAME/MODEL")
    refuses(tiny_llama, "me/model", "this is a llama model, not a converted one")
    refuses(converted.parent / "nowhere", "me/model", "no such folder or file")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self: None)
    refuses(converted, "me/model", "the hub is switched off by HF_HUB_OFFLINE; try: `HF_HUB_OFFLINE=0 t2r push")

    def unknown(self):
        raise huggingface_hub.errors.LocalTokenNotFoundError("no token")

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", unknown)
    refuses(converted, "me/model", "you are not logged in to the hub; try: `hf auth login`")

    def unreachable(self):
        raise OSError("[Errno -3] name resolution\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", unreachable)
    refuses(converted, "me/model", "the hub cannot be reached: [Errno -3] name resolution (in me/model)")
