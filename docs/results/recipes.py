"""Recipes on six models: the original, the paper start, the exact start with 64 and 128 slots, a hybrid, and 64 slots
that evict by score.

python docs/results/recipes.py TEACHER OUT [RECIPE ...] [--minutes 9] [--data DIR --dtype bfloat16 ...]

TEACHER: folder, GGUF file or package:NAME. Writes OUT/RECIPE, by default for commonsense, recall, long and mmlu: a few
megabytes of text and plots. The converted models go to --models, and with --convert that is all; the scores are fitted
to --eviction-text. With --minutes the run ends by then, what it has finished is kept, and the same command goes on from
there, until its exit code is 0. All else is for `t2r compare`: --device cuda:0,cuda:0 runs two tasks side by side.
"""

import argparse
import signal
import sys
from pathlib import Path

from t2r.cli import main
from t2r.convert.source import open_source


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("out", type=Path)
    parser.add_argument("recipes", nargs="*", default=["commonsense", "recall", "long", "mmlu"])
    parser.add_argument("--models", type=Path, default=Path("runs/recipes-models"))
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--without", nargs="*", default=[], help="models to leave out")
    parser.add_argument("--eviction-text", nargs="+", default=["shipped:train"], help="as of t2r convert")
    parser.add_argument("--convert", action="store_true", help="only convert the models")
    arguments, options = parser.parse_known_args()
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # as if by Ctrl-C
    signal.setitimer(signal.ITIMER_REAL, 60 * arguments.minutes)
    layers = open_source(arguments.teacher).config.num_hidden_layers
    every_third = ",".join(map(str, range((layers - 1) % 3, layers, 3)))
    models = [f"original={arguments.teacher}"]
    for name, how in {
        "paper": ["--preset", "paper"],
        "exact-64": ["--slots", "64"],
        "exact-128": ["--slots", "128"],
        "hybrid": ["--slots", "64", "--keep-softmax", every_third],
        "scored-64": ["--slots", "64", "--eviction", "score", "--eviction-text", *arguments.eviction_text],
    }.items():
        if name in arguments.without:
            continue
        folder = arguments.models / name
        if not folder.exists() and (code := main(["convert", arguments.teacher, str(folder), "--no-verify", *how])):
            return code
        models.append(f"{name}={folder}")
    for recipe in [] if arguments.convert else arguments.recipes:
        out = arguments.out / recipe
        if not out.exists() and (code := main(["compare", *models, "--recipe", recipe, "--out", str(out), *options])):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(run())
