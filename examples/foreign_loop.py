"""One functitan block inside somebody else's training loop: plain tensors, `loss.backward()`, `torch.optim`.

    python examples/foreign_loop.py                         # one process
    python examples/foreign_loop.py --mesh fsdp=2,tp=2      # four ranks as threads: the same losses

The block's parameters are leaves with this rank's shards: any optimizer that works element by element may update them.
"""

from __future__ import annotations

import argparse

import torch

import functitan as ft
from functitan.nn import swiglu

RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "mlp": "tp", "seq": "tp", "embed": "fsdp"})
X = "batch seq embed"


def train(mesh, steps: int) -> list[float]:
    """The loss of every step; `mesh` may be None."""
    declared = swiglu.params(embed=32, mlp=64)
    params = ft.init(declared, ft.random.key(0), mesh=mesh, rules=RULES)
    params = ft.tree.map(lambda leaf: leaf.requires_grad_(), params)
    block = ft.spmd(swiglu.apply, mesh=mesh, rules=RULES)
    error = ft.spmd(lambda y, goal: ft.reduce(f"{X} ->", (y - goal) ** 2, op="mean"), mesh=mesh, rules=RULES)

    optimizer = torch.optim.Adam(ft.tree.leaves(params), lr=1e-2)
    x = ft.random.normal(ft.random.key(1), (8, 16, 32))
    x, goal = (ft.shard(each, X, mesh=mesh, rules=RULES) for each in (x, x.flip(-1)))
    losses = []
    for _ in range(steps):
        loss = error(block(params, x), goal)
        optimizer.zero_grad()
        loss.backward()
        grads = ft.tree.map(
            lambda leaf: leaf.grad, params
        )  # torch's clip_grad_norm_ would see this rank's shards alone
        grads, _ = ft.optim.clip_grads(grads, 1.0, declared, mesh=mesh, rules=RULES)
        for leaf, grad in zip(ft.tree.leaves(params), ft.tree.leaves(grads), strict=True):
            leaf.grad = grad
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="", help="dims and sizes of a virtual mesh, as in fsdp=2,tp=2")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    sizes = {dim: int(n) for dim, n in (part.split("=") for part in args.mesh.split(",") if part)}
    losses = ft.simulate(**sizes)(train)(args.steps)[0] if sizes else train(None, args.steps)
    print("\n".join(f"step {i + 1:3}  loss {loss:.4f}" for i, loss in enumerate(losses) if (i + 1) % 5 == 0 or i == 0))


if __name__ == "__main__":
    main()
