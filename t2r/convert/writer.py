"""A model folder that appears complete or not at all, written one tensor at a time."""

import errno
import hashlib
import json
import os
import secrets
import shlex
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import torch

from t2r.convert.source import SAFETENSORS_DTYPES
from t2r.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two conversions into one folder are not kept apart there
    fcntl = None

SHARD_SIZE = 5_000_000_000
JOURNAL = ".written"
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PROC_MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


class FolderWriter:
    """Context manager that writes safetensors shards to a hidden sibling of `out` and renames it to `out` at the end.

    out: the folder to make; it must not exist, its parents may be missing
    plan: every tensor's (shape, dtype); plan order decides which shard it goes to
    shard_size: most bytes of tensor data in one file; a larger tensor gets a file of its own
    resume: names what is written (source, its state, options). A run that was killed leaves its sibling behind; a later
        one with the same `resume` and plan goes on with it, any other starts over. So does one after a reboot: what a
        killed process wrote is in the kernel's hands, what a dead machine wrote may be lost. None: never go on.

    `path` is the folder to put other files in, `written` the tensors that are there already; both valid inside the
    context. When the context ends with any exception nothing is left behind. Raises UserError when `out` exists or
    cannot be written, ValueError when what is added deviates from the plan.
    """

    def __init__(
        self,
        out: str | Path,
        plan: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        shard_size: int = SHARD_SIZE,
        resume: str | None = None,
    ) -> None:
        self.out = Path(out).expanduser()
        suffix = "partial" if resume else f"partial-{secrets.token_hex(2)}"
        self.path = self.out.parent / f".{self.out.name}.{suffix}"
        self.plan = {name: (tuple(shape), dtype) for name, (shape, dtype) in plan.items()}
        self.written: set[str] = set()
        self._mark = _fingerprint(resume, shard_size, self.plan) if resume else None
        self._shards = _split(self.plan, shard_size)
        self._places: dict[str, tuple[Path, int]] = {}
        self._made_parents: list[Path] = []
        self._files: dict[str, Path] = {}
        self._owned = False  # whether the folder at `path` is ours to remove
        self._lock: int | None = None
        self._open: dict[Path, FileIO] = {}
        self._begun: dict[str, int] = {}  # elements written of each tensor that is not complete
        self._pool = ThreadPoolExecutor(1)
        self._copying: tuple[str, Future] | None = None
        check_absent(self.out)

    def __enter__(self) -> "FolderWriter":
        try:
            self._made_parents = [p for p in self.out.absolute().parents if not p.exists()]
            self.path.mkdir(parents=True, exist_ok=bool(self._mark))
            if self._mark:
                self._lock_folder()
            self._owned = True
            if self._mark:
                self._resume()
            for number, shard in enumerate(self._shards, start=1):
                self._start_shard(self.path / self._file_name(number), shard)
            if len(self._shards) > 1:
                self._write_index()
            self._places = {name: place for name, place in self._places.items() if name not in self.written}
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
        self.add_piece(name, 0, tensor.detach().cpu().contiguous().reshape(-1))

    def add_piece(self, name: str, start: int, values: torch.Tensor) -> None:
        """Write the part of a tensor that begins at its element `start`; values are flat, parts come in order."""
        (shape, dtype), done = self.plan[name], self._begun.pop(name, 0)
        size = torch.Size(shape).numel()
        if name not in self._places or values.dtype != dtype or start != done or start + len(values) > size:
            raise ValueError(f"tensor {name} has no place for {len(values)} values of {values.dtype} at {start}")
        file, offset = self._places[name]
        try:
            if file not in self._open:
                self._open[file] = open(file, "r+b", buffering=0)
            self._open[file].seek(offset + start * dtype.itemsize)
            rest = memoryview(values.view(torch.uint8).numpy())
            while rest:  # the kernel takes at most 2 GB at once
                rest = rest[self._open[file].write(rest) :]
            if start + len(values) < size:
                self._begun[name] = start + len(values)
                return
            self._complete(name)
        except OSError as error:
            raise UserError(f"cannot write tensor {name}: {error.strerror}", where=self.out) from error

    def add_copy(self, name: str, file: Path, offset: int) -> None:
        """Have the kernel copy a tensor's bytes from `offset` of `file`, while the caller goes on; one at a time."""
        self._end_copy()
        if name not in self._places or name in self._begun:
            raise ValueError(f"tensor {name} is not in the plan, or added already")
        target, position = self._places[name]
        self._copying = name, self._pool.submit(_copy, file, offset, target, position, self.nbytes(name))

    def _end_copy(self) -> None:
        if self._copying:
            name, copying = self._copying
            try:
                copying.result()
                self._complete(name)
            except OSError as error:
                raise UserError(f"cannot write tensor {name}: {error.strerror}", where=self.out) from error
            self._copying = None

    def _complete(self, name: str) -> None:
        """Note that all of a tensor is written."""
        del self._places[name]
        if self._mark:
            with open(self.path / JOURNAL, "a", encoding="utf-8") as journal:
                journal.write(json.dumps(name) + "\n")

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor of the plan."""
        return _nbytes(*self.plan[name])

    def flush(self) -> None:
        """Return when all that was added is on disk."""
        self._end_copy()
        try:
            for file in {self._files[name] for name in self.plan}:
                _sync(file)
        except OSError as error:
            raise UserError(f"cannot write: {error.strerror}", where=self.out) from error

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as failure:
            raise UserError(f"cannot finish the folder: {failure.strerror}", where=self.out) from failure
        finally:
            self._discard()

    def _lock_folder(self) -> None:
        self._lock = os.open(self.path, os.O_RDONLY) if fcntl else None
        try:
            if fcntl:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = not fcntl or os.path.samestat(os.fstat(self._lock), os.stat(self.path))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:  # the other one holds it, or has just renamed it
            raise UserError("another conversion is writing there", where=self.out)

    def _resume(self) -> None:
        """Find out what a killed run has written; remove what another conversion has left."""
        journal = self.path / JOURNAL
        lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
        if lines[:1] == [self._mark]:
            for line in lines[1:]:
                try:
                    self.written.add(json.loads(line))
                except ValueError:  # the line that the kill interrupted
                    break
        else:
            for path in self.path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        journal.write_text("\n".join([self._mark, *map(json.dumps, sorted(self.written)), ""]), encoding="utf-8")

    def _finish(self) -> None:
        self.flush()
        if self._places:
            missing = list(self._places)
            raise ValueError(f"{len(missing)} planned tensors were never added, the first is {missing[0]}")
        (self.path / JOURNAL).unlink(missing_ok=True)
        for path in [*self.path.rglob("*"), self.path]:
            _sync(path)
        check_absent(self.out)
        os.rename(self.path, self.out)
        self._owned = False
        self._made_parents.clear()
        _sync(self.out.parent)

    def _discard(self) -> None:
        """Remove what was not renamed, with the parents that were made for it."""
        self._pool.shutdown(cancel_futures=True)
        for file in self._open.values():
            file.close()
        if self._owned:
            shutil.rmtree(self.path, ignore_errors=True)
        for parent in self._made_parents:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
        if self._lock is not None:
            os.close(self._lock)

    def _file_name(self, number: int) -> str:
        count = len(self._shards)
        return "model.safetensors" if count <= 1 else f"model-{number:05d}-of-{count:05d}.safetensors"

    def _start_shard(self, file: Path, names: list[str]) -> None:
        """Write the header and reserve the length, unless a killed run has. `add` fills in the tensors' bytes."""
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
        size = 8 + len(raw) + end
        if self.written.isdisjoint(names) or not file.exists() or file.stat().st_size != size:
            self.written.difference_update(names)
            with open(file, "wb") as shard:
                shard.write(len(raw).to_bytes(8, "little") + raw)
                shard.truncate(size)
        self._files |= dict.fromkeys(names, file)
        self._places |= {name: (file, 8 + len(raw) + offset) for name, offset in offsets.items()}

    def _write_index(self) -> None:
        sizes = [torch.Size(shape).numel() for shape, _ in self.plan.values()]
        index = {
            "metadata": {
                "total_parameters": sum(sizes),
                "total_size": sum(_nbytes(*planned) for planned in self.plan.values()),
            },
            "weight_map": {name: file.name for name, file in self._files.items()},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.path / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _copy(source: Path, offset: int, target: Path, position: int, size: int) -> None:
    """Copy bytes between files within the kernel, or through memory where it cannot (other systems, two devices)."""
    with open(source, "rb", buffering=0) as reader, open(target, "r+b", buffering=0) as writer:
        kernel = hasattr(os, "copy_file_range")
        while size:
            try:
                if not kernel:
                    done = os.pwrite(writer.fileno(), os.pread(reader.fileno(), min(size, 1 << 20), offset), position)
                else:
                    done = os.copy_file_range(reader.fileno(), writer.fileno(), min(size, 1 << 26), offset, position)
            except OSError as error:
                if not kernel or error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                kernel = False
                continue
            if not done:
                raise UserError("the file became shorter while it was read", where=source)
            offset, position, size = offset + done, position + done, size - done


def _fingerprint(*parts: object) -> str:
    try:
        boot = BOOT_ID.read_text()
    except OSError:  # not Linux: nothing tells two boots apart, so no run goes on with another's
        boot = secrets.token_hex()
    return hashlib.sha256(repr((boot, *parts)).encode()).hexdigest()


def check_absent(out: str | Path, command: str = "t2r convert SRC") -> None:
    """Raise UserError when something lies at `out`, a broken link included. command: what would make another one."""
    out = Path(out).expanduser()
    if not os.path.lexists(out):
        return
    number = 2
    while os.path.lexists(free := out.parent / f"{out.absolute().name}-{number}"):
        number += 1
    raise UserError(f"{out} already exists", next=f"{command} {shlex.quote(str(free))}")


def preflight(out: str | Path, disk_bytes: int, ram_bytes: int, command: str = "t2r convert SRC") -> None:
    """Raise UserError unless the disk at `out` has room for `disk_bytes` and the memory for `ram_bytes`. command: what
    would make `out` elsewhere."""
    out = Path(out).expanduser().absolute()
    place = next(parent for parent in out.parents if parent.exists())
    begun = (place / f".{out.name}.partial").glob("*")  # what a killed run has written is continued or removed
    free_disk = shutil.disk_usage(place).free + sum(path.stat().st_blocks * 512 for path in begun)
    if free_disk < disk_bytes:
        raise UserError(
            f"not enough disk: {_gb(disk_bytes)} needed, {_gb(free_disk)} free",
            where=place,
            next=f"{command} /OTHER/DISK/{shlex.quote(out.name)}",
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
