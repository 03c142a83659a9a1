"""Derivatives of functions of pytrees: `grad`, `value_and_grad`, `jvp`, `hvp`.

Invariant: the meaning is torch.func's. Outermost and eager, `value_and_grad` calls `torch.autograd.grad` instead,
because torch.func always keeps the graph of the backward pass (`create_graph`): five times the memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functitan import tree
from functitan.errors import FunctitanError, check_function, report
from functitan.ops.function import has_derivative, transforms_active
from functitan.sharding.context import current, using, within
from functitan.sharding.cut import carry_cut
from functitan.sharding.env import Env
from functitan.transforms.add_into import add_into
from functitan.transforms.flat import Form, join, split

Argnums = int | Sequence[int]


def value_and_grad(fn: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., Any]:
    """A function that gives (value, gradients) of a scalar function, as in JAX; ((value, aux), gradients) if `has_aux`.

    Gradients have the structure of the arguments `argnums`, whose leaves are floating-point tensors. They are sharded
    as the arguments are. Raises `FunctitanError` for leaves without a derivative and for a value that is no scalar.

    >>> value_and_grad(lambda p: (p["w"] ** 2).sum())({"w": torch.tensor([1.0, 2.0])})
    (tensor(5.), {'w': tensor([2., 4.])})
    """
    check_function(fn, "ft.value_and_grad")
    return reaching(fn, argnums, has_aux, torch.zeros_like)


def reaching(
    fn: Callable[..., Any], argnums: Argnums, has_aux: bool, unreached: Callable[[Tensor], Tensor | None]
) -> Callable[..., Any]:
    """`value_and_grad`, with `unreached(leaf)` as the gradient of a leaf that the value does not depend on.

    Only plain autograd tells such leaves: under torch.func transforms they have zeros.
    """

    def with_grad(*args: Any, **kwargs: Any) -> Any:
        places = _places(argnums, len(args))
        leaves, structure = tree.flatten(tuple(args[i] for i in places))
        _check_leaves([args[i] for i in places], places)

        def flat(*values: Tensor) -> Any:
            given = dict(zip(places, tree.unflatten(structure, values), strict=True))
            out = fn(*(given.get(i, arg) for i, arg in enumerate(args)), **kwargs)
            _check_value(out, has_aux)
            value, aux = out if has_aux else (out, None)
            return value, aux

        env, nested = _surroundings([*leaves, *_others(args, kwargs, places)])
        with using(env):
            value, aux, grads = _nested(flat, leaves) if nested else _outermost(flat, leaves, unreached)
        found = [None if g is None else carry_cut(x, g) for x, g in zip(leaves, grads, strict=True)]
        grads = tree.unflatten(structure, found)
        return ((value, aux) if has_aux else value), (grads[0] if isinstance(argnums, int) else grads)

    return with_grad


def add_gradients(
    fn: Callable[..., tuple[Tensor, Any]], leaves: list[Tensor], sums: list[Tensor], reached: set[int]
) -> tuple[Tensor, Any, list[Tensor]]:
    """`fn(*leaves)`, a pair (scalar, aux), and `sums` with the scalar's gradients added to them.

    `reached` gets the numbers of the leaves that the scalar depends on. Each gradient is added in place as soon as it
    is ready, in the dtype of its sum, and freed: there is never a second set of gradients. Where the sums will be
    differentiated themselves, they are new tensors.
    """
    env, nested = _surroundings(leaves)
    with using(env):
        if nested:
            value, aux, grads = _nested(fn, leaves)
            reached.update(range(len(leaves)))
            return value, aux, [total + g.to(total.dtype) for total, g in zip(sums, grads, strict=True)]
        with torch.enable_grad():
            inputs = [leaf.detach().requires_grad_() for leaf in leaves]
            marked = (add_into(x, total, reached, i) for i, (x, total) in enumerate(zip(inputs, sums, strict=True)))
            out = within("forward", fn, *map(carry_cut, leaves, marked))
            _check_value(out, True)
            value, aux = out
        if value.requires_grad:
            within("backward", _gradients, value, inputs)  # what the sums took went no further
        return value.detach(), _detached(aux), sums


def grad(fn: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., Any]:
    """A function that gives the gradients of a scalar function; with `has_aux`, (gradients, aux).

    >>> grad(lambda x: x ** 3)(torch.tensor(2.0))
    tensor(12.)
    """
    inner = value_and_grad(fn, argnums, has_aux)

    def only_grad(*args: Any, **kwargs: Any) -> Any:
        value, grads = inner(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return only_grad


def jvp(fn: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """(fn(*primals), its derivative along `tangents`): forward mode, as in JAX.

    On a virtual mesh, and on every thread but the main one, it is the vjp of the vjp, which is linear in its cotangent:
    torch's forward mode is one for the whole process, and gives wrong numbers where two threads use it. Raises
    `FunctitanError` if structures differ.

    >>> jvp(lambda x: x ** 2, (torch.tensor(3.0),), (torch.tensor(1.0),))
    (tensor(9.), tensor(6.))
    """
    _check_tangents("ft.jvp", primals, tangents)
    leaves, structure = tree.flatten(tuple(primals))
    directions = tree.leaves(tuple(tangents))
    shapes: list[Any] = []

    def flat(*values: Tensor) -> tuple[Tensor, ...]:
        values = tuple(map(carry_cut, leaves, values))
        out, out_structure = tree.flatten(fn(*tree.unflatten(structure, values)))
        shapes[:] = [out_structure]
        return tuple(out)

    mesh = current().mesh
    alone = threading.current_thread() is threading.main_thread()  # a rank of ft.simulate may be outside ft.spmd
    if not alone or (mesh is not None and mesh.transport.shares_a_process):
        values, moved = _double_vjp(flat, leaves, directions)
    else:
        values, moved = torch.func.jvp(flat, tuple(leaves), tuple(directions))[:2]
    return tree.unflatten(shapes[0], values), tree.unflatten(shapes[0], moved)


def hvp(fn: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """The Hessian of a scalar function of its first argument, times `tangents`: reverse over reverse.

    `primals` are all the function's arguments; `tangents` has one entry, with the first argument's structure.

    >>> hvp(lambda x: (x ** 3).sum(), (torch.tensor([1.0, 2.0]),), (torch.tensor([1.0, 1.0]),))
    tensor([ 6., 12.])
    """
    first = primals[:1] if isinstance(primals, (tuple, list)) else primals
    _check_tangents("ft.hvp", first, tangents)
    leaves, structure = tree.flatten(primals[0])
    directions = tree.leaves(tangents[0])

    def gradient(*values: Tensor) -> tuple[Tensor, ...]:
        own = tree.unflatten(structure, map(carry_cut, leaves, values))
        return tuple(tree.leaves(grad(fn)(own, *primals[1:])))

    back = torch.func.vjp(gradient, *leaves)[1]  # the Hessian is symmetric: its transpose times v is it times v
    return tree.unflatten(structure, back(tuple(directions)))


def _others(args: tuple[Any, ...], kwargs: dict[str, Any], places: tuple[int, ...]) -> list[Tensor]:
    """The tensors whose gradients are not taken: the gradients depend on them all the same."""
    others = [arg for i, arg in enumerate(args) if i not in places], kwargs
    return [x for x in tree.leaves(others) if isinstance(x, Tensor)]


def _surroundings(given: list[Tensor]) -> tuple[Env, bool]:
    """The surroundings of a function whose gradients are taken, and whether these will be differentiated again."""
    env, outside = current(), torch.is_grad_enabled() and any(x.requires_grad for x in given)
    nested = transforms_active() or env.differentiated or outside
    return env._replace(differentiated=env.differentiated or outside or not nested), nested


def _outermost(
    flat: Callable[..., Any], leaves: list[Tensor], unreached: Callable[[Tensor], Tensor | None]
) -> tuple[Tensor, Any, list[Tensor | None]]:
    with torch.enable_grad():
        inputs = [carry_cut(leaf, leaf.detach().requires_grad_()) for leaf in leaves]
        value, aux = within("forward", flat, *inputs)
    if not value.requires_grad:
        return value.detach(), _detached(aux), [unreached(leaf) for leaf in leaves]
    grads = within("backward", _gradients, value, inputs)
    filled = [unreached(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return value.detach(), _detached(aux), filled


def _gradients(value: Tensor, inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(value, inputs, allow_unused=True)


def _nested(flat: Callable[..., Any], leaves: list[Tensor]) -> tuple[Tensor, Any, list[Tensor]]:
    kept: list[Form] = []  # torch.func lets only tensors out

    def valued(*values: Tensor) -> tuple[Tensor, list[Tensor]]:
        value, aux = within("forward", flat, *map(carry_cut, leaves, values))
        tensors, form = split(aux)
        kept[:] = [form]
        return value, tensors

    both = torch.func.grad_and_value(valued, argnums=tuple(range(len(leaves))), has_aux=True)
    grads, (value, tensors) = within("forward and backward", both, *leaves)
    return value, join(kept[0], tensors), list(grads)


def _double_vjp(flat: Callable[..., Any], leaves: list[Tensor], directions: list[Tensor]) -> tuple[Any, Any]:
    def transposed(*cotangents: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(flat, *leaves)[1](cotangents)

    values = flat(*leaves)
    back = torch.func.vjp(transposed, *(torch.zeros_like(value) for value in values))[1]
    return values, back(tuple(directions))


def _detached(aux: Any) -> Any:
    return tree.map(lambda x: x.detach() if isinstance(x, Tensor) else x, aux)


def _places(argnums: Argnums, count: int) -> tuple[int, ...]:
    """The numbers of the arguments, counted from the front."""
    given = tuple(argnums) if isinstance(argnums, Sequence) else (argnums,)
    bad = [
        f"argnums has {i!r}, but the call has {count} positional arguments" for i in given if not _is_place(i, count)
    ]
    places = () if bad else tuple(i % count for i in given)
    bad += [f"argnums {given} names an argument twice"] if len(set(places)) < len(places) else []
    if bad:
        raise FunctitanError(report("ft.value_and_grad", bad, "argnums counts positional arguments from 0"))
    return places


def _is_place(i: object, count: int) -> bool:
    return type(i) is int and -count <= i < count


def _check_tangents(what: str, primals: Any, tangents: Any) -> None:
    """Raise unless tangents are to primals, leaf for leaf, what a derivative needs."""
    bad = [
        f"{name} is a {type(x).__name__}, not a tuple with an entry for each argument"
        for name, x in (("primals", primals), ("tangents", tangents))
        if not isinstance(x, (tuple, list))
    ]
    if not bad and len(primals) != len(tangents):
        bad = [f"{len(tangents)} tangents for {len(primals)} differentiated arguments"]
    if not bad:
        bad = tree.mismatches(tuple(primals), tuple(tangents), "primals", "tangents")
    if not bad:
        each = zip(tree.paths(tuple(primals)), tree.leaves(tuple(primals)), tree.leaves(tuple(tangents)), strict=True)
        kinds = ((path, described(x), described(t), x) for path, x, t in each)
        bad = [
            f"{p}: {a} has tangent {b}" if a != b else f"{p}: {a} has no derivative"
            for p, a, b, x in kinds
            if a != b or not has_derivative(x)
        ]
    if bad:
        raise FunctitanError(report(what, bad, "give each differentiated leaf a tangent of its shape and dtype"))


def _check_leaves(args: list[Any], places: tuple[int, ...]) -> None:
    problems = [
        f"argument {place}{'.' if path else ''}{path}: {described(leaf)} has no derivative"
        for place, arg in zip(places, args, strict=True)
        for path, leaf in zip(tree.paths(arg), tree.leaves(arg), strict=True)
        if not has_derivative(leaf)
    ]
    if problems:
        fix = "pass such leaves in another argument, or choose argnums"
        raise FunctitanError(report("ft.value_and_grad", problems, fix))


def described(leaf: Any) -> str:
    """What a leaf is, for errors: dtype and sizes, or the type of what is no tensor."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return f"a value of type {type(leaf).__name__!r}"


def _check_value(out: Any, has_aux: bool) -> None:
    pair = isinstance(out, tuple) and len(out) == 2
    value = out[0] if has_aux and pair else out
    fix = "return a scalar: ft.reduce('batch ->', loss)" + ("" if has_aux else "; has_aux=True for (value, aux)")
    if has_aux and not pair:
        problem, fix = f"the function gives {described(out)}, not (value, aux)", "return both, or leave has_aux out"
    elif not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        problem = f"the function gives {described(value)}, not a floating-point scalar"
    else:
        return
    raise FunctitanError(report("ft.value_and_grad", [problem], fix))
