"""No bias, and no scale of a norm, is a matrix, however many axes it has."""

from __future__ import annotations

import pytest
from torch import nn

import functitan as ft
from functitan import tree
from functitan.models import gpt2, llama

MATRICES = {"q", "k", "v", "out", "gate", "up", "down", "embedding", "unembedding"}  # by their names in the models
MODELS = {
    "gpt2": gpt2.params(gpt2.DEBUG._replace(num_layers=1)),
    "llama": llama.params(llama.DEBUG._replace(num_layers=1)),
    "llama tied": llama.params(llama.DEBUG._replace(num_layers=1, tied=True)),
    "attention": {"a": ft.nn.attention.params(8, 2, 1, 4, bias=True)},
}
NO_MATRICES = {
    "q_bias": "heads head_dim", "bias": "embed mlp", "BIAS": "a b", "in_proj_bias": "three embed", "bias_hh_l0": "a b",
    "scale": "heads head_dim", "k_scale": "head_dim kv_heads", "gain": "kv_heads head_dim", "offset": "heads head_dim",
    "b": "head_dim", "one": "",
}  # fmt: skip
ARE = {
    "lora.b": "rank mlp", "relative_attention_bias.weight": "buckets heads", "rescale": "embed mlp", "w": "embed heads",
    "q": "embed heads head_dim", "biased": "embed mlp",
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_the_matrices_of_every_model_decay_and_nothing_else(model):
    for path, leaf in zip(tree.paths(MODELS[model]), tree.leaves(MODELS[model]), strict=True):
        decays = path.rpartition(".")[2] in MATRICES
        assert ft.optim.decay_matrices(path, leaf.pattern) == ft.optim.decay_matrices(path, leaf) == decays, path


@pytest.mark.parametrize("model", MODELS)
def test_muon_takes_the_matrices_of_every_model_and_nothing_else(model):
    tx = ft.optim.muon(0.02, matrices=ft.nn.attention.MATRICES)
    for path, leaf in zip(tree.paths(MODELS[model]), tree.leaves(MODELS[model]), strict=True):
        name = path.rpartition(".")[2]
        if name in MATRICES:
            tx.init({name: leaf})
        else:
            with pytest.raises(ft.FunctitanError, match=name):
                tx.init({name: leaf})


@pytest.mark.parametrize(("path", "pattern"), [*NO_MATRICES.items(), *ARE.items()])
def test_a_leaf_s_role_is_not_its_rank(path, pattern):
    assert ft.optim.decay_matrices(path, pattern) == (path in ARE)
    assert ft.optim.decay_matrices(f"layers.0.bias.{path}", pattern) == (path in ARE)


def test_a_table_says_what_a_name_does_not():
    declared = {"bias": ft.Param("heads head_dim", (2, 4))}
    ft.optim.muon(0.1, matrices={"heads head_dim": "heads -> head_dim"}).init(declared)


def test_the_biases_of_torch_s_modules():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.rnn = nn.MultiheadAttention(8, 2, add_bias_kv=True), nn.LSTM(8, 4)
            self.bilinear, self.norm = nn.Bilinear(8, 8, 4), nn.LayerNorm(8)

    names = {name: x.dim() for name, x in Model().named_parameters()}
    decayed = {name for name, n in names.items() if ft.optim.decay_matrices(name, " ".join(f"a{i}" for i in range(n)))}
    assert decayed == {name for name, n in names.items() if n > 1 and "bias" not in name}
    assert {name for name, n in names.items() if n > 1 and "bias" in name} == {"attention.bias_k", "attention.bias_v"}
