"""What a converted folder is to others: a model that loads without t2r, a card, a repository on the hub."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from t2r.convert import convert
from t2r.convert.standalone import bundle, claim
from t2r.families import FAMILIES

# Runs where there is only torch and transformers: logits, tokens, and the same again from a copy that
# transformers has saved.
WITHOUT_T2R = """
import sys

for name in ("t2r", "triton", "deepspeed", "peft", "datasets", "omegaconf"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
from transformers import AutoModel, AutoModelForCausalLM

folder, out = sys.argv[1:]
ids = torch.arange(3, 83)[None]
result = {}
for where in (folder, out + "/copy"):
    model = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True).eval()
    base = AutoModel.from_pretrained(where, trust_remote_code=True).eval()
    with torch.inference_mode():
        result[where] = {
            "logits": model(ids).logits,
            "hidden": base(ids).last_hidden_state,
            "tokens": model.generate(ids, max_new_tokens=8, do_sample=False),
        }
    model.save_pretrained(out + "/copy")
torch.save(result, out + "/result.pt")
"""


@pytest.mark.parametrize("preset", ["exact", "paper"])
def test_a_folder_loads_without_t2r(tiny_llama, tmp_path, preset):
    folder = tmp_path / "model"
    convert(str(tiny_llama), str(folder), preset=preset, slots=32, verify=False)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", WITHOUT_T2R, folder, tmp_path]
    run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = torch.load(tmp_path / "result.pt")

    ids = torch.arange(3, 83)[None]
    model, base = (cls.from_pretrained(folder).eval() for cls in (AutoModelForCausalLM, AutoModel))
    assert type(model).__module__ == "t2r.modeling.models"
    with torch.inference_mode():
        expected = {
            "logits": model(ids).logits,
            "hidden": base(ids).last_hidden_state,
            "tokens": model.generate(ids, max_new_tokens=8, do_sample=False),
        }
    assert len(result) == 2
    for where, found in result.items():
        for key, value in expected.items():
            assert torch.equal(found[key], value), (where, key)


def test_where_t2r_is_installed_its_own_classes_run(tiny_llama, tmp_path):
    convert(str(tiny_llama), str(tmp_path / "model"), verify=False)
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; "
        f"model = A.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True); "
        "print([cls.__module__ for cls in type(model).__mro__][1], any('t2r_standalone' in name for name in sys.modules))"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.split() == ["t2r.modeling.models", "False"], run.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_makes_one_file(family):
    """No name of t2r's modules has two meanings, nothing of t2r or Triton is imported, and the table is one family."""
    text = bundle(family)
    compile(text, "t2r_standalone.py", "exec")
    assert (
        "import t2r" not in text and "from t2r" not in text and "import triton" not in text and "\nfrom ." not in text
    )
    assert f'FAMILIES = {{"{family}": FAMILIES["{family}"]}}' in text


def test_a_name_with_two_meanings_is_an_error():
    owner = {}
    claim(owner, "pad", "from torch.nn.functional import pad")
    claim(owner, "pad", "from torch.nn.functional import pad")
    with pytest.raises(ValueError, match="pad means from torch.nn.functional import pad and t2r.x"):
        claim(owner, "pad", "t2r.x")
