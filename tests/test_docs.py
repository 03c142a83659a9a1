"""The programs in `docs/` run as they stand, and its links lead to what they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_programs_run(page):
    for program in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(program, page.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_what_they_name(page):
    """A link is of a file, or of a line that defines what the link's text says."""
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)]*)\)", page.read_text()):
        path, _, line = target.partition("#L")
        file = (page.parent / path).resolve()
        assert file.exists(), target
        if line:
            name = text.strip("`").rpartition(".")[2]
            source = file.read_text().splitlines()[int(line) - 1]
            assert re.search(rf"(def|class) {name}\b", source), f"{target}: {source!r} does not define {name}"


def test_a_wing_is_short():
    """At most 60 lines of code, as the page promises by having them."""
    (program,) = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(), re.DOTALL)
    assert sum(bool(line.strip()) and not line.strip().startswith("#") for line in program.splitlines()) <= 60
