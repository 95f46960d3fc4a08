"""What the documentation says of the code: messages exist, links lead somewhere, names are there."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [ROOT / "setup.py", *sorted((ROOT / "amn_kernels").rglob("*.py"))]

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="runs in a checkout only")


# What is put into a message at run time: nothing, a word, a list of words, or something in brackets.
PUT_IN = re.compile(r"(\S+(, \S+)*|[\[(].*[\])])?")


def templates():
    """Every string of the code that could be a message, as a pattern with a group for what is put in at run time."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            fixed = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if sum(map(len, fixed)) >= 10:  # shorter ones fit anything
                yield re.compile("".join(re.escape(p.value) if isinstance(p, ast.Constant) else "(.*?)" for p in parts))


def messages():
    return re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.M)


def covered(message, patterns):
    """Whether the code can say it: a template, with words put in, or with a reason that is a template in its turn."""
    message = re.sub(r"^(cpu|cuda|triton|reference): ", "", message)  # a reason of a backend
    for pattern in patterns:
        match = pattern.fullmatch(message)
        if match and all(PUT_IN.fullmatch(group) or covered(group, patterns) for group in match.groups()):
            return True
    return False


def test_every_message_of_the_troubleshooting_page_is_one_of_the_code():
    patterns, found = list(templates()), messages()
    assert len(found) > 25
    assert [message for message in found if not covered(message.replace("'info'", "`info`"), patterns)] == []
    assert not covered("pred must be a fine tensor, got a sparse one", patterns)


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        to = page.parent / path if path else page
        assert to.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(to), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_are_named_exist(page):
    """`csrc/primitives.h` and the like, in backticks."""
    for path in re.findall(r"`((?:csrc|amn_kernels|python_ref|tests|bench|docs|examples)/[\w/.]+)`", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_counts_of_the_proof_are_those_of_its_table():
    """README.md and the page say how many launches have which verdict."""
    text = (ROOT / "docs" / "ptx_proof.md").read_text()
    launches = re.findall(r"^\| `.*` \| [\dx ]+ \| [\dx ]+ \| ([a-z ]+) \|", text, flags=re.M)
    count = {verdict: launches.count(verdict) for verdict in set(launches)}
    assert "refuted" not in count
    proven, on_paths, open_ = (count[name] for name in ("proven", "proven on the paths taken", "not verified"))
    assert f"Of {len(launches)} launches: {proven} proven, {on_paths} proven on the paths taken, {open_} not" in text
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        f"of {len(launches)} launches {proven} are proven for every schedule, {on_paths} on the paths that were looked "
        f"at, and {open_} are not verified" in readme
    )


def test_triton_is_left_to_torch():
    """A CUDA build of torch, which is what pip has for Linux, asks for one version of Triton: a second can't be had."""
    assert not [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("triton")]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert not [item for items in extras.values() for item in items if item.startswith("triton")]
