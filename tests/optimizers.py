"""Every optimizer beside its oracle in torch.optim or plain torch, on a small tree of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

import functitan as ft
from functitan import optim, tree
from functitan.param import constant as filled

RULES = ft.AxisRules(
    {"batch": ("dp", "fsdp"), "heads": "tp", "mlp": "tp", "vocab": ("tp", "fsdp"), "embed": "fsdp", "head_dim": None}
)
STORAGE = RULES.replace(embed=("fsdp", "dp"))
DECLARED = {
    "layers": [{"up": ft.Param("embed mlp", (8, 4)), "scale": ft.Param("embed", (8,))} for _ in range(2)],
    "q": ft.Param("embed heads head_dim", (8, 2, 4)),
    "gain": ft.Param("", (), filled(1.0)),
    "out": ft.Param("embed vocab", (8, 16)),
}
PATTERNS = tree.map(lambda param: param.pattern, DECLARED)
MATRICES = ft.nn.attention.MATRICES
MUON = {"layers.*.up": "muon", "q": "muon", "out": "muon", "*": "adamw"}

OPTIMIZERS = {
    "adamw": optim.adamw(1e-2, b2=0.95, weight_decay=0.1),
    "adamw matrices": optim.adamw(1e-2, mask=optim.decay_matrices),
    "adamw schedule": optim.adamw(optim.warmup_cosine(1e-2, 3, 10)),
    "sgd": optim.sgd(0.1),
    "momentum": optim.sgd(0.1, momentum=0.9),
    "nesterov": optim.sgd(0.1, momentum=0.9, nesterov=True),
    "clipped": optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(1e-2)),
    "lion": optim.lion(1e-2, weight_decay=0.1),
    "adafactor": optim.adafactor(0.3, weight_decay=0.1),
    "adafactor schedule": optim.adafactor(optim.warmup_cosine(0.3, 3, 20), -0.6, (1e-5, 0.5), 1.5, 0.1),
    "muon": optim.multi_transform(  # in the weights' own dtype, so that float64 shows what bfloat16 would hide
        {"muon": optim.muon(0.02, matrices=MATRICES, dtype=None), "adamw": optim.adamw(1e-2)}, MUON
    ),
    "muon plain": optim.multi_transform(
        {"muon": optim.muon(0.02, 0.9, False, 3, 0.2, matrices=MATRICES, dtype=None), "adamw": optim.adamw(1e-2)}, MUON
    ),
    "masked": optim.masked(optim.adamw(1e-2), optim.decay_matrices),
    "masked nothing": optim.masked(optim.adamw(1e-2), lambda path, leaf: False),
    "multi": optim.multi_transform(
        {"sgd": optim.sgd(0.1, momentum=0.9), "adamw": optim.adamw(1e-2)}, {"layers.*.scale": "sgd", "*": "adamw"}
    ),
    "stored": optim.stored(optim.adamw(1e-2), rules=STORAGE),
    "stored clip": optim.stored(optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(1e-2)), rules=STORAGE),
    "stored adafactor": optim.stored(optim.adafactor(0.3, weight_decay=0.1), rules=STORAGE),
    "block rms": optim.chain(optim.clip_by_block_rms(0.5), optim.scale(-0.1)),
    "identity": optim.chain(optim.identity(), optim.scale(-0.1)),
    "nothing": optim.chain(),
}


# --- oracles: from {path: tensor} to objects whose step() reads .grad and writes the tensors -------------------------


class ByFormula(NamedTuple):
    """An optimizer in plain torch: `rule(x, g, state, t)` gives the next value of one parameter."""

    rule: Callable
    xs: dict[str, torch.Tensor]
    states: dict[str, dict]

    def step(self) -> None:
        for path, x in self.xs.items():
            state = self.states.setdefault(path, {"t": 0})
            state["t"] += 1
            x.copy_(self.rule(x, x.grad, state))


def by(rule):
    return lambda xs: [ByFormula(rule, xs, {})]


def lion(x, g, state):
    """Chen et al., arXiv:2302.06675, algorithm 2."""
    m = state.get("m", torch.zeros_like(x))
    state["m"] = 0.99 * m + 0.01 * g
    return x - 1e-2 * ((0.9 * m + 0.1 * g).sign() + 0.1 * x)


def muon(lr, momentum, nesterov, steps, decay):
    """Jordan et al., 2024, of a weight [inputs, ...outputs] as a matrix [outputs, inputs]."""

    def rule(x, g, state):
        state["m"] = momentum * state.get("m", torch.zeros_like(x)) + (1 - momentum) * g
        m = momentum * state["m"] + (1 - momentum) * g if nesterov else state["m"]
        y = m.flatten(1).T
        y = y / y.pow(2).sum().sqrt()
        tall = y.shape[0] > y.shape[1]
        y = y.T if tall else y
        for _ in range(steps):
            gram = y @ y.T
            y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
        y = y.T if tall else y
        return x * (1 - lr * decay) - lr * max(1.0, y.shape[0] / y.shape[1]) ** 0.5 * y.T.reshape(x.shape)

    return rule


def clip_by_block_rms(x, g, state):
    """Shazeer and Stern, arXiv:1804.04235, section 6."""
    return x - 0.1 * g / max(1.0, g.pow(2).mean().sqrt() / 0.5)


class Clipping(NamedTuple):
    """torch's clipping, as the step before an optimizer's."""

    xs: list[torch.Tensor]

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.xs, 0.1)


def adamw(xs, **options):
    return [torch.optim.AdamW([*xs.values()], **{"lr": 1e-2, **options})]


def sgd(xs, **options):
    return [torch.optim.SGD([*xs.values()], lr=0.1, **options)]


def adafactor(xs):
    return [torch.optim.Adafactor([*xs.values()], lr=0.3, weight_decay=0.1)]


def clipped(xs):
    return [Clipping([*xs.values()]), *adamw(xs)]


def scheduled(schedule, oracle):
    return [oracle, torch.optim.lr_scheduler.LambdaLR(oracle, schedule)]


def matrices(xs):
    return {path: x for path, x in xs.items() if x.dim() > 1}


def others(xs):
    return {path: x for path, x in xs.items() if x.dim() < 2}


def scales(xs):
    return {path: x for path, x in xs.items() if path.endswith("scale")}


ORACLES = {
    "adamw": lambda xs: adamw(xs, betas=(0.9, 0.95), weight_decay=0.1),
    "adamw matrices": lambda xs: adamw(matrices(xs)) + adamw(others(xs), weight_decay=0.0),
    "adamw schedule": lambda xs: scheduled(optim.warmup_cosine(1e-2, 3, 10), *adamw(xs, lr=1.0)),
    "sgd": sgd,
    "momentum": lambda xs: sgd(xs, momentum=0.9),
    "nesterov": lambda xs: sgd(xs, momentum=0.9, nesterov=True),
    "clipped": clipped,
    "lion": by(lion),
    "adafactor": adafactor,
    "adafactor schedule": lambda xs: scheduled(
        optim.warmup_cosine(0.3, 3, 20),
        torch.optim.Adafactor([*xs.values()], 1.0, -0.6, (1e-5, 0.5), 1.5, 0.1),
    ),
    "muon": lambda xs: by(muon(0.02, 0.95, True, 5, 0.1))(matrices(xs)) + adamw(others(xs)),
    "muon plain": lambda xs: by(muon(0.02, 0.9, False, 3, 0.2))(matrices(xs)) + adamw(others(xs)),
    "masked": lambda xs: adamw(matrices(xs)) + by(lambda x, g, state: x + g)(others(xs)),
    "masked nothing": by(lambda x, g, state: x + g),
    "multi": lambda xs: sgd(scales(xs), momentum=0.9) + adamw({k: x for k, x in xs.items() if k not in scales(xs)}),
    "stored": adamw,
    "stored clip": clipped,
    "stored adafactor": adafactor,
    "block rms": by(clip_by_block_rms),
    "identity": sgd,
    "nothing": by(lambda x, g, state: x + g),
}


def values(seed: int, dtype: torch.dtype = torch.float64) -> tree.Tree:
    """A tree like DECLARED of normal values."""
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype), DECLARED)


def copied(value: tree.Tree) -> tree.Tree:
    return tree.map(torch.clone, value)


def same_bits(left: tree.Tree, right: tree.Tree) -> bool:
    pairs = zip(tree.leaves(left), tree.leaves(right), strict=True)
    return tree.paths(left) == tree.paths(right) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def kinds(value: tree.Tree) -> list:
    leaves = zip(tree.paths(value), tree.leaves(value), strict=True)
    return [(path, tuple(x.shape), x.dtype, x.device) for path, x in leaves]


def close(actual: tree.Tree, expected: tree.Tree, atol: float) -> None:
    ft.testing.assert_trees_all_close(actual, expected, rtol=0, atol=atol)


def steps(tx, params, state, grads, donate=False):
    """The parameters and the state after one step for each tree of gradients."""
    for g in grads:
        updates, state = tx.update(g, state, params, patterns=PATTERNS, donate=donate)
        params = optim.apply_updates(params, updates, donate=donate)
    return params, state
