"""The recipes of `ft.float8` in numpy: quantize in float32, multiply and rescale in float64. None of our code."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

EPS = 1e-12


class Format(NamedTuple):
    """A float8 format: bits of mantissa, the exponent of its least normal number, its largest number."""

    mantissa: int
    least: int
    largest: float


E4M3, E5M2 = Format(3, -6, 448.0), Format(2, -14, 57344.0)


def rounded(x: np.ndarray, to: Format) -> np.ndarray:
    """The nearest numbers of the format, ties to even; beyond the largest the largest."""
    x = np.clip(x.astype(np.float64), -to.largest, to.largest)
    exponent = np.maximum(np.frexp(x)[1] - 1, to.least)  # x = m 2**e with 0.5 <= m < 1
    ulp = np.exp2(exponent - to.mantissa)
    return np.round(x / ulp) * ulp


def scaled(x: np.ndarray, scale: np.ndarray, to: Format) -> np.ndarray:
    """What the float8 numbers of x with this scale stand for."""
    scale = np.asarray(scale, np.float32)
    return rounded(x.astype(np.float32) / scale, to) * scale.astype(np.float64)


def by_maximum(x: np.ndarray, to: Format, axis: int | None, maximum: float | None = None) -> np.ndarray:
    """With the scale of the largest magnitude over `axis` (`None`: all)."""
    found = np.abs(x).max(axis=axis, keepdims=True).astype(np.float32)
    found = found if maximum is None else np.float32(maximum)
    return scaled(x, np.maximum(found, np.float32(EPS)) / np.float32(to.largest), to)


def by_blocks(x: np.ndarray, to: Format, axis: int) -> np.ndarray:
    """With a power of two for each 32 numbers along `axis`: OCP MX, scales clipped to normal float32 numbers."""
    blocks = np.moveaxis(x, axis, -1)
    blocks = blocks.reshape(*blocks.shape[:-1], -1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True).astype(np.float32)
    exponent = np.where(largest > 0, np.frexp(largest)[1] - 1, -127) - int(np.log2(to.largest))
    found = scaled(blocks, np.exp2(np.clip(exponent, -126, 127)).astype(np.float32), to)
    return np.moveaxis(found.reshape(*np.moveaxis(x, axis, -1).shape), -1, axis)


def matmul(recipe: str, a: np.ndarray, b: np.ndarray, formats: tuple[Format, Format], known=(None, None)) -> np.ndarray:
    """[m, k] times [k, n]; `known` gives each operand's maximum ("delayed") or scale ("static")."""
    if recipe == "static":
        return scaled(a, known[0], formats[0]) @ scaled(b, known[1], formats[1])
    if recipe == "mxfp8":
        return by_blocks(a, formats[0], 1) @ by_blocks(b, formats[1], 0)
    axes = (1, 0) if recipe.startswith("rowwise") else (None, None)
    parts = zip((a, b), formats, axes, known, strict=True)
    left, right = (by_maximum(x, to, axis, maximum) for x, to, axis, maximum in parts)
    return left @ right


def three(recipe: str, x: np.ndarray, w: np.ndarray, g: np.ndarray, known=(None,) * 3) -> tuple[np.ndarray, ...]:
    """(x w, its cotangents g w^T and x^T g)."""
    of_x, of_w, of_g = known
    y = matmul(recipe, x, w, (E4M3, E4M3), (of_x, of_w))
    dx = matmul(recipe, g, w.T, (E5M2, E4M3), (of_g, of_w))
    if recipe == "rowwise_with_gw_hp":
        return y, dx, x.T @ g
    return y, dx, matmul(recipe, x.T, g, (E4M3, E5M2), (of_x, of_g))
