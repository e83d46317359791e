"""Many reports in one table."""

import json

import pytest

from t2r import cli
from t2r.errors import UserError
from t2r.evaluate.leaderboard import leaderboard


def report(folder, models, recovery, schema=2, recipe="commonsense"):
    folder.mkdir(parents=True)
    content = {"schema_version": schema, "recipe": {"name": recipe}, "models": models, "recovery": recovery}
    (folder / "report.json").write_text(json.dumps(content))


@pytest.fixture
def reports(tmp_path):
    teacher = {"teacher": {"trained_tokens": None}}
    both = {"piqa": {"metric": "acc", "a": {"recovery": 0.5}}, "arc": {"metric": "acc", "a": {"recovery": 0.7}}}
    report(tmp_path / "one", {**teacher, "a": {"trained_tokens": 0}}, {**both, "mean": {"a": {"recovery": 0.6}}})
    one = {"piqa": {"metric": "acc", "b": {"recovery": 0.9}}}
    report(tmp_path / "deep" / "two", {**teacher, "b": {"trained_tokens": 2_000_000}}, one)
    report(tmp_path / "old", teacher, {}, schema=1)
    report(tmp_path / "speed", teacher, {}, recipe="efficiency")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "report.json").write_text("{")
    return tmp_path


def test_a_table_of_all_that_can_be_used(reports, capsys):
    for _ in range(2):  # the second replaces the first
        assert cli.main(["leaderboard", str(reports)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "skipped broken: not a report (JSONDecodeError)",
        "skipped old: its schema is 1, this t2r reads 2",
        "skipped speed: recipe efficiency has no task with a recovery",
    ]
    assert lines[3].split() == ["report", "model", "recipe", "tokens", "mean", "piqa", "arc"]
    assert lines[4].split() == ["deep/two", "b", "commonsense", "2,000,000", "90.0", "%", "90.0", "%"]
    assert lines[5].split() == ["one", "a", "commonsense", "0", "60.0", "%", "50.0", "%", "70.0", "%"]
    out = reports / "leaderboard"
    assert {file.name for file in out.iterdir()} == {
        f"leaderboard.{end}" for end in ("md", "html", "json", "png", "svg")
    }
    assert "| one | a | commonsense | 0 | 60.0 % | 50.0 % | 70.0 % |" in (out / "leaderboard.md").read_text()
    assert "<svg" in (out / "leaderboard.html").read_text()
    assert [row["tokens"] for row in json.loads((out / "leaderboard.json").read_text())] == [2_000_000, 0]


def test_mistakes_are_one_line(reports, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    for words, message in [
        ((str(empty),), "no report with a recovery"),
        ((str(empty / "none"),), "no folder"),
        ((str(reports), str(reports / "one")), "exists and is no leaderboard"),
    ]:
        with pytest.raises(UserError, match=message):
            leaderboard(*words)
    assert {file.name for file in (reports / "one").iterdir()} == {"report.json"}
