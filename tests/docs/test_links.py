"""Every link of a page to a file of the repository, or to a heading, has its target."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/*.md")]
FENCE = re.compile(r"^(`{3,}|:{3,}).*?^\1`*:*\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)")


def without_code(page):
    return re.sub(r"`[^`]*`", "code", FENCE.sub("", page.read_text("utf-8")))


def anchors(page):
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    text = FENCE.sub("", page.read_text("utf-8"))
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        shown = re.sub(r"\]\([^)]*\)", "", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        earlier = sum(each == slug for each in found)
        found.append(f"{slug}-{earlier}" if earlier else slug)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for target, anchor in LINK.findall(without_code(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{target}: no such file"
        assert path.is_relative_to(ROOT), f"{target} is outside the repository"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{target}#{anchor}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_line_is_a_comment_of_myst(page):
    """MyST leaves out a line that begins with a percent sign."""
    assert not re.search(r"^\s*%", without_code(page), re.MULTILINE)
