"""benchmarks/tiny_recipe.py: tables over seeds from stored reports, in both languages, without running anything."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from twofold.base.records import InputError
from twofold.recipes.claims import judge
from twofold.recipes.claims.declared import PROTOCOLS

ROOT = Path(__file__).resolve().parents[3]
SPEC = importlib.util.spec_from_file_location("tiny_recipe", ROOT / "benchmarks" / "tiny_recipe.py")
assert SPEC is not None and SPEC.loader is not None
tiny_recipe = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tiny_recipe)

Facts = dict[str, dict[str, Any]]


@pytest.fixture
def tree(facts: Facts, tmp_path: Path) -> Path:
    """A source tree with two stored reports and both READMEs."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for seed in (3, 4):
        claims = [claim.model_dump(mode="json") for claim in judge(facts)]
        (results / f"tiny-seed{seed}.json").write_text(json.dumps({"seed": seed, "claims": claims}))
    for name in ("README.md", "README.zh-CN.md"):
        (tmp_path / name).write_text(
            "# Top\n\n<!-- results -->\n\nstale words\n\n<!-- /results -->\n\nafter\n", encoding="utf-8"
        )
    return tmp_path


def test_tables_are_made_from_stored_reports_alone(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    tiny_recipe.main(["--no-run", "--seeds", "3", "4"], root=tree)
    texts = {name: (tree / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")}
    for text in texts.values():
        assert text.startswith("# Top\n\n<!-- results -->\n\n") and text.endswith("\n\n<!-- /results -->\n\nafter\n")
        assert "stale words" not in text and text.count("\n| ") == 11
    assert "9 of 9 claims hold, over training seeds 3, 4." in texts["README.md"].replace("\n", " ")
    chinese = texts["README.zh-CN.md"]
    assert "九条主张中 9 条成立" in chinese and "**成立**" in chinese
    assert not any(word in chinese for word in ("points", "lower end", "estimate", "wanted", "yes"))
    before = dict(texts)
    tiny_recipe.main(["--readme", "--seeds", "3", "4"], root=tree)
    assert {name: (tree / name).read_text(encoding="utf-8") for name in texts} == before
    assert "| **holds** |" in (tree / "benchmarks" / "results" / "tiny-seeds.md").read_text(encoding="utf-8")


def test_the_chinese_table_names_every_condition() -> None:
    named = {key: set(labels) for key, (_, labels) in tiny_recipe.CHINESE.items()}
    assert named == {key: {rule.name for rule in protocol.rules} for key, protocol in PROTOCOLS.items()}


def test_what_fails_or_is_open_says_so_in_both(tree: Path) -> None:
    path = tree / "benchmarks" / "results" / "tiny-seed4.json"
    report = json.loads(path.read_text())
    report["claims"][0]["conditions"][2] |= {"value": 0.0, "met": False}
    del report["claims"][8]
    path.write_text(json.dumps(report))
    tiny_recipe.main(["--no-run", "--seeds", "3", "4"], root=tree)
    english, chinese = ((tree / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert "7 of 8 claims hold, 1 not judged" in english and "**does not hold**" in english and "**not met**" in english
    assert "**不成立**" in chinese and "**未达到**" in chinese and "**未判定**" in chinese


def test_errors_are_clear(tree: Path) -> None:
    with pytest.raises(InputError, match=r"no stored report at .*tiny-seed5\.json; run without --no-run"):
        tiny_recipe.main(["--no-run", "--seeds", "3", "5"], root=tree)
    (tree / "README.md").write_text("no marks")
    with pytest.raises(InputError, match=r"README\.md must have <!-- results -->"):
        tiny_recipe.main(["--no-run", "--seeds", "3", "4"], root=tree)


def test_runs_side_by_side_have_one_thread_each(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def fake(command: list[str], **options: Any) -> None:
        calls.append({"seed": command[command.index("--seed") + 1], **options})
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True)
        stored = tree / "benchmarks" / "results" / f"tiny-seed{calls[-1]['seed']}.json"
        (folder / "report.json").write_text(stored.read_text())

    monkeypatch.setattr(subprocess, "run", fake)
    options = ["--seeds", "3", "4", "--runs", str(tree / "runs")]
    tiny_recipe.main([*options, "--jobs", "2"], root=tree)
    assert sorted(call["seed"] for call in calls) == ["3", "4"]
    assert all(call["env"]["OMP_NUM_THREADS"] == "1" and call["check"] for call in calls)
    assert (tree / "runs" / "tiny-seed3.log").is_file()
