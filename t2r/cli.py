"""The command `t2r`: a parser that answers a mistake with one line, over the table of verbs (verbs.py).

Nothing heavy is imported before the arguments are right, so that help and errors are instant.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from textwrap import fill
from typing import NoReturn

from t2r import __version__
from t2r.errors import UserError, nearest
from t2r.verbs import VERBS, Verb


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are UserErrors."""

    def __init__(self, **settings) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(message, next=f"{self.prog} --help")

    def check_flags(self, words: Sequence[str]) -> None:
        """Complain of an unknown flag before argparse does: it would first miss whatever the misspelt flag set."""
        for word in words:
            if word == "--":
                return
            flag = word.partition("=")[0]
            # argparse takes a word with a space for a value, not for a flag.
            if flag.startswith("--") and " " not in word and flag not in self._option_string_actions:
                raise UserError(
                    f"unknown option '{flag}'",
                    nearest=nearest(flag, self._option_string_actions),
                    next=f"{self.prog} --help",
                )


def parse(argv: Sequence[str]) -> tuple[Verb | None, dict[str, object]]:
    """The chosen verb, if any, and its target's keyword arguments. Raises UserError; exits on --help and --version."""
    parser = Parser(
        prog="t2r",
        description="Turn a pretrained Transformer into a Gated Slot Attention RNN.",
        epilog="`t2r COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"t2r {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, verb in VERBS.items():
        about, example = fill(verb.about, width=88), f"example:\n  {verb.example}"
        verb.arguments(commands.add_parser(name, help=verb.help, description=about, epilog=example))

    at = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    parser.check_flags(argv[:at])
    parser.parse_args(argv[:at])
    if at == len(argv):
        parser.print_help()
        return None, {}
    name, words = argv[at], argv[at + 1 :]
    if name not in VERBS:
        raise UserError(
            f"unknown command '{name}'", nearest=nearest(name, VERBS) or ", ".join(VERBS), next="t2r --help"
        )
    command = commands.choices[name]
    command.check_flags(words)
    # Plain parse_args would take `generate MODEL --seed 1 PROMPT` for a command without a prompt.
    namespace, unexpected = command.parse_known_intermixed_args(words)
    if unexpected:
        command.error(f"unexpected argument '{unexpected[0]}'")
    return VERBS[name], vars(namespace)


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code: 1 when the verb's report says that it did not pass."""
    verb, arguments = parse(argv)
    if verb is None:
        return 0
    if not sys.stderr.isatty():  # in a log, each step of a library's progress bar would be a line
        os.environ.setdefault("TQDM_DISABLE", "1")
    module, function = verb.target.split(":")
    report = getattr(import_module(module), function)(**arguments)
    if not hasattr(report, "passed"):
        return 0
    print(report)
    return 0 if report.passed else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: prints a user's mistake as one line on stderr; any other exception keeps its traceback."""
    try:
        code = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here, where a reader that has left is no error
        return code
    except UserError as error:
        print(f"t2r: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        for said in interrupt.args:
            print(f"t2r: {said}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `t2r ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
