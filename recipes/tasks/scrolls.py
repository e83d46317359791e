"""SCROLLS as lm-eval tasks: documents, questions and metrics of Qasper, NarrativeQA, QuALITY and QMSum."""

import re
import string
from collections import Counter

import datasets


def process_docs(dataset: datasets.Dataset) -> datasets.Dataset:
    """Rows {"id", "input", "output"}, one for each reference -> {"id", "text", "question", "references"}."""
    found: dict[str, dict] = {}
    for row in dataset:
        question, _, text = row["input"].partition("\n\n")
        document = {"id": row["id"], "text": text, "question": question, "references": []}
        found.setdefault(row["id"], document)["references"].append(row["output"])
    if not found:
        return dataset
    return datasets.Dataset.from_list(list(found.values()))


def process_quality(dataset: datasets.Dataset) -> datasets.Dataset:
    """The same with {"choices", "gold"}: the question is followed by its four options, `(A) ...`, before the text."""
    rows = []
    for row in dataset:
        question, _, rest = row["input"].partition("\n\n")
        options, _, text = rest.partition("(D)")
        last, _, text = text.partition("\n\n")
        choices = [" ".join(part.split()) for part in re.split(r"\([A-C]\)", options)[1:] + [last]]
        gold = choices.index(" ".join(row["output"].split()))
        rows.append({"id": row["id"], "text": text.strip(), "question": question, "choices": choices, "gold": gold})
    return datasets.Dataset.from_list(rows) if rows else dataset


def words(text: str) -> list[str]:
    """As SQuAD compares answers: lower case, no punctuation, no articles."""
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return [word for word in text.split() if word not in ("a", "an", "the")]


def token_f1(answer: str, reference: str) -> float:
    ours, theirs = words(answer), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def f1(doc: dict, results: list[str]) -> dict:
    """Percent, the best over the references."""
    return {"f1": 100 * max(token_f1(results[0], reference) for reference in doc["references"])}


def rouge(doc: dict, results: list[str]) -> dict:
    """Geometric mean of ROUGE-1, -2 and -L F1, percent, the best over the references; and the three."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    found = [scorer.score(reference, results[0]) for reference in doc["references"]]
    best = {kind: 100 * max(one[kind].fmeasure for one in found) for kind in kinds}
    return {"rouge": (best["rouge1"] * best["rouge2"] * best["rougeL"]) ** (1 / 3), **best}
