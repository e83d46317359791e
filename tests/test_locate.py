"""Models that are found by name: in the hub's cache and in installed packages."""

import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from t2r.convert.source import open_source
from t2r.errors import UserError


def test_the_hub_cache_serves_offline(tiny_llama, tmp_path, monkeypatch):
    commit = "0" * 40
    cached = tmp_path / "models--org--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(commit)
    (cached / "blobs").mkdir()
    (cached / "snapshots" / commit).mkdir(parents=True)
    for file in tiny_llama.iterdir():  # as the client lays them out: links to blobs
        shutil.copy(file, cached / "blobs" / file.name)
        (cached / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = open_source("org/tiny")
    assert source.spec == "org/tiny" and source.path == cached / "snapshots" / commit
    expected = dict(open_source(tiny_llama).items())
    read = dict(source.items())
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in expected)
    shard = next(tiny_llama.glob("model-00002-*.safetensors")).name
    (cached / "snapshots" / commit / shard).unlink()
    with pytest.raises(UserError, match=f"shard {shard} is missing.*hf download org/tiny {shard} --force-download"):
        open_source("org/tiny")
    with pytest.raises(UserError, match="no folder 'org/absent' here, and the hub did not deliver it.*hf download"):
        open_source("org/absent")


@pytest.mark.parametrize("holds", ["safetensors", "bin"])
def test_the_hub_is_asked_for_one_format(holds, tiny_llama, tmp_path, monkeypatch):
    """Pickles only where there is nothing better; never copies of the model in other formats."""
    asked = []
    if holds == "bin":
        shutil.copytree(tiny_llama, tmp_path / "model", ignore=shutil.ignore_patterns("model*"))
        torch.save(dict(open_source(tiny_llama).items()), tmp_path / "model/pytorch_model.bin")

    def download(repo, allow_patterns, ignore_patterns):
        assert repo == "org/tiny" and "*.json" in allow_patterns and ignore_patterns == ["*/*", "consolidated*"]
        asked.append(allow_patterns[-1])
        return tiny_llama if holds == "safetensors" else tmp_path / "model"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    open_source("org/tiny")
    assert asked == ["*.safetensors", "*.bin"][: 1 + (holds == "bin")]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package whose import fails, to hold models."""
    root = tmp_path / "site/t2r_test_models"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(root.parent))
    return root


def test_a_package_is_located_without_importing_it(tiny_llama, package, fault):
    shutil.copytree(tiny_llama, package / "small")
    assert open_source("package:t2r-test-models").path == package / "small"
    shutil.copytree(tiny_llama, package / "large")
    assert open_source("package:t2r_test_models/large").path == package / "large"
    fault("package:t2r_test_models", "ships 2 models, not one: large, small")
    fault("package:t2r_test_models/smal", "ships no model 'smal'", "nearest valid: small")
    fault("package:t2r_test_models/../..", "ships no model '../..'")


def test_packages_that_are_not_there(package, fault):
    fault("package:t2r_test_models", "ships 0 models, not one: none")
    fault("package:t2r_absent", "no installed package 't2r_absent'", "pip install t2r_absent")
    fault("package:os.path", "no installed package 'os.path'")
    fault("package:", "no installed package ''")
