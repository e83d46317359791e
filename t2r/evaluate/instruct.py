"""Whether an instruct model still answers as its template wants it: answers end, and simple instructions are obeyed."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from t2r.evaluate.scoring import continue_texts
from t2r.evaluate.statistics import share
from t2r.evaluate.task import MissingData, Outcome, Place, Task


def lines(pattern: str, count: int) -> Callable[[str], bool]:
    return lambda text: sum(bool(re.match(pattern, line)) for line in text.strip().splitlines()) == count


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text.strip(), re.IGNORECASE | re.DOTALL) is not None


def is_json(text: str) -> bool:
    try:
        return "name" in json.loads(text.strip().removeprefix("```json").strip("`\n "))
    except (ValueError, TypeError):
        return False


# what is asked, and whether an answer obeys
ASKED: list[tuple[str, Callable[[str], bool]]] = [
    ("Answer with only the word yes or no: is fire hot?", matches(r"(yes|no)\W?")),
    ("Reply with exactly one word: what is the capital of France?", matches(r"\w+\W?")),
    ("What is 2 + 3? Answer with a number only.", matches(r"\d+\W?")),
    ("Write the numbers from 1 to 5, separated by commas, and nothing else.", matches(r"1, ?2, ?3, ?4, ?5\.?")),
    ("Repeat this sentence exactly: The cat sat on the mat.", matches(r"\W?The cat sat on the mat\.\W?")),
    ("List three fruits. Begin each line with a dash and a space.", lines(r"- \w+", 3)),
    ("Name four colours as a numbered list, one a line.", lines(r"\d[.)] ?\w+", 4)),
    ("Write one sentence about the sea.", matches(r"[^.!?]+[.!?]")),
    ("Write a greeting in capital letters only.", lambda text: bool(text.strip()) and text == text.upper()),
    ("What is the opposite of hot? Use at most three words.", lambda text: 1 <= len(text.split()) <= 3),
    ("Give the name and age of a made-up person as JSON with the keys name and age.", is_json),
    ("Describe the moon in two sentences.", matches(r"[^.!?]+[.!?]\s+[^.!?]+[.!?]")),
    ("Begin your answer with the word Surely: is water wet?", lambda text: text.strip().startswith("Surely")),
    ("Say goodbye and end your answer with the word END.", matches(r".*\bEND\W?")),
    ("Name a planet in parentheses, like (this), and nothing else.", matches(r"\(\w+\)\.?")),
    ("Which is larger, 7 or 12? Answer with the number only.", matches(r"(7|12)\W?")),
]
LEAK = re.compile(r"<\||\|>|\[/?INST\]|^(user|assistant|system)\s*$", re.MULTILINE | re.IGNORECASE)


@dataclass
class TemplateFollowing(Task):
    """Questions in the model's chat template, answered greedily in up to `new` tokens."""

    new: int = 96
    batch_size: int | None = None

    about: ClassVar[str] = (
        "Short instructions in the model's chat template. Ended: the answer ends with the end-of-turn token. Clean: no "
        "piece of the template in the answer. Obeyed: the format that was asked for, checked by rule. Training on raw "
        "text damages all three."
    )

    def prepare(self, tokenizer, place: Place) -> list[list[int]]:
        if not tokenizer.chat_template:
            raise MissingData("the tokenizer has no chat template", where=f"task {self.name}")
        self.tokenizer = tokenizer
        asked = self.within_budget([question for question, _ in ASKED], lambda _: self.new, place)
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            )
            for question in asked
        ]

    def run(self, model, items: list[list[int]]) -> Outcome:
        written = continue_texts(model, self.tokenizer, items, self.new, [], self.batch_size)
        records = [
            {
                "question": question,
                "answer": one.text,
                "ended": one.ended,
                "clean": not LEAK.search(one.text),
                "obeyed": bool(obeys(one.text)),
            }
            for (question, obeys), one in zip(ASKED, written, strict=False)
        ]
        metrics = [share(key, [record[key] for record in records]) for key in ("obeyed", "ended", "clean")]
        text = "\n\n".join(f"{r['question']}\n{r['answer']}" for r in records)
        return Outcome(metrics, records, text)
