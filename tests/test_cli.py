"""The command line: help, versions, and one clear line for every mistake."""

import inspect
import io
import platform
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import t2r
from t2r import cli
from t2r.env import PACKAGES
from t2r.errors import UserError, nearest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def verb(monkeypatch):
    """A verb `try` that calls the function it is given."""

    def install(function, arguments=lambda parser: None):
        monkeypatch.setitem(sys.modules, "fake_verb", SimpleNamespace(run=function))
        monkeypatch.setitem(cli.VERBS, "try", cli.Verb("help", "about", "t2r try", arguments, "fake_verb:run"))

    return install


@pytest.mark.parametrize(
    "line, answer",
    [
        ("convrt a b", "unknown command 'convrt'; nearest valid: convert; try: `t2r --help`"),
        ("zzz", f"unknown command 'zzz'; nearest valid: {', '.join(cli.VERBS)}; try: `t2r --help`"),
        ("--versoin", "unknown option '--versoin'; nearest valid: --version; try: `t2r --help`"),
        ("--versoin env", "unknown option '--versoin'; nearest valid: --version; try: `t2r --help`"),
        ("convert a b --slotz 3", "unknown option '--slotz'; nearest valid: --slots; try: `t2r convert --help`"),
        ("convert --slotz=3", "unknown option '--slotz'; nearest valid: --slots; try: `t2r convert --help`"),
        ("convert a b --slot 3", "unknown option '--slot'; nearest valid: --slots; try: `t2r convert --help`"),
        ("convert a b --force", "unknown option '--force'; try: `t2r convert --help`"),
        ("convert a b c", "unexpected argument 'c'; try: `t2r convert --help`"),
        ("convert a", "the following arguments are required: OUT; try: `t2r convert --help`"),
        ("convert a b --slots", "argument --slots: expected one argument; try: `t2r convert --help`"),
        ("convert a b --slots x", "argument --slots: invalid int value: 'x'; try: `t2r convert --help`"),
        (
            "convert a b --preset exct",
            "argument --preset: no value 'exct'; nearest valid: exact; try: `t2r convert --help`",
        ),
        (
            "generate m p --dtype fp8",
            "argument --dtype: no value 'fp8'; nearest valid: float32, bfloat16, float16; try: `t2r generate --help`",
        ),
        (
            "eval m --batch-size x",
            "argument --batch-size: 'x' is no number of texts; nearest valid: auto; try: `t2r eval --help`",
        ),
        ("verify a", "the following arguments are required: --source; try: `t2r verify --help`"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(line, answer, capsys):
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"t2r: {answer}\n"


@pytest.mark.parametrize("name", cli.VERBS)
def test_the_arguments_of_a_verb_fit_its_target(name):
    words = {
        "convert": ["src", "out"],
        "slots": ["src", "--slots", "64", "--text", "a", "b"],
        "verify": ["out", "--source", "src"],
        "generate": ["model", "prompt"],
        "push": ["folder", "me/model"],
        "export": ["folder", "out"],
        "compare": ["original", "converted"],
        "eval": ["model", "--batch-size", "auto"],
        "leaderboard": ["runs", "--out", "out"],
        "finetune": ["--config", "x", "a=1", "--out", "out"],
        "plan": ["x", "a=1", "--gpu", "h200", "--gpus", "8"],
        "prepare": ["x", "a=1"],
        "run": ["x", "a=1"],
        "ls": [],
        "cp": ["x", "file"],
        "validate": ["x"],
        "bench": ["kernels", "--shape", "8,2048,32,8,128,64", "--gates", "paper"],
        "env": [],
    }
    verb, arguments = cli.parse([name, *words[name]])
    module, function = verb.target.split(":")
    inspect.signature(getattr(import_module(module), function)).bind(**arguments)


@pytest.mark.parametrize("name", cli.VERBS)
def test_the_help_of_a_verb_ends_with_an_example_that_parses(name, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        cli.main([name, "--help"])
    example = cli.VERBS[name].example
    assert capsys.readouterr().out.endswith(f"example:\n  {example}\n")
    assert example.startswith(f"t2r {name}")
    cli.parse(shlex.split(example)[1:])


def test_options_reach_the_target_by_keyword():
    _, arguments = cli.parse(
        "convert a b --preset paper --slots 32 --sinks 2 --dtype float16 --dry-run --no-verify --no-hash "
        "--shard-size 1.5GB".split()
    )
    assert arguments == {
        "source": "a",
        "out": "b",
        "preset": "paper",
        "slots": 32,
        "sinks": 2,
        "dtype": "float16",
        "dry_run": True,
        "verify": False,
        "hash": False,
        "shard_size": 1_500_000_000,
        "eviction": "oldest",
        "layer_slots": "",
        "keep_softmax": "",
        "eviction_text": ["shipped:train"],
        "eviction_reach": "far",
    }


@pytest.mark.parametrize(
    "words", [["m", "a b"], ["m", "--top-p", "0.9", "a b"], ["--no-chat", "m", "--seed", "1", "a b"]]
)
def test_the_prompt_may_stand_anywhere(words):
    assert cli.parse(["generate", *words])[1]["prompt"] == "a b"


def test_the_prompt_may_look_like_a_flag():
    assert cli.parse(["generate", "m", "--no-chat", "--", "--flag"])[1]["prompt"] == "--flag"
    assert cli.parse(["generate", "m", "- a list"])[1]["prompt"] == "- a list"


@pytest.mark.parametrize("words", [["generate", "m"], ["generate", "m", "-"]])
def test_the_prompt_comes_from_stdin(words, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert cli.parse(words)[1]["prompt"] == "two\nlines"


def test_no_prompt_on_a_terminal_is_a_mistake(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UserError, match="no prompt"):
        cli.parse(["generate", "m"])


def test_a_report_is_printed_and_sets_the_exit_code(verb, capsys):
    class Report:
        def __init__(self, passed):
            self.passed = passed

        def __str__(self):
            return f"passed: {self.passed}"

    for passed, code in ((True, 0), (False, 1)):
        verb(lambda passed=passed: Report(passed))
        assert cli.main(["try"]) == code
        assert capsys.readouterr().out == f"passed: {passed}\n"


def test_what_a_verb_raises(verb, capsys):
    def fail(error):
        raise error

    verb(lambda: fail(UserError("no such folder", where="a/b", next="ls a")))
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == "t2r: no such folder (in a/b); try: `ls a`\n"
    verb(lambda: fail(KeyboardInterrupt()))
    assert cli.main(["try"]) == 130
    verb(lambda: fail(ZeroDivisionError("a bug of ours keeps its traceback")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])


def test_a_user_error_is_one_line():
    error = UserError("a library's\n  message", where=Path("x"), nearest="b", next="t2r env")
    assert str(error) == "a library's message (in x); nearest valid: b; try: `t2r env`"


@pytest.mark.parametrize(
    "word, expected", [("exct", "exact"), ("EXACT", "exact"), ("papers", "Paper"), ("llama", None)]
)
def test_nearest(word, expected):
    assert nearest(word, ["exact", "Paper"]) == expected


@pytest.mark.parametrize("start", [["-m", "t2r"], [str(ROOT / "cli.py")]])
def test_every_way_to_start(start):
    result = subprocess.run([sys.executable, *start, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"t2r {t2r.__version__}\n", "")
    result = subprocess.run([sys.executable, *start, "convrt"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m t2r env | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_log_holds_no_progress_bars():
    code = """
import sys, types
from t2r import cli
sys.modules["bar"] = types.SimpleNamespace(run=lambda: list(__import__("tqdm").tqdm([1, 2])))
cli.VERBS["env"] = cli.VERBS["env"]._replace(target="bar:run")
cli.main(["env"])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_env_prints_versions_and_hardware(capsys):
    assert cli.main(["env"]) == 0
    facts = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    facts = {name: value.strip() for name, value in facts.items()}
    assert facts["t2r"].startswith(t2r.__version__)
    assert facts["python"] == f"{platform.python_version()} ({sys.executable})"
    for package in PACKAGES:
        try:
            assert facts[package] == version(package)
        except PackageNotFoundError:
            assert facts[package] == "not installed"
    if not torch.cuda.is_available():
        assert facts["cuda"] == "no device"
    assert {"platform", "cpu", "memory", "driver"} < facts.keys()


def test_env_survives_a_torch_that_does_not_import(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["env"]) == 0
    assert "cuda:         unknown: torch does not import (ModuleNotFoundError" in capsys.readouterr().out
