"""Text with lookups: documents into which facts are put that the same document asks for again further on.

Plain text seldom needs one particular word from far away, so neither scores for eviction that are fitted to it nor
training on it learn to keep such a word. A document with lookups does, many times:

    ... which was built of stone. harbour = 4821. chapel = 930. It had a roof of slate ... harbour = 4821. Then ...

Keys are words of the document itself, values are numbers or other words of it. A fact is asked for within 800 tokens,
and some once more up to 2,500 tokens later, for rows that are long enough: what is never read from so far away is not
learned to be. Everything is drawn from the document's own hash, so the same document always becomes the same text.
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
AGAIN, BACK = 8, 3  # questions of an episode for facts of those before it, at most, and how many it looks back
VERSION = 2  # of the texts that come out: the cache of their tokens is named after it
WORD = re.compile(r"[A-Za-z]{4,12}")
SENTENCE = re.compile(r".+?(?:[.!?]\s+|\Z)", re.DOTALL)


class Fact(NamedTuple):
    """How it is stated, and how it is asked for and answered."""

    key: str
    stated: str
    asked: str


def with_lookups(text: str) -> str:
    """The document with facts and questions; as it is where it has too few words for that."""
    rng = random.Random(hashlib.sha256(text.encode()).digest())
    words = sorted(set(WORD.findall(text)))
    if len(words) < 4 * MOST:
        return text
    parts: list[list[str]] = []
    for sentence in SENTENCE.finditer(text):
        if sentence.start() >= EPISODE * len(parts):
            parts.append([])
        parts[-1].append(sentence[0])
    made, told = [], []  # told: the facts of each of the last episodes that none after it has changed
    for part in parts:
        facts = draw(words, rng)
        keys = {fact.key for fact in facts}
        told = [[fact for fact in older if fact.key not in keys] for older in told[-BACK:]]
        made.append(episode(part, facts, list(chain(*told)), rng))
        told.append(facts)
    return "".join(made)


def draw(words: list[str], rng: random.Random) -> list[Fact]:
    """The facts of an episode, all of one form."""
    stated, asked = rng.choice(FORMS)
    count = rng.randint(1, MOST)
    drawn = rng.sample(words, 2 * count)
    if rng.random() < 0.7:
        digits = rng.choice((2, 3, 4, 4, 5))
        drawn[count:] = [str(rng.randrange(10 ** (digits - 1), 10**digits)) for _ in range(count)]
    pairs = zip(drawn[:count], drawn[count:], strict=True)
    return [Fact(key, *(form.format(key=key, value=value) + " " for form in (stated, asked))) for key, value in pairs]


def episode(sentences: list[str], facts: list[Fact], before: list[Fact], rng: random.Random) -> str:
    """Facts in the first half of the sentences, all at one place or each at its own, and questions for some of them in
    the second half; questions for facts from `before` anywhere."""
    together, half = rng.random(), len(sentences) // 2
    places: dict[int, list[str]] = {}

    def put(place: int, text: str) -> None:
        places.setdefault(place, []).append(text)

    for fact in facts:
        put(int(half * (2 * together if together < 0.5 else rng.random())), fact.stated)
    for fact in rng.choices(facts, k=rng.randint(1, len(facts) + 2)):
        put(rng.randint(half, len(sentences)), fact.asked)
    for fact in rng.sample(before, min(len(before), rng.randint(0, AGAIN))):
        put(rng.randint(0, len(sentences)), fact.asked)
    return "".join(part for i, sentence in enumerate([*sentences, ""]) for part in [*places.get(i, []), sentence])
