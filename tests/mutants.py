"""Mutants of the library: each has one collective, transpose or rule step removed, swapped or retargeted.

Sites are found by rules over the syntax tree, so that new code has mutants too. An id is made of the function and the
code that changes, never of line numbers: `sharding.choice._best: len(moves) -> 0`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1] / "functitan"

RULES = {f"sharding.{name}" for name in ("rules", "layout", "choice", "moves", "plan", "contraction")}
RULES |= {f"sharding.{name}" for name in ("message", "sequence")}
RULES |= {"ops.types", "attention.route"}  # each step of a function in these is a rule step
TRANSPOSES = {  # functions of ops and collectives whose steps are those of a transpose or of a tangent
    *("vjp", "jvp", "_vjp", "_jvp", "backward", "transpose", "transposed", "batched", "cotangents", "tangents"),
    *("put_rows", "_show", "shown"),
}
# what communicates: a module's private functions that call these do as well
SENDERS = {"send", "contract", "meet", "run", "run_step"}
STARTERS = {"start"}  # these give what waits for the tensor that comes
TO_GROUPS = {"group", "members"}  # of a transport: which ranks a message goes to
PUBLIC = {"reduce", "broadcast", "constrain", "constrain_like", "where_whole", "reduced"}
REPLICATES = {"spread", "merge", "merge_scalars"}
PUBLIC |= REPLICATES | {"move", "lift", "reshard"}
PUBLIC |= {"all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute"}
WINGS = ("attention", "capture", "float8", "overlap", "remat")
WHERE = (
    *WINGS,
    "ops",
    "optim",
    "nn",
    "models",
    "pipeline",
    "sharding",
    "transforms",
    "train",
)  # where collectives are called

# of a collective or reduction, another one
OTHER = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather", "all_reduce": "all_gather"}
OTHER |= {"all_to_all": "all_gather", "permute": "all_to_all", "slice": "reduce_scatter"}
OTHER |= {"sum": "max", "max": "sum", "mean": "sum", "logsumexp": "max"}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}
EDGE = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Mutant(NamedTuple):
    """One change of one module; `source` is the changed module."""

    id: str
    module: str
    line: int
    source: str


class Change(NamedTuple):
    """Code to be put in the place of a node."""

    node: ast.AST
    code: str


def mutants(module: str) -> list[Mutant]:
    """Every mutant of a module, by its name below functitan ("sharding.moves"), in the order of the source."""
    text = path_of(module).read_text()
    found: dict[str, Mutant] = {}
    for name, change in _changes(module, ast.parse(text)):
        start, end = _span(text, change.node)
        old = " ".join(text.encode()[start:end].decode().split())
        new = " ".join(change.code.split())
        label, count = (base := f"{module}.{name}: {_short(old)} -> {_short(new)}"), 1
        while label in found:
            label = f"{base} #{(count := count + 1)}"
        code = change.code if isinstance(change.node, ast.stmt) else f"({change.code})"
        source = (text.encode()[:start] + code.encode() + text.encode()[end:]).decode()
        found[label] = Mutant(label, module, change.node.lineno, source)  # type: ignore[attr-defined]
    return sorted(found.values(), key=lambda mutant: mutant.line)


def modules() -> list[str]:
    """Every module that may have mutants."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(ROOT.rglob("*.py"))]
    return [name for name in names if name.split(".")[0] in WHERE and not name.endswith("__init__")]


def path_of(module: str) -> Path:
    """The file of a module."""
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


# --- which code of a module -----------------------------------------------------------------------------------------


def _changes(module: str, tree: ast.Module) -> Iterator[tuple[str, Change]]:
    for name, function, rules in _functions(module, tree):
        for node in _own_nodes(function):
            changes = [
                *_sends_of(node, tree),
                *(_steps_of(node) if rules else ()),
                *(_signs_of(node) if rules == 2 else ()),
            ]
            changes += _torchs_of(node) if module == "sharding.distributed" else []
            changes += (
                _places_of(node)
                if module.startswith(("ops.", "nn.", "transforms.", *(f"{wing}." for wing in WINGS)))
                else []
            )
            yield from ((name, change) for change in changes)


def _functions(module: str, tree: ast.AST, prefix: str = "", rules: int = 0) -> Iterator[tuple[str, ast.AST, int]]:
    """(name, function, how much of it is mutated: 0 its collectives, 1 each rule step, 2 each step of a transpose)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _functions(module, node, f"{prefix}{node.name}.", rules)
        elif isinstance(node, ast.FunctionDef):
            if node.name.lstrip("_").startswith("check_") or (node.name.startswith("__") and node.name != "__init__"):
                continue
            if node.returns is not None and ast.unparse(node.returns) in ("list[str]", "str"):
                continue  # complaints: tests/test_errors.py holds their texts
            transposes = node.name in TRANSPOSES and module.startswith(
                ("ops.", "sharding.", "attention.", "float8.", "overlap.")
            )
            own = 2 if transposes else rules or (1 if module in RULES else 0)
            yield prefix + node.name, node, own
            yield from _functions(module, node, f"{prefix}{node.name}.", own)
        else:
            yield from _functions(module, node, prefix, rules)


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function's body, without inner functions, annotations, docstrings, errors and their texts."""
    is_text = lambda node: isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    todo = [node for node in function.body if not is_text(node)]  # type: ignore[attr-defined]
    while todo:
        node = todo.pop(0)
        if isinstance(node, (ast.FunctionDef, ast.Raise, ast.Assert, ast.JoinedStr)) or _complains(node):
            continue
        yield node
        skipped = {id(getattr(node, "annotation", None))}
        todo += [child for child in ast.iter_child_nodes(node) if id(child) not in skipped]


def _complains(node: ast.AST) -> bool:
    """True for checks and error texts: a list of f-strings, `problems += ...`, an `if` that only raises."""
    if isinstance(node, COMPREHENSIONS) and not isinstance(node, ast.DictComp):
        return isinstance(node.elt, ast.JoinedStr)
    if isinstance(node, ast.If):
        return all(isinstance(child, (ast.Raise, ast.Continue)) or _complains(child) for child in node.body)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and "check_" in _name(node.value):
        return True
    if isinstance(node, ast.stmt):
        return ast.unparse(node).startswith(("problems", "complaints"))
    return isinstance(node, ast.Call) and _name(node) in ("report", "nearest")


# --- the changes ----------------------------------------------------------------------------------------------------


def _steps_of(node: ast.AST) -> Iterator[Change]:
    """A rule's steps: conditions, filters, loops, orders, arithmetic, and statements that change something."""
    if isinstance(node, (ast.If, ast.IfExp)):
        negated = Change(node.test, f"not ({ast.unparse(node.test)})")
        yield from _without_parts(node.test) if isinstance(node.test, ast.BoolOp) else [negated]
    if isinstance(node, COMPREHENSIONS):
        for generator in node.generators:
            for test in generator.ifs:
                yield from _without_parts(test) if isinstance(test, ast.BoolOp) else [Change(test, "True")]
    if isinstance(node, ast.For):
        yield Change(node.iter, "()")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "sorted":  # without it, the order of sets: that of their hashes
            yield Change(node, f"sorted({ast.unparse(node.args[0])}, key=lambda each: hash(str(each)))")
        if node.func.id in CALLS:
            yield Change(node.func, CALLS[node.func.id])
    if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.BitOr):
        yield Change(node, ast.unparse(node.left))
    if isinstance(node, ast.Compare) and type(node.ops[0]) in EDGE and len(node.ops) == 1:
        left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
        yield Change(node, f"{left} {EDGE[type(node.ops[0])]} {right}")
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield Change(node, "pass")
    yield from (Change(part, "0") for key in _keys(node) for part in key.elts)


def _signs_of(node: ast.AST) -> Iterator[Change]:
    """What transposes do besides: signs, casts, orders of operands, results."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield Change(node, ast.unparse(node.operand))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        yield Change(node, f"{ast.unparse(node.left)} + {ast.unparse(node.right)}")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("to", "transposed"):
        yield Change(node, ast.unparse(node.func.value) if node.func.attr == "to" else "call.env")
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
        for part in node.value.elts:
            if not (isinstance(part, ast.Starred) or ast.unparse(part) == "None"):
                yield Change(part, "None")
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
        first, second = map(ast.unparse, node.value.elts)
        yield Change(node.value, f"{second}, {first}")


def _sends_of(node: ast.AST, tree: ast.AST) -> Iterator[Change]:
    """Each call that communicates: left out, another collective or reduction, other mesh dims."""
    if isinstance(node, ast.Call) and (name := _name(node)) in _senders(tree) | STARTERS | TO_GROUPS | {
        "Step",
        "scatter",
    }:
        if name not in TO_GROUPS | {"Step", "scatter"} and (given := _tensor(node, tree)) is not None:
            yield Change(node, f"lambda: {ast.unparse(given)}" if name in STARTERS else ast.unparse(given))
        for part in (*node.args, *(keyword.value for keyword in node.keywords)):
            if isinstance(part, ast.Constant) and part.value in OTHER and name not in ("meet", "run"):  # there, a note
                yield Change(part, repr(OTHER[part.value]))
            if ast.unparse(part).split(".")[-1] in ("dims", "mesh_dims"):
                yield Change(part, f"{ast.unparse(part)}[:-1]")
                free = name in REPLICATES or any(ast.unparse(x) == "'all_reduce'" for x in node.args)
                if not free:
                    yield Change(
                        part, f"{ast.unparse(part)}[::-1]"
                    )  # (the order of an all-reduce's ranks, or of replicas, is free)


def _torchs_of(node: ast.AST) -> Iterator[Change]:
    """Each of torch's own collectives left out."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "ops":
        yield Change(node, ast.unparse(node.args[0]))


def _places_of(node: ast.AST) -> Iterator[Change]:
    """Where an op asks which mesh dims shard an axis, or which part is this rank's: none, and the first."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr == "of":
            yield Change(node, "()")
        if node.func.attr == "index" and ast.unparse(node.func.value).endswith("mesh"):
            yield Change(node, "0")


def _without_parts(test: ast.BoolOp) -> Iterator[Change]:
    word = " and " if isinstance(test.op, ast.And) else " or "
    for i in range(len(test.values)):
        yield Change(test, word.join(f"({ast.unparse(part)})" for j, part in enumerate(test.values) if j != i))


def _keys(node: ast.AST) -> Iterator[ast.Tuple]:
    """Tuples that are compared: in a comparison, as the key of a sort, appended to costs; and tuples of conditions."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in EDGE:
        yield from (part for part in (node.left, *node.comparators) if isinstance(part, ast.Tuple))
    if isinstance(node, ast.keyword) and node.arg == "key" and isinstance(node.value, ast.Lambda):
        yield from (part for part in (node.value.body,) if isinstance(part, ast.Tuple))
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "costs.append" and isinstance(node.args[0], ast.Tuple):
        yield node.args[0]
    if isinstance(node, ast.Tuple) and len(node.elts) > 1 and all(isinstance(x, ast.Compare) for x in node.elts):
        yield node


# --- calls ----------------------------------------------------------------------------------------------------------


def _name(call: ast.Call) -> str:
    """The name of the function called, or of the method if it is one of a module, a mesh's table or this object."""
    if isinstance(call.func, ast.Attribute):
        owner = ast.unparse(call.func.value)
        return call.func.attr if owner in ("collectives", "table", "self", "ops") else ""
    return getattr(call.func, "id", "")


@cache
def _senders(tree: ast.AST) -> set[str]:
    """The names of what communicates in a module: its private functions of tensors that call such, too."""
    local = {
        node.name: {_name(call) for call in ast.walk(node) if isinstance(call, ast.Call)}
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_") and _tensor_place(node) is not None
    }
    found = SENDERS | PUBLIC
    while more := {name for name, calls in local.items() if name not in found and calls & found}:
        found = found | more
    strangers = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("functitan")
        for alias in node.names
    }
    return found - TRANSPOSES - strangers


def _tensor(call: ast.Call, tree: ast.AST) -> ast.expr | None:
    """The tensor that a call of a sender is given: what there is without it."""
    for function in (node for node in (*ast.walk(tree), *_definitions()) if isinstance(node, ast.FunctionDef)):
        place, names = _tensor_place(function), [argument.arg for argument in function.args.args]
        method = names[:1] == ["self"]
        if function.name == _name(call) and method == isinstance(call.func, ast.Attribute) and place is not None:
            given = dict(enumerate(call.args)) | {keyword.arg: keyword.value for keyword in call.keywords}
            found = given.get(place - method, given.get(names[place]))
            return None if isinstance(found, ast.Starred) else found
    return None


def _tensor_place(function: ast.FunctionDef) -> int | None:
    """The place of a function's first tensor, or tuple of tensors, among its arguments."""
    for place, argument in enumerate(function.args.args):
        kind = "" if argument.annotation is None else ast.unparse(argument.annotation)
        if kind in ("Tensor", "torch.Tensor", "tuple[Tensor, ...]", "list[Tensor]") or argument.arg in ("x", "values"):
            return place
    return None


@cache
def _definitions() -> tuple[ast.FunctionDef, ...]:
    """The functions of the library that other modules call to communicate."""
    trees = [ast.parse(path_of(module).read_text()) for module in modules()]
    wanted = SENDERS | STARTERS | PUBLIC
    return tuple(f for tree in trees for f in tree.body if isinstance(f, ast.FunctionDef) and f.name in wanted)


# --- text -----------------------------------------------------------------------------------------------------------


def _span(text: str, node: ast.AST) -> tuple[int, int]:
    """First and last byte of a node in its source."""
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore


def _short(code: str, width: int = 70) -> str:
    return code if len(code) <= width else f"{code[: width // 2]} .. {code[-width // 2 :]}"
