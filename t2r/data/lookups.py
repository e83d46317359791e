"""Text with lookups: documents into which facts are put that the same document asks for again further on.

Plain text seldom needs one particular word from far away, so neither scores for eviction that are fitted to it nor
training on it learn to keep such a word. A document with lookups does, many times:

    ... which was built of stone. harbour = 4821. chapel = 930. It had a roof of slate ... harbour = 4821. Then ...

Keys are words of the document itself, values are numbers or other words of it. Everything is drawn from the document's
own hash, so the same document always becomes the same text.
"""

import hashlib
import random
import re

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
WORD = re.compile(r"[A-Za-z]{4,12}")
SENTENCE = re.compile(r".+?(?:[.!?]\s+|\Z)", re.DOTALL)


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
    return "".join(episode(part, words, rng) for part in parts)


def episode(sentences: list[str], words: list[str], rng: random.Random) -> str:
    """Facts in the first half of the sentences, all at one place or each at its own, and questions for some of them in
    the second half."""
    stated, asked = rng.choice(FORMS)
    count, together, half = rng.randint(1, MOST), rng.random(), len(sentences) // 2
    drawn = rng.sample(words, 2 * count)
    if rng.random() < 0.7:
        digits = rng.choice((2, 3, 4, 4, 5))
        drawn[count:] = [str(rng.randrange(10 ** (digits - 1), 10**digits)) for _ in range(count)]
    facts = list(zip(drawn[:count], drawn[count:], strict=True))
    places: dict[int, list[str]] = {}
    for key, value in facts:
        place = int(half * (2 * together if together < 0.5 else rng.random()))
        places.setdefault(place, []).append(stated.format(key=key, value=value) + " ")
    for key, value in rng.choices(facts, k=rng.randint(1, count + 2)):
        places.setdefault(rng.randint(half, len(sentences)), []).append(asked.format(key=key, value=value) + " ")
    return "".join(part for i, sentence in enumerate([*sentences, ""]) for part in [*places.get(i, []), sentence])
