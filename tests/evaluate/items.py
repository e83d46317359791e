"""Five items of each benchmark in the format of its data set, made up, for a folder as `--data` wants it."""

import json
from pathlib import Path

import zstandard

MMLU = (
    "abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry "
    "college_computer_science college_mathematics college_medicine college_physics computer_security "
    "conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_european_history "
    "high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_mathematics "
    "high_school_microeconomics high_school_physics high_school_psychology high_school_statistics "
    "high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence "
    "logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes "
    "moral_scenarios nutrition philosophy prehistory professional_accounting professional_law professional_medicine "
    "professional_psychology public_relations security_studies sociology us_foreign_policy virology world_religions"
).split()
BBH = (
    "boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies "
    "geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects "
    "logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting "
    "penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks "
    "sports_understanding temporal_sequences tracking_shuffled_objects_five_objects "
    "tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting"
).split()
THINGS = [("cup", "glass"), ("door", "wood"), ("coat", "wool"), ("road", "stone"), ("ring", "gold")]


def arc(i: int, thing: str, stuff: str) -> dict:
    labels = ["A", "B", "C", "D"] if i else ["1", "2", "3", "4"]
    texts = ["paper", "ice", "salt"]
    texts.insert(i % 4, stuff)
    choices = {"text": texts, "label": labels}
    return {"id": f"Q{i}", "question": f"What is a {thing} made of?", "choices": choices, "answerKey": labels[i % 4]}


def mmlu(i: int, thing: str, stuff: str, subject: str) -> dict:
    row = arc(i, thing, stuff)
    return {"question": row["question"], "subject": subject, "choices": row["choices"]["text"], "answer": i % 4}


def scrolls(i: int, thing: str, stuff: str, text: str) -> dict:
    return {"id": f"d{i}", "pid": f"d{i}_0", "input": f"What is the {thing} of?\n\n{text}", "output": stuff}


def completion(i: int, thing: str, stuff: str) -> dict:
    return {
        "doc_id": f"{i}",
        "file_name": f"{i}.txt",
        "key": thing,
        "value": stuff,
        "text": f"A {thing} of {stuff}. The {thing} is of",
    }


def rows() -> dict[str, list[dict]]:
    """File -> its rows."""
    found: dict[str, list[dict]] = {}
    for i, (thing, stuff) in enumerate(THINGS):
        text = f"The {thing} in this story is made of {stuff}, as everybody knows. "

        def add(file: str, *more: dict) -> None:
            found.setdefault(file, []).extend(more)

        add(
            "piqa/validation.jsonl",
            {"goal": f"clean a {thing}", "sol1": f"wipe the {thing}", "sol2": "eat it", "label": i % 2},
        )
        add(
            "hellaswag/validation.jsonl",
            {
                "ind": i, "activity_label": "Cleaning", "ctx_a": f"A man holds a {thing}.", "ctx_b": "he",
                "ctx": f"A man holds a {thing}. he", "split": "val", "split_type": "indomain", "label": str(i % 4),
                "endings": [f"[substeps] drops the {thing}.", "sings.", f"sells the {thing}.", "flies  away."],
                "source_id": f"activitynet~{i}",
            },
        )  # fmt: skip
        add(
            "winogrande/validation.jsonl",
            {
                "sentence": f"The {thing} broke but the bag held because the _ was weak.", "option1": thing,
                "option2": "bag", "answer": str(1 + i % 2),
            },
        )  # fmt: skip
        add("arc_easy/validation.jsonl", arc(i, thing, stuff))
        add("arc_challenge/validation.jsonl", arc(i, thing, stuff))
        stem = arc(i, thing, stuff)
        add("openbookqa/validation.jsonl", {"question_stem": stem.pop("question"), **stem})
        add("lambada/lambada_openai.jsonl", {"context": text + f"So they sold the {thing} of", "continuation": stuff})
        for subject in MMLU:
            add("mmlu/dev.jsonl", mmlu(i, f"small {thing}", stuff, subject))
            add("mmlu/test.jsonl", mmlu(i, thing, stuff, subject))
        for subset in BBH:
            add("bbh/test.jsonl", {"input": f"Is a {thing} of {stuff}?", "target": "Yes", "subset": subset})
        add("nq_open/validation.jsonl", {"question": f"what is a {thing} made of", "answer": [stuff, f"of {stuff}"]})
        answer = {"value": stuff, "aliases": [stuff], "normalized_value": stuff, "normalized_aliases": [stuff]}
        add(
            "triviaqa/validation.jsonl",
            {"question": f"What is a {thing} of?", "question_id": f"t{i}", "answer": answer},
        )
        add(
            "gsm8k/test.jsonl",
            {"question": f"A {thing} costs {i} and a bag 2. Both?", "answer": f"{i}+2={i + 2}\n#### {i + 2}"},
        )
        add("qasper/validation.jsonl", scrolls(i, thing, stuff, text * 9), scrolls(i, thing, f"of {stuff}", text * 9))
        add("narrative_qa/validation.jsonl", scrolls(i, thing, stuff, text * 9))
        options = "\n".join(
            f" ({letter}) {word}" for letter, word in zip("ABCD", arc(i, thing, stuff)["choices"]["text"], strict=True)
        )
        add("quality/validation.jsonl", scrolls(i, thing, stuff, f"{options}\n\n\n{text * 9}"))
        query = {"query": f"What was said about the {thing}?", "answer": f"It is of {stuff}."}
        turns = [{"speaker": "Chair", "content": text}, {"speaker": "Clerk", "content": "Noted."}]
        meeting = {
            "topic_list": [],
            "general_query_list": [query],
            "specific_query_list": [],
            "meeting_transcripts": turns,
        }
        add("qmsum/test.jsonl", meeting)
        for name in ("squad", "fda", "swde"):
            add(f"{name}/validation.jsonl", completion(i, thing, stuff))
        add(
            "humaneval/test.jsonl",
            {
                "task_id": f"HumanEval/{i}", "prompt": f"def {thing}():\n", "canonical_solution": f"    return {i}\n",
                "test": f"def check(f):\n    assert f() == {i}\n", "entry_point": thing,
            },
        )  # fmt: skip
    return found


def write(folder: Path) -> Path:
    prose = "".join(f"The {thing} in this story is made of {stuff}. " for thing, stuff in THINGS) * 180
    (folder / "wikitext2").mkdir(parents=True)
    (folder / "wikitext2" / "wiki.test.raw").write_text(prose)
    (folder.parent / "corpus").mkdir()
    with zstandard.open(folder.parent / "corpus" / "validation-books.jsonl.zst", "wt") as file:
        file.write("".join(json.dumps({"text": half, "title": "Things"}) + "\n" for half in (prose[:999], prose[999:])))
    for file, lines in rows().items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
