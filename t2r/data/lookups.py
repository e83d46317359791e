"""Text with lookups: documents into which facts are put that the same document asks for again further on.

Plain text seldom needs one particular word from far away, so neither scores for eviction that are fitted to it nor
training on it learn to keep such a word. A document with lookups does, many times:

    ... which was built of stone. harbour = 4821. chapel = 930. It had a roof of slate ... harbour = 4821. Then ...

Keys are words of the document itself, values are numbers or other words of it. A fact is asked for within 800 tokens;
for training some are once more, up to 2,500 tokens later, as what is never read from so far away is not learned to be.
Scores are fitted without that: they cannot hold it, and trying to they hold less of what is near. Everything is drawn
from the document's own hash, so the same document always becomes the same text.
"""

import hashlib
import random
import re
from itertools import chain
from typing import NamedTuple

# Key and value as they are stated, and as they are asked for and answered. None is how t2r.evaluate.recall asks.
FORMS = (
    ("{key} = {value}.", "{key} = {value}."),
    ("{key}: {value}\n", "{key}: {value}\n"),
    ("\n- {key}: {value}", "\n- {key}: {value}\n"),
    ('"{key}": "{value}",', '"{key}": "{value}",'),
    ("\n| {key} | {value} |", "\n| {key} | {value} |\n"),
    ("The number of the {key} is {value}.", "The number of the {key} is {value}."),
    ("Remember that {key} means {value}.", "As was said, {key} means {value}."),
    ("The {key} is called {value}.", "\nQuestion: what is the {key} called?\nAnswer: {value}.\n"),
    ("The password for {key} is {value}.", "\nQ: password for {key}?\nA: {value}\n"),
    ("{key} ({value})", "{key} ({value})"),
)
EPISODE = 3600  # characters of the text between one set of facts and the next, about 800 tokens
MOST = 12  # facts of an episode
NEAR, AGAIN = "lookups:", "lookups-again:"  # what stands before the name of a file or of a data set
MORE = {NEAR: 0, AGAIN: 8}  # questions of an episode for facts of those before it, at most
BACK = 3  # episodes before it that they look back
WORD = re.compile(r"[A-Za-z]{4,12}")
SENTENCE = re.compile(r".+?(?:[.!?]\s+|\Z)", re.DOTALL)


class Fact(NamedTuple):
    """place: where it is stated, 0 to 1 in the first half of its episode. stated, asked: the texts of that, and of the
    question with its answer, the value."""

    key: str
    value: str
    place: float
    stated: str
    asked: str


class Piece(NamedTuple):
    """A stretch of the made text: a sentence, or what is said of a fact."""

    text: str
    fact: Fact | None = None
    is_question: bool = False


class Asked(str):
    """A text with lookups. answers: (begin, end, said) of each, in characters; there the fact was last said before."""

    answers: list[tuple[int, int, int]]


def with_lookups(text: str, kind: str = NEAR) -> Asked:
    """The document with facts and questions; as it is where it has too few words for that."""
    rng = random.Random(hashlib.sha256(text.encode()).digest())
    words = sorted(set(WORD.findall(text)))
    if len(words) < 4 * MOST:
        return put_together([Piece(text)])
    parts: list[list[str]] = []
    for sentence in SENTENCE.finditer(text):
        if sentence.start() >= EPISODE * len(parts):
            parts.append([])
        parts[-1].append(sentence[0])
    pieces, told = [], []  # told: the facts of each of the last episodes that none after it has changed
    for part in parts:
        facts = draw(words, rng)
        keys = {fact.key for fact in facts}
        told = [[fact for fact in older if fact.key not in keys] for older in told[-BACK:]]
        pieces += episode(part, facts, list(chain(*told)), MORE[kind], rng)
        told.append(facts)
    return put_together(pieces)


def put_together(pieces: list[Piece]) -> Asked:
    made = Asked("".join(piece.text for piece in pieces))
    made.answers, said, at = [], {}, 0
    for text, fact, is_question in pieces:
        if is_question:
            begin = at + text.rindex(fact.value)
            made.answers.append((begin, begin + len(fact.value), said[fact.key]))
        if fact:
            said[fact.key] = at
        at += len(text)
    return made


def draw(words: list[str], rng: random.Random) -> list[Fact]:
    """The facts of an episode: all of one form, and all at one place or each at its own."""
    stated, asked = rng.choice(FORMS)
    count, together = rng.randint(1, MOST), rng.random()
    drawn = rng.sample(words, 2 * count)
    if rng.random() < 0.7:
        digits = rng.choice((2, 3, 4, 4, 5))
        drawn[count:] = [str(rng.randrange(10 ** (digits - 1), 10**digits)) for _ in range(count)]
    facts = []
    for key, value in zip(drawn[:count], drawn[count:], strict=True):
        place = 2 * together if together < 0.5 else rng.random()
        facts.append(Fact(key, value, place, *(form.format(key=key, value=value) + " " for form in (stated, asked))))
    return facts


def episode(sentences: list[str], facts: list[Fact], before: list[Fact], again: int, rng: random.Random) -> list[Piece]:
    """Facts in the first half of the sentences, questions for some of them in the second half, and up to `again`
    questions for facts from `before` anywhere."""
    half = len(sentences) // 2
    put = [(int(half * fact.place), Piece(fact.stated, fact)) for fact in facts]
    asked = rng.choices(facts, k=rng.randint(1, len(facts) + 2))
    put += [(rng.randint(half, len(sentences)), Piece(fact.asked, fact, True)) for fact in asked]
    if again:
        asked = rng.sample(before, min(len(before), rng.randint(0, again)))
        put += [(rng.randint(0, len(sentences)), Piece(fact.asked, fact, True)) for fact in asked]
    places: dict[int, list[Piece]] = {}
    for place, piece in put:
        places.setdefault(place, []).append(piece)
    return [piece for i, text in enumerate([*sentences, ""]) for piece in [*places.get(i, []), Piece(text)]]
