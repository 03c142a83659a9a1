"""Contractions: sums of products of tensors with named axes, closed under differentiation.

Invariant: a contraction is pure algebra. Its operands and results are whatever describes a tensor: layouts for the
planner, patterns for the ops.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Term(NamedTuple):
    """One product: `results[result] += product of the operands, summed over the axes that the result lacks`."""

    result: int
    operands: tuple[int, ...]


class Contraction(NamedTuple):
    """Sums of products of tensors with named axes, and what is known of each tensor.

    Several results share the operands they share; several terms of one result are added before its reduction. An axis
    that only a result has is broadcast. `sizes` gives the global size of each axis.
    """

    operands: tuple[Any, ...]
    results: tuple[Any, ...]
    terms: tuple[Term, ...]
    sizes: tuple[tuple[str, int], ...]


def terms_of(num_operands: int, num_results: int) -> tuple[Term, ...]:
    """The terms of a signature: the last operands belong to one result each, those before them to every result.

    >>> terms_of(3, 2)  # q and k of one x
    (Term(result=0, operands=(0, 1)), Term(result=1, operands=(0, 2)))
    """
    shared = tuple(range(num_operands - num_results))
    return tuple(Term(i, (*shared, len(shared) + i)) for i in range(num_results))


def cotangents(contraction: Contraction, wanted: tuple[int, ...], given: tuple[int, ...]) -> Contraction:
    """The contraction that gives the cotangents of the operands `wanted`, from the cotangents of the results `given`.

    Its operands are those of `contraction`, then the given cotangents; its results stand in the order of `wanted`.
    The transpose of a product is the product of the cotangent with the other operands.
    """
    place = {result: len(contraction.operands) + i for i, result in enumerate(given)}
    terms = tuple(
        Term(wanted.index(x), (*(other for other in term.operands if other != x), place[term.result]))
        for x in wanted
        for term in contraction.terms
        if x in term.operands and term.result in place
    )
    return Contraction(
        (*contraction.operands, *(contraction.results[i] for i in given)),
        tuple(contraction.operands[i] for i in wanted),
        terms,
        contraction.sizes,
    )


def tangents(contraction: Contraction, given: tuple[int, ...]) -> Contraction:
    """The contraction that gives the tangents of the results from those of the operands `given` (the last operands)."""
    place = {operand: len(contraction.operands) + i for i, operand in enumerate(given)}
    terms = tuple(
        Term(term.result, tuple(place[x] if other == x else other for other in term.operands))
        for term in contraction.terms
        for x in term.operands
        if x in place
    )
    operands = (*contraction.operands, *(contraction.operands[i] for i in given))
    return Contraction(operands, contraction.results, terms, contraction.sizes)
