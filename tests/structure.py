"""What a reader of the package feels, as counts, each beside its bar.

    python tests/structure.py        # ends with 1 where a bar is missed

Counts are taken from the source alone: from words, and from the syntax tree.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1] / "functitan"
CORE = ("sharding", "ops")
WINGS = ("attention", "capture", "float8", "overlap", "remat")
FEATURES = re.compile(r"float8|\brings?\b|deferred|\bmemo\b|capture|\btaps?\b|profil|zigzag", re.IGNORECASE)
ENV = "sharding/env.py"


class Figure(NamedTuple):
    """A count, and the most that it may be; `was` is the count before the redesign."""

    what: str
    was: str
    count: int
    bar: int

    @property
    def holds(self) -> bool:
        return self.count <= self.bar


@cache
def sources() -> dict[str, str]:
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def feature_words() -> list[str]:
    """The lines of the core that name a feature."""
    core = ((path, text) for path, text in sources().items() if path.split("/")[0] in CORE)
    return [
        f"{path}:{n}" for path, text in core for n, line in enumerate(text.splitlines(), 1) if FEATURES.search(line)
    ]


def env_fields() -> list[str]:
    tree = ast.parse(sources()[ENV])
    (env,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Env")
    return [ast.unparse(node.target) for node in env.body if isinstance(node, ast.AnnAssign)]


def env_replaces() -> list[str]:
    """Where surroundings are changed field by field, outside their own file."""
    made = re.compile(r"(env|current\(\)|here|outer|quiet|inner)(\.\w+\([^()]*\))*\._replace\(")
    return [
        f"{path}:{n}"
        for path, text in sources().items()
        if path != ENV
        for n, line in enumerate(text.splitlines(), 1)
        if made.search(line)
    ]


def names_of_transports() -> list[str]:
    return [path for path, text in sources().items() if re.search(r"transport\.name", text)]


def repeated_names() -> dict[str, list[str]]:
    """Names that several files define at their top."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, text in sources().items():
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[node.name].append(path)
    return {name: paths for name, paths in found.items() if len(paths) > 1}


def wings_in_the_core() -> list[str]:
    into = re.compile(rf"^\s*(from|import) functitan\.({'|'.join(WINGS)})\b", re.MULTILINE)
    return [path for path, text in sources().items() if path.split("/")[0] in CORE and into.search(text)]


def longest_chain() -> int:
    """The number of files of the longest chain of imports, packages' own lists left out."""
    modules = {path.removesuffix(".py").replace("/", "."): text for path, text in sources().items()}
    modules = {name: text for name, text in modules.items() if not name.endswith("__init__")}

    @cache
    def length(name: str) -> int:
        targets = set()
        for node in ast.walk(ast.parse(modules[name])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("functitan"):
                base = node.module.removeprefix("functitan").lstrip(".")  # type: ignore[union-attr]
                names = {base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)}
                targets |= names & modules.keys() - {name}
        return 1 + max(map(length, targets), default=0)

    return max(map(length, modules))


def figures() -> list[Figure]:
    repeated = repeated_names()
    return [
        Figure("lines of the core that name a feature", "84", len(feature_words()), 0),
        Figure("modules of the core that import a wing", "", len(wings_in_the_core()), 0),
        Figure("fields of Env", "19", len(env_fields()), 8),
        Figure("places that replace fields of an Env, outside its file", "24", len(env_replaces()), 8),
        Figure("files that ask a transport for its name", "12", len(names_of_transports()), 0),
        Figure("longest chain of imports", "28", longest_chain(), 19),
        Figure("files", "201", len(sources()), 140),
        Figure("lines", "22900", sum(len(text.splitlines()) for text in sources().values()), 19600),
        Figure("names that several files define", "110", len(repeated), 40),
        Figure("of them public", "", sum(not name.startswith("_") for name in repeated), 0),
    ]


if __name__ == "__main__":
    table = figures()
    print(f"{'':56}{'was':>8}{'now':>8}{'bar':>8}")
    for figure in table:
        print(f"{figure.what:56}{figure.was:>8}{figure.count:>8}{figure.bar:>8}{'' if figure.holds else '   missed'}")
    if "--list" in sys.argv:
        print(
            *feature_words(),
            *env_replaces(),
            *(f"{name}: {', '.join(p)}" for name, p in repeated_names().items()),
            sep="\n",
        )
    sys.exit(not all(figure.holds for figure in table))
