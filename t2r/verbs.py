"""The verbs of the command line as one table: what each is for, its arguments, and the function that it runs.

Nothing heavy is imported here: help and errors are instant.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

from t2r.arguments import batch_size, bytes_of, one_of, text

DTYPES = ("float32", "bfloat16", "float16")


class Verb(NamedTuple):
    """A verb of the command line. Each argument's `dest` is the keyword of the function that it is passed to."""

    help: str
    about: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    target: str  # "module:function", imported only when the verb runs


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="hub id, local folder, GGUF file, or package:NAME")
    parser.add_argument("out", metavar="OUT", help="folder to write; it must not exist")
    parser.add_argument("--preset", help="default: exact", **one_of("exact", "paper"))
    parser.add_argument("--slots", type=int, metavar="N", help="memory slots of each head (default: the preset's)")
    parser.add_argument(
        "--sinks", type=int, metavar="N", help="slots kept for the first tokens (default: the preset's)"
    )
    parser.add_argument(
        "--eviction",
        default="oldest",
        help="which token makes room: the oldest (default), or by score, fitted to what the source reads",
        **one_of("oldest", "score"),
    )
    parser.add_argument(
        "--eviction-text",
        nargs="+",
        default=["shipped:train"],
        metavar="FILE",
        help="text on which scores are fitted, half of it with lookups put in (default: t2r's own)",
    )
    parser.add_argument(
        "--eviction-reach",
        default="far",
        help="what scores hold: far, the default, what is asked for late; near, what the next words need",
        **one_of("near", "far"),
    )
    parser.add_argument(
        "--layer-slots", default="", metavar="LAYERS=N", help="slots in single layers, such as 0-3=128,9=256"
    )
    parser.add_argument(
        "--keep-softmax", default="", metavar="LAYERS", help="layers that keep their attention, such as 0,8-11"
    )
    parser.add_argument("--dtype", help="dtype to write (default: the source's)", **one_of(*DTYPES))
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="skip the check of the written model")
    parser.add_argument("--no-hash", dest="hash", action="store_false", help="record no SHA-256 of the source's files")
    parser.add_argument("--shard-size", type=bytes_of, metavar="SIZE", help="of a weight file at most (default: 5GB)")


def _slots(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="hub id, local folder, GGUF file, or package:NAME")
    parser.add_argument("--slots", type=int, default=64, metavar="N", help="on average, of a layer (default: 64)")
    parser.add_argument("--sinks", type=int, metavar="N", help="as of `t2r convert`")
    parser.add_argument(
        "--text", nargs="+", default=["shipped:train"], metavar="FILE", help="what to measure on (default: t2r's own)"
    )
    parser.add_argument("--texts", type=int, default=4, metavar="N", help="documents of it (default: 4)")
    parser.add_argument("--context", type=int, default=1024, metavar="T", help="tokens of each (default: 1024)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="of measuring and choosing (default: 2)")
    parser.add_argument("--eviction", default="oldest", help="as of `t2r convert`", **one_of("oldest", "score"))
    parser.add_argument("--device", help="for example cpu or cuda:0 (default: a GPU if there is one)")


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUT", help="folder that `t2r convert` wrote")
    parser.add_argument("--source", metavar="SRC", required=True, help="the model that it was converted from")
    parser.add_argument(
        "--by-layer", action="store_true", default=None, help="hold one layer in memory (default: if more does not fit)"
    )


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder that `t2r convert` wrote")
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", default="", type=text, help="the text to continue; - or none: read stdin"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the most likely tokens of this total mass"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="wrap the prompt in the model's chat template (default: if it has one)",
    )
    parser.add_argument("--dtype", help="dtype to compute in (default: the model's)", **one_of(*DTYPES))
    parser.add_argument("--device", help="for example cpu or cuda:0 (default: a GPU if there is one)")


def _push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="folder that `t2r convert` wrote")
    parser.add_argument("repo", metavar="NAME/MODEL", help="repository on the hub, made if it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, upload nothing")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="folder that `t2r convert` wrote")
    parser.add_argument("out", metavar="OUT", help="folder to write; it must not exist")
    parser.add_argument("--to", default="fla", help="flash-linear-attention, the only one so far", **one_of("fla"))


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="the original, then converted ones: folder, GGUF file, LABEL=PATH"
    )
    _recipe(parser, "runs/compare-CONVERTED")


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file, package:NAME, or LABEL=one of them")
    _recipe(parser, "runs/eval-MODEL")


def _leaderboard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="folder below which the reports lie")
    parser.add_argument("--out", metavar="OUT", help="folder to write (default: DIR/leaderboard)")


def _recipe(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--recipe", default="quick", metavar="R", help="name or YAML file (default: quick)")
    parser.add_argument("--out", metavar="DIR", help=f"folder to make (default: {out})")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of benchmark files, read in place of the hub's: DIR/piqa/validation.jsonl and so on, with the "
        "data sets' own fields (recipes/README.md lists them)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most N items of each task")
    parser.add_argument(
        "--batch-size", type=batch_size, metavar="N", help="texts read at once, or auto (default: the recipe's)"
    )
    parser.add_argument(
        "--device",
        help="cpu, cuda:0, or several with commas, a worker for each: cuda:0,cuda:0 is two (default: all GPUs, or CPU)",
    )
    parser.add_argument("--dtype", help="dtype of all models (default: the converted model's)", **one_of(*DTYPES))
    parser.add_argument("--log-samples", action="store_true", help="write items.jsonl: what was said of every item")
    parser.add_argument("--allow-code", action="store_true", help="run code that a model wrote, without a sandbox")


def _finetune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="X", required=True, help="YAML file, or the name of a shipped one")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="for example stages.0.tokens=100000")
    parser.add_argument("--model", metavar="CONVERTED", help="folder to begin with (default: convert the source)")
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/NAME)")
    parser.add_argument("--processes", type=int, metavar="N", help="processes on this machine (default: one a GPU)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines, which share a disk (default: 1)")
    parser.add_argument("--node-rank", dest="node", type=int, default=0, metavar="N", help="number of this machine")
    parser.add_argument("--master", metavar="HOST[:PORT]", help="machine 0 of --nodes")
    parser.add_argument(
        "--hostfile", metavar="FILE", help="start all machines from here by ssh; lines: HOST slots=GPUS"
    )


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a shipped one")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="for example deepspeed.zero=3")
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help="h100, h200, a100-80, rtx4090 ... (default: h100)"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="of all machines (default: 1)")
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.3,
        metavar="F",
        help="share of their peak that matrix products reach (default: 0.3)",
    )


def _prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a shipped one")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="for example data.cache=/data/tokens")


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a shipped one")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="for example stages.0.tokens=100000")
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/NAME)")


def _cp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a name that `t2r ls` lists")
    parser.add_argument("file", metavar="FILE", help="where to; it must not exist")


def _validate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="YAML file, or the name of a shipped one")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="for example stages.0.tokens=100000")


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", help="what to measure", **one_of("kernels"))
    parser.add_argument(
        "--shape", dest="shapes", action="append", default=[], metavar="B,T,HQ,H,D,M",
        help="batch, tokens, query heads, kv heads, head dim, slots; may be repeated (default: seven)",
    )  # fmt: skip
    parser.add_argument(
        "--gates",
        action="append",
        help="may be repeated (default: all); score: exact, evicting by score",
        **one_of("paper", "exact", "score"),
    )
    parser.add_argument("--no-decode", dest="decode", action="store_false", help="skip the decode step")
    parser.add_argument("--out", metavar="DIR", help="folder for bench.json and bench.png")


VERBS = {
    "convert": Verb(
        "turn a pretrained Transformer into a Gated Slot Attention model",
        "Reads the weights of a Transformer and writes a Hugging Face folder that holds the same model with a "
        "fixed-size recurrent state in place of its key-value cache. The preset `exact` starts out equal to the "
        "source; `paper` follows the Gated Slot Attention paper and needs training.",
        "t2r convert HuggingFaceTB/SmolLM2-135M-Instruct smollm2-gsa",
        _convert,
        "t2r.convert:convert",
    ),
    "slots": Verb(
        "measure how many slots each layer needs",
        "Cuts the attention of the source to windows (with --eviction score to the tokens worth most), layer by layer, "
        "and measures what each costs. Prints numbers of slots that keep more of the model than as many in each layer "
        "would, for the same memory. Takes seconds on a GPU; for SmolLM2-135M a quarter of an hour on two CPU cores.",
        "t2r slots HuggingFaceTB/SmolLM2-135M-Instruct --slots 64",
        _slots,
        "t2r.convert.allocate:slots",
    ),
    "verify": Verb(
        "prove that a converted model equals its source",
        "Compares the converted model with its source: with softmax put back over the converted weights, on the "
        "tokens that still fit the slots, and between every way of running it. Exits with 1 when a check fails.",
        "t2r verify smollm2-gsa --source HuggingFaceTB/SmolLM2-135M-Instruct",
        _verify,
        "t2r.convert.verify:verify",
    ),
    "generate": Verb(
        "continue a text, or answer it",
        "Streams the model's continuation of the prompt to stdout, then prints the speed and the size of the state.",
        't2r generate smollm2-gsa "Why is the sky blue?" --max-new-tokens 64',
        _generate,
        "t2r.generate:generate",
    ),
    "push": Verb(
        "upload a converted model to the Hugging Face hub",
        "Uploads weights, configuration, tokenizer, model card and the code that loads the model without t2r, in one "
        "commit. Log in first: `hf auth login`.",
        "t2r push smollm2-gsa my-name/smollm2-gsa --dry-run",
        _push,
        "t2r.publish:push",
    ),
    "export": Verb(
        "write a converted model as another project's checkpoint",
        "Writes a model of the preset `paper` as a GSAForCausalLM of flash-linear-attention (fla): the same weights "
        "under its names. `t2r convert` reads such a folder back. Models that fla cannot express are refused.",
        "t2r export smollm2-paper smollm2-fla --to fla",
        _export,
        "t2r.convert.fla:export",
    ),
    "compare": Verb(
        "measure what a conversion changed",
        "Evaluates the original and the converted models on the same items: perplexity by position, short tasks, "
        "recall at growing distance, memory, speed. Writes a report with plots and prints its numbers.",
        "t2r compare original=HuggingFaceTB/SmolLM2-135M-Instruct smollm2-gsa --recipe quick",
        _compare,
        "t2r.evaluate:compare",
    ),
    "eval": Verb(
        "measure one model",
        "Evaluates a model on a recipe, as `t2r compare` does, without an original beside it.",
        "t2r eval smollm2-gsa --recipe commonsense",
        _eval,
        "t2r.evaluate:evaluate",
    ),
    "leaderboard": Verb(
        "collect many reports into one table",
        "Puts what each converted model recovers of its original, and after how many tokens of training, into one "
        "table and one plot, from every report.json below a folder.",
        "t2r leaderboard runs",
        _leaderboard,
        "t2r.evaluate.leaderboard:leaderboard",
    ),
    "finetune": Verb(
        "train a converted model through the stages of a configuration",
        "Trains in the stages that the configuration lists: align (each mixer imitates the teacher's), distill (the "
        "logits do), lm (the next token). Uses every GPU of the machine, or none. An unfinished run goes on where it "
        "stopped. Every checkpoint is a Hugging Face folder.",
        "t2r finetune --config quickstart stages.0.tokens=20000 --out runs/mine",
        _finetune,
        "t2r.train.finetune:finetune",
    ),
    "plan": Verb(
        "work out what the training of a configuration costs",
        "Prints the parameters, the memory of a GPU, the time of a step and the GPU hours of each stage on given "
        "hardware, from the source's config alone. Exits with 1 where a stage does not fit.",
        "t2r plan mistral-7b-exact-700m --gpu h100 --gpus 8",
        _plan,
        "t2r.plan:plan",
    ),
    "prepare": Verb(
        "tokenise the data of a configuration before a run does",
        "Tokenises the training and validation data that a configuration names, into the folder where its runs look "
        "for them. What is there already is checked against its hashes, not made again.",
        "t2r prepare quickstart",
        _prepare,
        "t2r.data.prepare:prepare",
    ),
    "run": Verb(
        "convert, train and compare in one go",
        "Does all that a configuration says, in one folder: the conversion, the stages of training, and the comparison "
        "of the original with what became of it.",
        "t2r run quickstart --out runs/mine",
        _run,
        "t2r.run:run",
    ),
    "ls": Verb(
        "list the configurations and recipes that ship with t2r",
        "Prints the name of each configuration and recipe with one line about it.",
        "t2r ls",
        lambda parser: None,
        "t2r.run:ls",
    ),
    "cp": Verb(
        "copy a shipped configuration or recipe to edit it",
        "Copies a configuration or recipe that ships with t2r to a file of yours.",
        "t2r cp quickstart mine.yaml",
        _cp,
        "t2r.run:cp",
    ),
    "validate": Verb(
        "check a configuration or recipe without running it",
        "Reads a configuration, each variant of it, or a recipe, and says what is wrong. Needs no GPU.",
        "t2r validate mine.yaml",
        _validate,
        "t2r.run:validate",
    ),
    "bench": Verb(
        "check and time the GPU kernels",
        "Compares the GSA kernels with float64 on this GPU, then times them beside fla's (if it is installed) and "
        "softmax attention.",
        "t2r bench kernels --out bench",
        _bench,
        "t2r.bench:bench",
    ),
    "env": Verb(
        "print versions and hardware for a bug report",
        "Prints the versions of t2r and of the packages that it builds on, and the hardware it sees.",
        "t2r env",
        lambda parser: None,
        "t2r.env:env",
    ),
}
