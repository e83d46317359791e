"""Folders are exact, atomic and written in little memory."""

import errno
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from t2r.convert import writer
from t2r.convert.writer import FolderWriter, available_ram, preflight
from t2r.errors import UserError

# Odd counts of narrow types first: written in this order, the wide ones would be misaligned.
TENSORS = {
    "flag": torch.tensor([True, False, True]),
    "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "double": torch.arange(7, dtype=torch.float64),
    "strided": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
    "count": torch.tensor([2**40], dtype=torch.int64),
}


def plan_of(tensors):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def write(out, tensors, **options):
    with FolderWriter(out, plan_of(tensors), **options) as folder:
        for name, tensor in tensors.items():
            folder.add(name, tensor)


def test_one_file_reads_back_equal(tmp_path):
    write(tmp_path / "out", TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "out/model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    raw = (tmp_path / "out/model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert all((8 + size + header[name]["data_offsets"][0]) % TENSORS[name].itemsize == 0 for name in TENSORS)


def test_shards_hold_the_plan_in_any_order_of_adding(tmp_path):
    with FolderWriter(tmp_path / "out", plan_of(TENSORS), shard_size=60) as folder:
        for name, tensor in reversed(TENSORS.items()):
            folder.add(name, tensor)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    # 3 + 30 + 4 + 0 bytes; then 56; then 48 + 8
    expected = [["flag", "half", "scalar", "empty"], ["double"], ["strided", "count"]]
    expected_map = {
        name: f"model-{i:05d}-of-00003.safetensors" for i, names in enumerate(expected, 1) for name in names
    }
    assert index["weight_map"] == expected_map
    assert index["metadata"]["total_size"] == 3 + 30 + 4 + 56 + 48 + 8
    for file in set(expected_map.values()):
        loaded = load_file(tmp_path / "out" / file)
        assert sorted(loaded) == sorted(name for name, place in expected_map.items() if place == file)
        assert all(torch.equal(loaded[name], TENSORS[name]) for name in loaded)


def test_transformers_reads_our_shards_and_agrees_on_the_index(tmp_path, tiny):
    model = tiny()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    with FolderWriter(tmp_path / "ours", plan_of(model.state_dict()), shard_size=100_000) as folder:
        model.config.save_pretrained(folder.path)
        for name, tensor in model.state_dict().items():
            folder.add(name, tensor)
    ours, theirs = (json.loads((tmp_path / d / "model.safetensors.index.json").read_text()) for d in ("ours", "theirs"))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_pieces_come_in_order(tmp_path):
    with FolderWriter(tmp_path / "out", plan_of({"double": TENSORS["double"]})) as folder:
        folder.add_piece("double", 0, TENSORS["double"][:3])
        for start, values in ((0, TENSORS["double"]), (4, TENSORS["double"][4:]), (3, torch.zeros(4))):
            with pytest.raises(ValueError, match="double has no place for"):
                folder.add_piece("double", start, values)
            folder._begun["double"] = 3
        folder.add_piece("double", 3, TENSORS["double"][3:])
        with pytest.raises(ValueError, match="double has no place for"):
            folder.add_piece("double", 7, torch.zeros(1, dtype=torch.float64))
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["double"], TENSORS["double"])


@pytest.mark.parametrize("kernel", ["copies", "has no such call", "refuses two devices"])
def test_copies_of_another_file(tmp_path, kernel, monkeypatch):
    """Unaligned offsets, in the kernel or through memory."""
    if kernel == "has no such call":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    if kernel == "refuses two devices":

        def refuse(*args):
            raise OSError(errno.EXDEV, "two devices")

        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    tensors = {name: torch.randint(0, 255, (n,), dtype=torch.uint8) for name, n in (("a", 3_000_001), ("b", 17))}
    (tmp_path / "source").write_bytes(b"x" * 5 + bytes(tensors["a"].numpy()) + bytes(tensors["b"].numpy()))
    with FolderWriter(tmp_path / "out", plan_of(tensors)) as folder:
        folder.add_copy("a", tmp_path / "source", 5)
        folder.add_copy("b", tmp_path / "source", 3_000_006)
        with pytest.raises(ValueError, match="added already"):
            folder.add_copy("a", tmp_path / "source", 5)
    loaded = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(UserError, match="became shorter"), FolderWriter(tmp_path / "short", plan_of(tensors)) as folder:
        folder.add_copy("a", tmp_path / "source", 3_000_000)
    assert not (tmp_path / "short").exists()


def test_folder_has_ordinary_permissions(tmp_path):
    write(tmp_path / "out", {})
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("other", torch.zeros(2), "other is not in the plan"),
        ("a", torch.zeros(3), r"a is \(\(3,\), torch.float32\), but the plan says \(\(2,\)"),
        ("a", torch.zeros(2, dtype=torch.float16), "float16"),
        ("done", torch.zeros(2), "done is added twice"),
        (None, None, "1 planned tensors were never added, the first is a"),
    ],
)
def test_a_deviation_from_the_plan_leaves_nothing(tmp_path, name, tensor, message):
    planned = ((2,), torch.float32)
    with (
        pytest.raises(ValueError, match=message),
        FolderWriter(tmp_path / "out", dict(done=planned, a=planned)) as folder,
    ):
        folder.add("done", torch.zeros(2))
        if name:
            folder.add(name, tensor)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interruption_leaves_nothing(tmp_path, error):
    with pytest.raises(error), FolderWriter(tmp_path / "new/deep/out", plan_of(TENSORS)) as folder:
        (folder.path / "config.json").write_text("{}")
        folder.add("half", TENSORS["half"])
        assert folder.path.parent == tmp_path / "new/deep"
        raise error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_out_is_refused_and_kept(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to("nowhere")
    (tmp_path / "out-2").mkdir()
    with pytest.raises(UserError, match=r"out already exists; try: `t2r convert SRC \S*out-3`") as error:
        FolderWriter(out, {})
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-2"]


def test_an_out_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="already exists"), FolderWriter(out, {}):
        out.mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not any(out.iterdir())


def test_the_current_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"\. already exists; try: `t2r convert SRC {tmp_path.name}-2`"):
        FolderWriter(".", {})


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write there: Not a directory"), FolderWriter(tmp_path / "file/out", {}):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    with pytest.raises(UserError, match="cannot write tensor half: No space left on device"):
        with FolderWriter(tmp_path / "out", plan_of(TENSORS)) as folder:
            monkeypatch.setattr(writer, "open", full, raising=False)
            folder.add("half", TENSORS["half"])
    assert not any(tmp_path.iterdir())


def test_what_a_killed_run_wrote_is_continued_only_by_the_same(tmp_path, monkeypatch):
    """The killed run is a copy of the folder in the middle of a run: what is on disk and noted then is all there is."""
    plan, out, partial = plan_of(TENSORS), tmp_path / "out", tmp_path / ".out.partial"

    def begin(path, **options):
        with pytest.raises(KeyboardInterrupt), FolderWriter(out, plan, shard_size=60, **options) as folder:
            folder.add("half", TENSORS["half"])
            folder.add("double", TENSORS["double"])
            folder.add_piece("strided", 0, torch.zeros(3))  # begun, not complete
            shutil.copytree(folder.path, path)
            raise KeyboardInterrupt
        assert not partial.exists()

    begin(tmp_path / "killed", resume="a")
    for other in ({"resume": "b"}, {"resume": "a", "shard_size": 70}):
        shutil.copytree(tmp_path / "killed", partial)
        (partial / "stale").touch()
        with FolderWriter(out, plan, **other) as folder:
            assert not folder.written and not (partial / "stale").exists()
            for name, tensor in TENSORS.items():
                folder.add(name, tensor)
        assert not partial.exists()
        shutil.rmtree(out)
    for damage in (None, "torn", "lost", "reboot"):
        shutil.copytree(tmp_path / "killed", partial)
        if damage == "torn":
            (partial / ".written").write_text((partial / ".written").read_text() + '"scal')
        if damage == "lost":
            (partial / "model-00002-of-00003.safetensors").unlink()
        if damage == "reboot":
            monkeypatch.setattr(writer, "BOOT_ID", tmp_path / "killed/.written")
        with FolderWriter(out, plan, shard_size=60, resume="a") as folder:
            assert folder.written == {"lost": {"half"}, "reboot": set()}.get(damage, {"half", "double"})
            for name, tensor in TENSORS.items():
                if name not in folder.written:
                    folder.add(name, tensor)
        assert [p.name for p in tmp_path.iterdir() if p.name != "killed"] == ["out"]
        assert sorted(p.name for p in out.iterdir())[0] != ".written"
        for file in out.glob("*.safetensors"):
            assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(file).items())
        shutil.rmtree(out)


def test_two_writers_of_one_folder_are_kept_apart(tmp_path):
    plan = plan_of({"half": TENSORS["half"]})
    with FolderWriter(tmp_path / "out", plan, resume="a") as first:
        with pytest.raises(UserError, match="another conversion is writing there"):
            FolderWriter(tmp_path / "out", plan, resume="a").__enter__()
        first.add("half", TENSORS["half"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_preflight_names_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=3_200_000_000))
    monkeypatch.setattr(writer, "available_ram", lambda: 2_000_000_000)
    out = tmp_path / "new/out"
    preflight(out, 3_200_000_000, 2_000_000_000)
    with pytest.raises(UserError, match=r"not enough disk: 14\.5 GB needed, 3\.2 GB free"):
        preflight(out, 14_500_000_000, 0)
    with pytest.raises(UserError, match=r"not enough memory: 9\.0 GB needed, 2\.0 GB available"):
        preflight(out, 0, 9_000_000_000)
    monkeypatch.setattr(writer, "available_ram", lambda: None)
    preflight(out, 0, 10**18)
    assert not any(tmp_path.iterdir())
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/model.safetensors").write_bytes(b"x" * 1_000_000)
    preflight(tmp_path / "out", 3_201_000_000, 0)


def test_available_ram_heeds_a_containers_limit(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   5000 kB\n")
    monkeypatch.setattr(writer, "PROC_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(writer, "CGROUP", tmp_path)
    assert available_ram() == 5000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nactive_file 100000\ninactive_file 50000\n")
    assert available_ram() == 450_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_ram() == 5000 * 1024


STREAM = """
import sys
from pathlib import Path
from t2r.convert.source import open_source
from t2r.convert.writer import FolderWriter

MB = 1_000_000

def peak():
    # VmHWM belongs to this process alone; ru_maxrss starts from the parent's.
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))

root = Path(sys.argv[1])
source = open_source(root / "src")
before = peak()
plan = {name: (source.shape(name), source.dtype(name)) for name in source.names()}
with FolderWriter(root / "out", plan, shard_size=200 * MB) as folder:
    for name, start, values in source.pieces():
        folder.add_piece(name, start, values)
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux' /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_streaming_holds_one_tensor_at_most(tmp_path, kind, tiny):
    # 600 MB in 10 tensors of 60 MB: of safetensors a piece of 2 MB is held, of a pickle a tensor and its mapping.
    tensors = {f"model.t{i}": torch.full((30_000_000,), i, dtype=torch.float16) for i in range(10)}
    if kind == "safetensors":
        write(tmp_path / "src", tensors)
    else:
        (tmp_path / "src").mkdir()
        torch.save(tensors, tmp_path / "src/pytorch_model.bin")
    tiny().config.save_pretrained(tmp_path / "src")
    del tensors
    run = subprocess.run([sys.executable, "-c", STREAM, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < (40_000_000 if kind == "safetensors" else 270_000_000)
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, torch.full_like(tensor, int(name.removeprefix("model.t"))))
