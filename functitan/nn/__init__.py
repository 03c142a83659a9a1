"""Layers as pairs of functions: `params(...)` declares a tree of `Param`, `apply(params, x, ...)` is the layer.

No layer assumes that an axis is whole: what mixes positions of an axis is a named op.
"""
