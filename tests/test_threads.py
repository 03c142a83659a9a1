"""An op carries all that its derivatives need: a backward pass runs right on a thread with an empty context.

On CUDA autograd calls backward from threads of its own, where context variables have their defaults.
"""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch

import functitan as ft
from functitan.sharding.context import current

RULES = ft.AxisRules(
    {
        "batch": "fsdp",
        "heads": "tp",
        "mlp": "tp",
        "vocab": "tp",
        "seq": "tp",
        "embed": "fsdp",
        "head_dim": None,
    }
)
PATTERNS = {
    "table": "vocab embed",
    "scale": "embed",
    "q": "embed heads head_dim",
    "up": "embed mlp",
    "out": "embed vocab",
}
SIZES = {"batch": 4, "seq": 4, "embed": 8, "heads": 2, "head_dim": 3, "mlp": 6, "vocab": 10}
MESHES = [{"fsdp": 2}, {"tp": 2}, {"fsdp": 2, "tp": 2}]


def loss(params, tokens):
    """Every kind of named op in one program."""
    x = ft.take("batch seq, vocab embed -> batch seq embed", tokens, params["table"])
    x = x * ft.broadcast("embed -> batch seq embed", params["scale"])
    q = ft.einsum("batch seq embed, embed heads head_dim -> batch seq heads head_dim", x, params["q"])
    q = ft.attention("batch seq heads head_dim, batch seq heads head_dim", q, q, q, causal=True)
    q = ft.rearrange("batch seq heads head_dim -> batch seq (heads head_dim)", q)
    q = ft.rearrange("batch seq (heads head_dim) -> batch seq heads head_dim", q.tanh(), head_dim=SIZES["head_dim"])
    x = x + ft.einsum("batch seq heads head_dim, embed heads head_dim -> batch seq embed", q, params["q"])
    h = ft.einsum("batch seq embed, embed mlp -> batch seq mlp", x, params["up"])
    x = x + ft.einsum("batch seq mlp, embed mlp -> batch seq embed", h.tanh(), params["up"])
    x = x - ft.broadcast("batch seq -> batch seq embed", ft.reduce("batch seq embed -> batch seq", x, op="logsumexp"))
    last = ft.constrain("batch embed -> batch embed", ft.select("batch seq embed -> batch embed", x, -1))
    logits = ft.einsum("batch embed, embed vocab -> batch vocab", last, params["out"])
    labels = ft.select("batch seq -> batch", tokens, 0)
    chunked = ft.linear_cross_entropy("batch embed, embed vocab, batch -> ", last, params["out"], labels, chunk=1)
    return chunked + ft.cross_entropy("batch vocab, batch -> ", logits, labels)


def values():
    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.randn([SIZES[axis] for axis in pattern.split()], generator=generator, dtype=torch.float64) / 3
        for name, pattern in PATTERNS.items()
    }
    return params, torch.randint(0, SIZES["vocab"], (SIZES["batch"], SIZES["seq"]), generator=generator)


def elsewhere(fn, *args):
    """The result of `fn` from a new thread, whose context is empty."""
    found: dict = {}

    def work():
        found["mesh"] = current().mesh
        try:
            found["value"] = fn(*args)
        except BaseException as error:
            found["error"] = error

    thread = threading.Thread(target=contextvars.Context().run, args=(work,))
    thread.start()
    thread.join()
    assert found["mesh"] is None, "the context was not empty"
    if "error" in found:
        raise found["error"]
    return found["value"]


def vjp(params, tokens):
    value, back = torch.func.vjp(lambda p: loss(p, tokens), params)
    return elsewhere(back, torch.ones_like(value))[0]


def autograd(params, tokens):
    params = {name: x.detach().requires_grad_() for name, x in params.items()}
    value = loss(params, tokens)
    grads = elsewhere(torch.autograd.grad, value, list(params.values()))
    return dict(zip(params, grads, strict=True))


@pytest.mark.parametrize("backward", [vjp, autograd])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_backward_on_a_thread_with_an_empty_context_gives_the_gradients(mesh, backward):
    params, tokens = values()
    expected = torch.func.grad(loss)(params, tokens)

    def rank(mesh, params, tokens):
        params = ft.shard(params, PATTERNS, mesh=mesh, rules=RULES)
        tokens = ft.shard(tokens, "batch seq", mesh=mesh, rules=RULES)
        grads = ft.spmd(backward, mesh=mesh, rules=RULES)(params, tokens)
        return ft.unshard(grads, PATTERNS, mesh=mesh, rules=RULES)

    for grads in ft.simulate(**mesh)(rank)(params, tokens):
        for name, x in expected.items():
            torch.testing.assert_close(grads[name], x, rtol=0, atol=1e-12)  # float64 sums in another order
