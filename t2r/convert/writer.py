"""A model folder that appears complete or not at all, written one tensor at a time."""

import json
import os
import secrets
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from t2r.convert.source import SAFETENSORS_DTYPES
from t2r.errors import UserError

SHARD_SIZE = 5_000_000_000
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
PROC_MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


class FolderWriter:
    """Context manager that writes safetensors shards to a hidden sibling of `out` and renames it to `out` at the end.

    out: the folder to make; it must not exist, its parents may be missing
    plan: every tensor's (shape, dtype); plan order decides which shard it goes to
    shard_size: most bytes of tensor data in one file; a larger tensor gets a file of its own

    `path` is the folder to put other files in, valid inside the context. When the context ends with any exception
    nothing is left behind. Raises UserError when `out` exists or cannot be written, ValueError when what is added
    deviates from the plan.
    """

    def __init__(
        self,
        out: str | Path,
        plan: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        shard_size: int = SHARD_SIZE,
    ) -> None:
        self.out = Path(out).expanduser()
        self.path = self.out.parent / f".{self.out.name}.partial-{secrets.token_hex(2)}"
        self.plan = {name: (tuple(shape), dtype) for name, (shape, dtype) in plan.items()}
        self._shards = _split(self.plan, shard_size)
        self._places: dict[str, tuple[Path, int]] = {}
        self._made_parents: list[Path] = []
        check_absent(self.out)

    def __enter__(self) -> "FolderWriter":
        try:
            self._made_parents = [p for p in self.out.absolute().parents if not p.exists()]
            self.path.mkdir(parents=True)
            for number, shard in enumerate(self._shards, start=1):
                self._start_shard(self.path / self._file_name(number), shard)
            if len(self._shards) > 1:
                self._write_index()
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise UserError(f"cannot write there: {error.strerror}", where=self.out) from error
            raise
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor of the plan. Tensors may come in any order, each exactly once."""
        if name not in self._places:
            raise ValueError(f"tensor {name} is {'added twice' if name in self.plan else 'not in the plan'}")
        got = tuple(tensor.shape), tensor.dtype
        if got != self.plan[name]:
            raise ValueError(f"tensor {name} is {got}, but the plan says {self.plan[name]}")
        file, offset = self._places.pop(name)
        data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        try:
            with open(file, "r+b") as shard:
                shard.seek(offset)
                shard.write(data)
        except OSError as error:
            raise UserError(f"cannot write tensor {name}: {error.strerror}", where=self.out) from error

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as failure:
            raise UserError(f"cannot finish the folder: {failure.strerror}", where=self.out) from failure
        finally:
            self._discard()

    def _finish(self) -> None:
        if self._places:
            missing = list(self._places)
            raise ValueError(f"{len(missing)} planned tensors were never added, the first is {missing[0]}")
        for path in [*self.path.rglob("*"), self.path]:
            _sync(path)
        check_absent(self.out)
        os.rename(self.path, self.out)
        self._made_parents.clear()
        _sync(self.out.parent)

    def _discard(self) -> None:
        """Remove what was not renamed, with the parents that were made for it."""
        shutil.rmtree(self.path, ignore_errors=True)
        for parent in self._made_parents:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()

    def _file_name(self, number: int) -> str:
        count = len(self._shards)
        return "model.safetensors" if count <= 1 else f"model-{number:05d}-of-{count:05d}.safetensors"

    def _start_shard(self, file: Path, names: list[str]) -> None:
        """Write the header and reserve the length; the tensors' bytes are filled in by `add`."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets = {}
        end = 0
        # Wide types first: readers view the bytes in place, so every offset must be a multiple of its item size.
        for name in sorted(names, key=lambda name: -self.plan[name][1].itemsize):
            shape, dtype = self.plan[name]
            offsets[name] = end
            end += _nbytes(shape, dtype)
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [offsets[name], end]}
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        with open(file, "wb") as shard:
            shard.write(len(raw).to_bytes(8, "little") + raw)
            shard.truncate(8 + len(raw) + end)
        self._places |= {name: (file, 8 + len(raw) + offset) for name, offset in offsets.items()}

    def _write_index(self) -> None:
        sizes = [torch.Size(shape).numel() for shape, _ in self.plan.values()]
        index = {
            "metadata": {
                "total_parameters": sum(sizes),
                "total_size": sum(_nbytes(*planned) for planned in self.plan.values()),
            },
            "weight_map": {name: file.name for name, (file, _) in self._places.items()},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.path / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def check_absent(out: str | Path) -> None:
    """Raise UserError when something lies at `out`, a broken link included."""
    out = Path(out).expanduser()
    if not os.path.lexists(out):
        return
    number = 2
    while os.path.lexists(free := out.parent / f"{out.absolute().name}-{number}"):
        number += 1
    raise UserError(f"{out} already exists", next=f"t2r convert SRC {shlex.quote(str(free))}")


def preflight(out: str | Path, disk_bytes: int, ram_bytes: int) -> None:
    """Raise UserError unless the disk at `out` has room for `disk_bytes` and the memory for `ram_bytes`."""
    out = Path(out).expanduser().absolute()
    place = next(parent for parent in out.parents if parent.exists())
    free_disk = shutil.disk_usage(place).free
    if free_disk < disk_bytes:
        raise UserError(
            f"not enough disk: {_gb(disk_bytes)} needed, {_gb(free_disk)} free",
            where=place,
            next=f"t2r convert SRC /OTHER/DISK/{shlex.quote(out.name)}",
        )
    free_ram = available_ram()
    if free_ram is not None and free_ram < ram_bytes:
        raise UserError(f"not enough memory: {_gb(ram_bytes)} needed, {_gb(free_ram)} available", next="free -g")


def available_ram() -> int | None:
    """Bytes that can be allocated without swapping, a container's limit included; None where that is unknown."""
    known = [free for free in (_host_ram(), _container_ram()) if free is not None]
    return min(known, default=None)


def _host_ram() -> int | None:
    try:
        lines = PROC_MEMINFO.read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _container_ram() -> int | None:
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        # The page cache counts as used, but gives way.
        return limit - used + int(stat["active_file"]) + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return None


def _split(plan: Mapping[str, tuple[tuple[int, ...], torch.dtype]], shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, planned in plan.items():
        size = _nbytes(*planned)
        if shards[-1] and filled + size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _sync(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
