from __future__ import annotations

import re
from html.parser import HTMLParser

from twofold.report.html import plot_table, render_html
from twofold.report.model import Report

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Checker(HTMLParser):
    """Collects text and attributes and checks that elements nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-5:])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parse(report: Report) -> Checker:
    checker = Checker()
    checker.feed(render_html(report))
    checker.close()
    assert checker.open == []
    return checker


def test_the_page_nests_and_shows_everything(report: Report) -> None:
    page = parse(report)
    text = " ".join(" ".join(page.texts).split())
    for claim in report.claims:
        assert claim.name in text
    for words in ("holds in this run", "does not hold in this run", "not judged", "[49.8, 60.1]"):
        assert words in text
    assert "3 of 4 claims hold in this run, 1 not judged" in text and "Read these with care." in text
    assert "not met : greedy: −1.00 points; wanted: lower end above 0 points" in text.replace("\u00a0", " ")
    claims = render_html(report).split('class="claims"')[1].split("</table>")[0]
    assert "✓" not in claims and "✗" not in claims, "no mark that could stand for the claim itself"
    for words in (report.command, "5m57s", "1.35\u00a0GiB", "General pre-training", "1.72\u00a0M", "Python library"):
        assert words.replace("\u00a0", " ") in text.replace("\u00a0", " ")
    assert text.count("Prompt") == 3 and "(empty)" in text
    assert page.tags.count("figure") == 4


def test_hostile_text_stays_text(report: Report) -> None:
    page = parse(report)
    assert "script" not in page.tags
    assert "<script>" not in render_html(report)
    assert any("<script>alert('x')</script>" in text for text in page.texts)
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_nothing_comes_from_elsewhere(report: Report) -> None:
    page = parse(report)
    sources = [
        value or "" for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")
    ]
    assert sources and all(value.startswith("#") for value in sources)
    html = render_html(report)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html


def test_contents_lead_to_unique_anchors(report: Report) -> None:
    page = parse(report)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [value for name, value in page.attributes if name == "href"]
    assert len(links) == 7 and all(link and link[1:] in ids for link in links)


def test_a_bare_report_is_a_page() -> None:
    bare = Report(title="t", command="c", seed=1, versions={}, hardware="h", created="now")
    assert "Reproduce" in parse(bare).texts


def test_plot_tables_name_their_points(report: Report) -> None:
    table = plot_table(report.sections[1].plots[1])
    assert table.rows[1] == ["pass@1", "on-policy KL", 46.5, "[41.5, 51.5]"]
