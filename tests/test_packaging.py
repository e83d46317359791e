"""The layout: what a wheel holds, what the folders at the root do not shadow, and what is imported when."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from importlib import resources
from pathlib import Path

import pytest

from t2r import __version__
from t2r.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("kernels", "configs", "recipes")
DATA = {".py", ".yaml", ".json", ".md", ".gz"}


def python(code: str) -> str:
    """What `code` prints in a fresh interpreter that is started at the repository's root."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def shipped(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.suffix in DATA and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in files}


def test_the_kernels_folder_does_not_shadow_hugging_face_kernels(tmp_path, monkeypatch):
    """An installed package of that name is found first, and transformers, which asks for it, imports."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").touch()
    (tmp_path / "kernels-0.dist-info").mkdir()  # a version too old for transformers to use what is in it
    (tmp_path / "kernels-0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    where = python("import kernels; from transformers import LlamaForCausalLM; print(kernels.__file__)")
    assert where.splitlines()[-1] == str(tmp_path / "kernels/__init__.py")


@pytest.mark.parametrize("name", LINKED)
def test_a_linked_folder_is_no_package_of_its_own(name):
    link = ROOT / "t2r" / name
    assert link.is_symlink() and link.readlink() == Path("..", name)
    assert not (ROOT / name / "__init__.py").exists()


def test_a_script_shadows_nothing():
    """The folder of a script comes before the standard library: one named numbers.py ends every script beside it."""
    scripts = {path.stem for path in (ROOT / "docs").rglob("*.py")}
    assert len(scripts) > 10 and not scripts & sys.stdlib_module_names


@pytest.mark.parametrize("patch", sorted(ROOT.glob("docs/**/*.patch")), ids=lambda path: path.stem)
def test_a_patch_that_waits_for_a_gpu_still_fits(patch):
    """What each of its hunks takes away or keeps is there."""
    hunks = 0
    for part in re.split(r"^diff .*\n", patch.read_text(), flags=re.MULTILINE)[1:]:
        text = (ROOT / re.search(r"^--- a/(.*)$", part, re.MULTILINE)[1]).read_text()
        for hunk in re.split(r"^@@.*\n", part, flags=re.MULTILINE)[1:]:
            before = [line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " -"]
            assert len(before) > 3 and "".join(before) in text
            hunks += 1
    assert hunks


def test_the_wheel_holds_every_module_and_data_file(tmp_path):
    pytest.importorskip("setuptools", "77", reason="building the wheel needs setuptools: pip install -e '.[test]'")
    source = tmp_path / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.name in ("t2r", *LINKED):
            shutil.copytree(path, source / path.name, symlinks=True)
        elif path.is_file():
            shutil.copy(path, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"t2r", f"t2r-{__version__}.dist-info"}
    packaged = {name for name in names if name.startswith("t2r/")}
    expected = {f"t2r/{name}" for name in shipped(ROOT / "t2r") if name.split("/")[0] not in LINKED}
    expected |= {f"t2r/{folder}/{name}" for folder in LINKED for name in shipped(ROOT / folder)}
    assert packaged == expected
    assert {"t2r/cli.py", "t2r/kernels/gsa/__init__.py", "t2r/configs/README.md", "t2r/recipes/README.md"} < packaged


@pytest.mark.parametrize("name", LINKED)
def test_a_linked_folder_is_found_through_the_package(name):
    found = {path.name for path in resources.files(f"t2r.{name}").iterdir()}
    assert found >= {path.name for path in (ROOT / name).iterdir() if path.name != "__pycache__"}


def test_help_is_instant():
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "t2r", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.3


def test_help_imports_nothing_heavy():
    code = "import sys, t2r.cli; t2r.cli.main([]); print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    assert python(code).splitlines()[-1] == "set()"


# The first lets transformers import AutoConfig in the middle of a model file; the last finds it imported already.
@pytest.mark.parametrize(
    "imports",
    [
        "import t2r; from transformers import LlamaForCausalLM",
        "import t2r.modeling",
        "from transformers import AutoModelForCausalLM; import t2r",
    ],
)
def test_auto_classes_know_our_models_in_any_order_of_imports(imports, tmp_path):
    family = FAMILIES["llama"]
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 8,
    }
    gsa = {"slots": 8, "ring": 8, "sinks": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family.gsa_model_type, "gsa": gsa, **sizes}))
    code = f"""
import sys
{imports}
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained({str(tmp_path)!r})
model = AutoModelForCausalLM.from_config(config)
print(config.model_type, type(config).__module__, type(model).__name__, len(model.model.layers))
print([finder for finder in sys.meta_path if type(finder).__module__ == "t2r"])
"""
    *_, loaded, hooks = python(code).splitlines()
    assert loaded == f"{family.gsa_model_type} t2r.modeling.configuration GSALlamaForCausalLM 1"
    assert hooks == "[]"


def test_transformers_alone_does_not_import_our_models():
    code = "import sys, t2r; from transformers import LlamaForCausalLM; print('t2r.modeling' in sys.modules)"
    assert python(code).splitlines()[-1] == "False"
