"""`t2r env`: the versions and the hardware that a bug report needs."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from t2r import __version__

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "datasets",
    "deepspeed",
    "omegaconf",
    "safetensors",
    "gguf",
    "lm-eval",
)


def env() -> None:
    """Print one `name: value` line per fact."""
    known = facts()
    width = max(map(len, known)) + 1
    for name, value in known.items():
        print(f"{name + ':':{width}} {value}")


def facts() -> dict[str, str]:
    """Versions and hardware by name. Packages are only looked up, but torch is imported: it knows the GPUs."""
    known = {
        "t2r": _own_version(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cpu": f"{os.cpu_count()} cores",
        "memory": _memory(),
    }
    known |= {package: _package_version(package) for package in PACKAGES}
    return known | {"cuda": _cuda(), "driver": _driver()}


def _own_version() -> str:
    checkout = Path(__file__).resolve().parent.parent
    commit = (checkout / ".git").exists() and _output("git", "-C", str(checkout), "describe", "--always", "--dirty")
    return f"{__version__} (commit {commit})" if commit else __version__


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (AttributeError, OSError, ValueError):  # not a Unix
        return "unknown"


def _package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    try:
        import torch
    except Exception as error:  # a broken torch is just what a bug report has to show
        return f"unknown: torch does not import ({type(error).__name__}: {' '.join(str(error).split())})"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(f"{d.name}, {d.total_memory / 2**30:.1f} GiB" for d in devices) or "no device"


def _driver() -> str:
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0] if lines else "not visible"


def _output(*command: str) -> str:
    """What `command` prints, or nothing when it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
