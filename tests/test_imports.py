"""The laws of the package's shape: imports go one way down the table below, and each file stays one small concept."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

# Row i is layer i. A module imports lower layers, or its own layer where that makes no cycle.
WINGS = ["attention", "capture", "float8", "overlap", "remat"]  # a feature each, from its wrapper to its kernels
LAYERS = [
    ["lines", "errors", "reading", "tree"],
    ["axes", "param", "threefry", "frozen"],
    ["sharding.mesh", "sharding.rules", "sharding.layout", "sharding.contraction", "sharding.moves", "sharding.choice"]
    + ["sharding.plan", "sharding.message", "sharding.precision", "sharding.sequence"],
    [
        "sharding.env",
        "sharding.context",
        "sharding.distributed",
        "sharding.virtual",
        "sharding.ledger",
        "sharding.program",
    ]
    + ["sharding.point_to_point", "sharding.messages", "sharding.agreement", "sharding.steps", "sharding.collectives"]
    + ["sharding.explain", "sharding.init", "sharding.cut", "sharding.shapes", "sharding.around", "sharding.lowering"]
    + ["sharding.sink", "sharding.launch", "sharding.simulate", "sharding"],
    ["ops", "ops.*", "random"],
    [*WINGS, *(f"{wing}.*" for wing in WINGS), "nn", "nn.*", "transforms", "transforms.*"],
    ["models", "models.*", "pipeline", "pipeline.*", "optim", "optim.*"],
    ["checkpoint", "checkpoint.*", "data", "data.*", "metrics", "breakdown", "profiling", "module", "state", "reached"]
    + ["declared"],
    ["train", "testing", "testing.*"],
]
STRANGERS = [{"nn", "transforms"}]  # packages that do not import each other
COLLECTIVES_AT_HOME = [*LAYERS[3], "overlap.symmetric", "capture.sending"]  # the only users of torch.distributed's
PYTREES_AT_HOME = ["tree"]  # the only importer of optree and torch's pytree
LOADS_AT_HOME = {  # what may make objects of bytes, and the only module that does so
    "json.load": "reading",
    "json.loads": "reading",
    "pickle.dumps": "checkpoint.dcp",  # writes alone
    "torch.load": "checkpoint.dcp",  # weights_only, of one item
    "pickletools.genops": "checkpoint.pickled",
}
OPTIONAL = {
    "datasets",
    "dill",
    "matplotlib",
    "rich",
    "tiktoken",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "transformers",
}  # heavy: a function may import them itself
MAX_LINES = 300

PIPES = ["sharding.launch"]  # what it loads comes from processes of its own, through their pipes
LOADS = re.compile(
    r"(json\.loads?|(pickle|dill|marshal|cloudpickle|joblib|yaml|shelve)\.\w+|pickletools\.\w+|numpy\.(load|fromfile)|"
    r"torch\.(load|jit\.load|hub\.\w+|serialization\.\w+)|runpy\.\w+)$"
)
COLLECTIVE = re.compile(
    r"torch\.(distributed|ops\.\w*c10d\w*)(\.\w+)*\.(all_|i?send|i?recv|broadcast|reduce|scatter|gather|barrier|permute"
    r"|batch_isend|P2POp)\w*$|torch\.distributed\._functional_collectives|torch\.ops\.\w*c10d"
)
PYTREE = re.compile(r"(optree|torch\.utils\.(_pytree|_cxx_pytree|pytree))\b")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Module(NamedTuple):
    """One file; `name` is relative to functitan ("sharding.mesh"; a package's `__init__` is named as the package)."""

    name: str
    is_package: bool
    source: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)


def read_package(root: Path) -> list[Module]:
    """All modules under `root`, without the root's own `__init__`, which re-exports from every layer."""
    modules = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules += [Module(name, is_package, path.read_text())] if name else []
    return modules


def imported(module: Module, node: ast.AST) -> Iterator[tuple[str, str]]:
    """Pairs (local name, absolute dotted name) that one import statement binds."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name, alias.name
    elif isinstance(node, ast.ImportFrom):
        here = ["functitan", *module.name.split(".")] + ["__init__"] * module.is_package
        base = here[: -node.level] if node.level else []
        for alias in node.names:
            yield alias.asname or alias.name, ".".join([*base, *filter(None, [node.module]), alias.name])


def imports(module: Module, modules: list[Module]) -> set[str]:
    """The package's modules that `module` imports, each by the longest name that is a file; "" is functitan itself."""
    known = {m.name for m in modules}
    found = set()
    for node in ast.walk(module.tree):
        for _, dotted in imported(module, node):
            if dotted.split(".")[0] == "functitan":
                parts = dotted.split(".")[1:]
                names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
                found.add(next((name for name in names if name in known), ""))
    return found


def layer(name: str) -> int | None:
    return next((i for i, row in enumerate(LAYERS) if any(fnmatch(name, pattern) for pattern in row)), None)


def modules_are_in_the_table(modules: list[Module]) -> Iterator[str]:
    for m in modules:
        if layer(m.name) is None:
            yield f"{m.name}: unknown module; add it to its layer in LAYERS of tests/test_imports.py"


def imports_go_down(modules: list[Module]) -> Iterator[str]:
    for m in modules:
        for target in sorted(imports(m, modules)):
            mine, theirs = layer(m.name), layer(target)
            if not target:
                yield f"{m.name}: imports functitan itself, which imports everything; import the module that is meant"
            elif mine is not None and theirs is not None and theirs > mine:
                yield f"{m.name} (layer {mine}): imports {target} (layer {theirs}), which is above it"
            elif {m.name.split(".")[0], target.split(".")[0]} in STRANGERS:
                yield f"{m.name}: imports {target}; these two packages do not import each other"


def wings_stand_alone(modules: list[Module]) -> Iterator[str]:
    for m in modules:
        own = m.name.split(".")[0]
        for target in sorted(imports(m, modules)):
            theirs = target.split(".")[0]
            if own in WINGS and theirs in WINGS and own not in (theirs, "capture"):
                yield f"{m.name}: imports {target}; only capture knows other wings: use a hook of the core"


def imports_make_no_cycle(modules: list[Module]) -> Iterator[str]:
    try:
        TopologicalSorter({m.name: imports(m, modules) for m in modules}).prepare()
    except CycleError as error:
        yield "import cycle: " + " <- ".join(error.args[1])


def functions_import_only_optional_packages(modules: list[Module]) -> Iterator[str]:
    for m in modules:
        inner = {n for f in ast.walk(m.tree) if isinstance(f, FUNCTIONS) for n in ast.walk(f)}
        for line, dotted in sorted({(n.lineno, d) for n in inner for _, d in imported(m, n)}):
            if not OPTIONAL & {".".join(dotted.split(".")[:n]) for n in (1, 2, 3)}:
                yield f"{m.name}:{line}: imports {dotted} inside a function; move it to the top of the file"


def private_homes_are_kept(modules: list[Module]) -> Iterator[str]:
    for m in modules:
        bound = [(node.lineno, *pair) for node in ast.walk(m.tree) for pair in imported(m, node)]
        used = [(n.lineno, *ast.unparse(n).partition(".")) for n in ast.walk(m.tree) if isinstance(n, ast.Attribute)]
        names = {local: dotted for _, local, dotted in bound}
        uses = {(line, dotted) for line, _, dotted in bound}
        uses |= {(line, f"{names.get(head, head)}.{rest}") for line, head, _, rest in used}
        for line, name in sorted({(line, found[0]) for line, use in uses if (found := PYTREE.match(use))}):
            if m.name not in PYTREES_AT_HOME:
                yield f"{m.name}:{line}: uses {name}; only functitan/tree.py does"
        for line, name in sorted({(line, found[0]) for line, use in uses if (found := COLLECTIVE.match(use))}):
            if m.name not in COLLECTIVES_AT_HOME:
                yield f"{m.name}:{line}: uses {name}; only layer 3 of functitan/sharding does"


def files_are_read_without_running_code(modules: list[Module]) -> Iterator[str]:
    for m in modules:
        nodes = list(ast.walk(m.tree))
        bound = {local: dotted for node in nodes for local, dotted in imported(m, node)}
        loaders = [local for local, its in bound.items() if LOADS.match(its) or LOADS.match(f"{its}.load")]
        for node in nodes:
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id in ("eval", "exec"):
                yield f"{m.name}:{node.lineno}: {called.id} runs a text"
            if isinstance(called, ast.Attribute) and called.attr == "load" and m.name not in PIPES:
                text = ast.unparse(node)
                if text.startswith("torch.load(") and "weights_only=True" not in text:
                    yield f"{m.name}:{node.lineno}: torch.load without weights_only=True runs a file"
            root = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if not isinstance(root, ast.Name) or root.id not in loaders:
                continue
            head, _, rest = ast.unparse(node).partition(".")
            name = ".".join(filter(None, [bound.get(head, head), rest]))
            if LOADS.match(name) and m.name not in (LOADS_AT_HOME.get(name), *PIPES):
                yield f"{m.name}:{node.lineno}: uses {name}; only {LOADS_AT_HOME.get(name, 'nobody')} does"


def packages_only_reexport(modules: list[Module]) -> Iterator[str]:
    for m in modules:
        for node in m.tree.body if m.is_package else ():
            own = all(d.startswith((f"functitan.{m.name}.", "__future__")) for _, d in imported(m, node))
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            if not (text or names or (own and isinstance(node, ast.Import | ast.ImportFrom))):
                yield f"{m.name}/__init__.py:{node.lineno}: only re-exports its own modules, no other code"


def modules_say_what_they_are(modules: list[Module]) -> Iterator[str]:
    for m in modules:
        if not ast.get_docstring(m.tree):
            yield f"{m.name}: has no module docstring"


def files_are_short(modules: list[Module]) -> Iterator[str]:
    for m in modules:
        if (count := len(m.source.splitlines())) > MAX_LINES:
            yield f"{m.name}: {count} lines, the limit is {MAX_LINES}; it holds more than one concept: split it"


# Each law with a package that breaks it once, and the text that says so.
BROKEN = [
    (modules_are_in_the_table, {"utils": ""}, "utils: unknown module; add it"),
    (imports_go_down, {"axes": "from . import train", "train": ""}, "axes (layer 1): imports train (layer 8)"),
    (imports_go_down, {"axes": "from .ops.sum import f", "ops.sum": ""}, "axes (layer 1): imports ops.sum (layer 4)"),
    (imports_go_down, {"nn.mlp": "from ..transforms import grad", "transforms.grad": ""}, "do not import each other"),
    (wings_stand_alone, {"remat.a": "from ..float8.b import f", "float8.b": ""}, "only capture knows other wings"),
    (imports_go_down, {"axes": "import functitan as ft"}, "axes: imports functitan itself"),
    (imports_make_no_cycle, {"axes": "from .param import a", "param": "import functitan.axes"}, "import cycle: "),
    (
        functions_import_only_optional_packages,
        {"axes": "def f():\n    import os\n    import rich"},
        "axes:2: imports os",
    ),
    (private_homes_are_kept, {"axes": "import torch\ntorch.utils._pytree.x"}, "only functitan/tree.py does"),
    (private_homes_are_kept, {"axes": "import optree as o"}, "uses optree"),
    (
        private_homes_are_kept,
        {"axes": "import torch.distributed as d\nd.all_reduce(x)"},
        "axes:2: uses torch.distributed",
    ),
    (private_homes_are_kept, {"axes": "import torch\ntorch.distributed.nn.functional.all_gather(x)"}, "axes:2: uses"),
    (private_homes_are_kept, {"axes": "from torch.distributed import broadcast"}, "only layer 3"),
    (
        packages_only_reexport,
        {"ops/": "from .sum import f\nx = f()", "ops.sum": ""},
        "ops/__init__.py:2: only re-exports",
    ),
    (
        files_are_read_without_running_code,
        {"axes": "from pickle import loads as f\nf(b'')"},
        "axes:2: uses pickle.loads",
    ),
    (files_are_read_without_running_code, {"axes": "import json\njson.load(f)"}, "json.load; only reading does"),
    (files_are_read_without_running_code, {"axes": "eval('1')"}, "axes:1: eval runs a text"),
    (
        files_are_read_without_running_code,
        {"checkpoint.dcp": "import torch\ntorch.load(f)"},
        "checkpoint.dcp:2: torch.load without weights_only=True",
    ),
    (modules_say_what_they_are, {"axes": "x = 1"}, "axes: has no module docstring"),
    (files_are_short, {"axes": "\n" * 301}, "axes: 301 lines, the limit is 300"),
]
LAWS = sorted({law for law, _, _ in BROKEN}, key=lambda law: law.__name__)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_functitan_keeps_the_law(law: Callable):
    modules = read_package(Path(__file__).parents[1] / "functitan")
    assert not (broken := list(law(modules))), "\n".join([f"{law.__name__} does not hold:", *broken])


@pytest.mark.parametrize(("law", "sources", "text"), BROKEN)
def test_the_law_names_what_breaks_it(law: Callable, sources: dict[str, str], text: str):
    (message,) = law([Module(name.rstrip("/"), name.endswith("/"), source) for name, source in sources.items()])
    assert text in message
