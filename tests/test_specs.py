"The specifications: every place that cites one finds its heading, item or label, and links lead somewhere."
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {"SHIP": "ship", "DA-VPT": "da-vpt", "Adapt": "adapt", "baselines": "baselines", "embedded-data": "embedded-data",
         "embedded-CLIP": "embedded-clip"}
CITED = re.compile(rf"\b({'|'.join(PAGES)})\s+spec\s+((?:\d|[A-Z]\d)[^;:)\]\n]*)")
NUMBER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)*|[A-Z]\d+)(?![\w%])")
BARE = re.compile(rf"(?<!\w)(?:[Ss]pec|[Ss]pecification)s?\s+(?:section\s+)?\d")


def page(name): return (ROOT/"nbs"/"specs"/f"{PAGES[name]}.md").read_text(encoding="utf-8")


def places(text):
    "What a page can be cited by: numbers of headings, SECTION.ITEM of numbered lists, labels such as D7."
    found, section, fenced = set(), "", False
    for line in text.splitlines():
        if line.startswith("```"): fenced = not fenced
        if fenced: continue
        if heading := re.match(r"#{2,4} (\d+(?:\.\d+)*)\b", line):
            section = heading[1]
            found.add(section)
        elif item := re.match(r"\s{0,3}(\d+)\. ", line): found |= {f"{section}.{item[1]}", f"{section.split('.')[0]}.{item[1]}"}
        found |= set(re.findall(r"\b([A-Z]\d{1,2})\b", line))
    return found


def numbers(cited):
    "The places in the text behind `spec`: `1.3`, `4.3, 2.7`, `1.1-1.3` (its ends), `D26`; a number in other words is none."
    head = re.match(r"(?:\d+(?:\.\d+)*|[A-Z]\d+)(?:\s*(?:,|-|and|to|/)\s*(?:\d+(?:\.\d+)*|[A-Z]\d+)(?![\w%]|\.\d))*", cited)[0]
    return NUMBER.findall(head)


def sources():
    "Every text of the project that may cite a specification: notebooks cell by cell, tests, benchmarks, profiles, templates of stages."
    for path in sorted((ROOT/"nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]: yield path, "".join(cell["source"])
    for place, pattern in (
        ("tests", "*.py"),
        ("benchmarks", "*.py"),
        ("profiles", "**/*.yaml"),
        ("hierprompt", "**/*.py"),
        (".", "*.yaml"),
    ):
        for path in sorted((ROOT/place).glob(pattern)):
            if path != Path(__file__): yield path, path.read_text(encoding="utf-8")


CITATIONS = [(path.relative_to(ROOT), name, number) for path, text in sources()
             for name, cited in CITED.findall(re.sub(r"\s*\n\s*#?\s*", " ", text)) for number in numbers(cited)]


@pytest.mark.parametrize("name", PAGES)
def test_every_citation_resolves(name):
    known = places(page(name))
    cited = [(path, number) for path, of, number in CITATIONS if of == name]
    assert cited, f"nothing cites the specification {name}"
    assert not [f"{path}: {name} spec {number}" for path, number in cited if number not in known]


def test_there_are_as_many_citations_as_the_project_has():
    assert len(CITATIONS) > 250


def test_no_citation_leaves_open_which_page_it_means():
    unnamed = [
        (str(path.relative_to(ROOT)), text[max(0, m.start() - 30) : m.end() + 10])
        for path, text in sources()
        for m in BARE.finditer(text)
        if not re.search(rf"({'|'.join(PAGES)})\s+$", text[: m.start()])
    ]
    assert not unnamed


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_for_public_readers(name):
    text = page(name)
    assert text.startswith("# ") and "\n## Sources\n" in text
    assert not re.search(r"DESIGN\.md|ENVIRONMENT\.md|EXAMPLES\.md|\.\./shared|this folder", text)
    assert not [line for line in text.splitlines() if len(line) > 140 and not line.lstrip().startswith("|")]
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target: assert (ROOT/"nbs"/"specs"/target).exists(), target


def test_published_tables_are_linked_and_not_typed_again():
    linked = {Path(target).name for name in PAGES for target in re.findall(r"\]\(([^)]*results/published/[^)]*)\)", page(name))}
    index = json.loads((ROOT/"results"/"published"/"index.json").read_text())
    assert {entry["file"] for entry in index.values()} <= linked


def test_discrepancies_keep_their_numbers():
    "The registers are complete: SHIP's D1 to D22, DA-VPT's D1 to D41, Adapt's A1 to A26 and E1 to E8."
    for name, letter, last in (("SHIP", "D", 22), ("DA-VPT", "D", 41), ("Adapt", "A", 26), ("Adapt", "E", 8)):
        assert {f"{letter}{n}" for n in range(1, last + 1)} <= places(page(name))
