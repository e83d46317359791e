"""The one exception for a user's mistake, and the search for what they probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake of the user's. The command line prints it as one line on stderr and exits with code 2.

    what: what is wrong, e.g. "unknown preset 'exct'"
    where: the file, key, tensor or option that holds the mistake
    nearest: the nearest valid value
    next: the command to run next
    """

    def __init__(self, what: str, *, where: object = None, nearest: object = None, next: str | None = None) -> None:
        line = str(what)
        if where is not None:
            line += f" (in {where})"
        if nearest is not None:
            line += f"; nearest valid: {nearest}"
        if next is not None:
            line += f"; try: `{next}`"
        # Some causes (a library's message, a file name) carry newlines; the promise of one line is kept here.
        super().__init__(" ".join(line.split()))
        self.what, self.where, self.nearest, self.next = what, where, nearest, next


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice closest in spelling to `word`, ignoring case, or None when none is close."""
    spelled = {choice.lower(): choice for choice in choices}
    close = get_close_matches(word.lower(), spelled, n=1)
    return spelled[close[0]] if close else None
