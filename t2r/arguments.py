"""What a word of the command line may be: types for argparse, each of which answers a wrong word with the nearest."""

import argparse
import re
import sys

from t2r.errors import UserError, nearest


def one_of(*choices: str) -> dict[str, object]:
    """The argparse settings of an option with named values; a wrong one is answered with the nearest."""

    def parse(word: str) -> str:
        if word not in choices:
            valid = nearest(word, choices) or ", ".join(choices)
            raise argparse.ArgumentTypeError(f"no value '{word}'; nearest valid: {valid}")
        return word

    return {"type": parse, "metavar": "{" + ",".join(choices) + "}"}


def bytes_of(word: str) -> int:
    """A size such as 5GB, 500MB or 2GiB, in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg])(i?)b?", word, re.IGNORECASE)
    size = found and int(float(found[1]) * (1024 if found[3] else 1000) ** ("kmg".index(found[2].lower()) + 1))
    if not size:
        raise argparse.ArgumentTypeError(f"'{word}' is no size; nearest valid: 5GB")
    return size


def batch_size(word: str) -> int | str:
    if word != "auto" and not re.fullmatch(r"-?\d+", word):
        raise argparse.ArgumentTypeError(f"'{word}' is no number of texts; nearest valid: auto")
    return word if word == "auto" else int(word)


def text(word: str) -> str:
    """The prompt itself, or stdin for `-` and for no prompt where stdin is not a terminal."""
    if word not in ("", "-"):
        return word
    if sys.stdin is None or (not word and sys.stdin.isatty()):
        raise UserError("no prompt", next='t2r generate MODEL "Why is the sky blue?"')
    return sys.stdin.read().removesuffix("\n")
