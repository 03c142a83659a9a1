"""Mistakes in train states, steps, data, models: the call, the kind of error, its whole text."""

from __future__ import annotations

import torch

import functitan as ft
from functitan.models import gpt2, llama
from user_errors.given import ADAM, BATCH, CONFIG, DECLARED, KEY, LLAMA, SGD, TOKENS, USED, P, step


def keyless(params, batch):
    return params["w"].sum(), 1


MISTAKES = {
    "a train state of values": (
        lambda: ft.TrainState.create(P, ADAM, KEY),
        ft.FunctitanError,
        """\
        ft.TrainState.create:
          - w is a Tensor, not a Param
          Fix: declare each parameter as ft.Param('embed mlp', (256, 768))""",
    ),
    "a train state with torch's optimizer": (
        lambda: ft.TrainState.create(DECLARED, torch.optim.AdamW, KEY),
        ft.FunctitanError,
        """\
        ft.TrainState.create:
          - tx is a function
          Fix: give gradient transformations, as ft.optim.adamw(1e-3) makes them""",
    ),
    "a loss function without a key": (
        lambda: ft.train_step(keyless, ADAM),
        ft.FunctitanError,
        """\
        ft.train_step: the loss function:
          - keyless(params, batch) cannot be called as keyless(params, batch, key)
          Fix: write def loss(params, batch, key), also where it draws nothing: key is what ft.random and dropout \
take""",
    ),
    "a loss of accumulation with four arguments": (
        lambda: ft.accumulate(lambda params, batch, key, scale: None, 2),
        ft.FunctitanError,
        """\
        ft.accumulate: the loss function:
          - <lambda>(params, batch, key, scale) cannot be called as <lambda>(params, batch, key)
          Fix: write def loss(params, batch, key), also where it draws nothing: key is what ft.random and dropout \
take""",
    ),
    "a step of parameters alone": (
        lambda: ft.train_step(max, ADAM)(P, BATCH),
        ft.FunctitanError,
        """\
        ft.train_step:
          - state is a dict
          Fix: make one by ft.TrainState.create""",
    ),
    "a step with another optimizer than the state's": (
        lambda: step(lambda p: (p["w"][0, 0], 1), SGD),
        ft.FunctitanError,
        """\
        ft.train_step: the optimizer state:
          - 0.0.v is only in this optimizer's state
          - 0.0.w is only in this optimizer's state
          - 0.0 is only in the state's
          - 0.1.v is only in the state's
          - 0.1.w is only in the state's
          - 0.2.v is only in the state's
          - 0.2.w is only in the state's
          Fix: give ft.TrainState.create and ft.train_step the same optimizer""",
    ),
    "a step of a state that was donated": (
        lambda: step(lambda p: (p["w"][0, 0], 1), state=USED),
        ft.DonatedError,
        """\
        ft.train_step: the state:
          - params.w was donated to step 0 of ft.train_step: its buffer holds newer values now
          - opt_state.0.0 was donated to step 0 of ft.train_step: its buffer holds newer values now
          - opt_state.0.1.w was donated to step 0 of ft.train_step: its buffer holds newer values now
          - opt_state.0.2.w was donated to step 0 of ft.train_step: its buffer holds newer values now
          Fix: use the state that the step returned, clone what you keep, or make the step with donate=False""",
    ),
    "a loss without a count": (
        lambda: step(lambda p: p["w"][0, 0]),
        ft.FunctitanError,
        """\
        ft.train_step: the loss function:
          - it returned float32[]
          Fix: return (sum, count), scalars over the whole batch: (ft.reduce('batch seq ->', loss), tokens); or \
(those, aux)""",
    ),
    "a loss of each example": (
        lambda: step(lambda p: (p["w"][0], 3)),
        ft.FunctitanError,
        """\
        ft.train_step: the loss function:
          - it returned (float32[3], 3)
          Fix: return (sum, count), scalars over the whole batch: (ft.reduce('batch seq ->', loss), tokens); or \
(those, aux)""",
    ),
    "a count that is none": (
        lambda: step(lambda p: (p["w"][0, 0], None)),
        ft.FunctitanError,
        """\
        ft.train_step: the loss function:
          - it returned (float32[], a value of type 'NoneType')
          Fix: return (sum, count), scalars over the whole batch: (ft.reduce('batch seq ->', loss), tokens); or \
(those, aux)""",
    ),
    "a stream of nothing": (
        lambda: ft.data.token_stream("abc", "bytes", 0, -1),
        ft.FunctitanError,
        """\
        token_stream:
          - documents is a str, not a dataset as Dataset.from_dict makes it
          - seq_len=0 is not an int >= 1
          - batch_size=-1 is not an int >= 1
          - encoding is a str, not a tiktoken Encoding as data.encoding makes it
          Fix: write as in token_stream(stdlib_documents(), byte_encoding(), seq_len=256, batch_size=8)""",
    ),
    "an encoding that is none": (
        lambda: ft.data.encoding("gtp2"),
        ft.FunctitanError,
        """\
        encoding('gtp2'):
          - it is neither a name (did you mean 'gpt2'?) nor a file
          Fix: give a file, in which each line is a base64 token, a rank, or one of ['bytes', 'gpt2', \
'r50k_base', 'p50k_base', 'p50k_edit', 'cl100k_base', 'o200k_base', 'o200k_harmony']""",
    ),
    "a Llama whose heads do not group": (
        lambda: llama.params(llama.DEBUG._replace(num_heads=7, head_dim=33)),
        ft.FunctitanError,
        """\
        LlamaConfig:
          - num_heads 7 is not a multiple of num_kv_heads 4
          - head_dim 33 is odd: rotary positions turn pairs
          Fix: begin with one of llama.CONFIGS, and use _replace""",
    ),
    "a Llama without layers": (
        lambda: llama.params(llama.DEBUG._replace(num_layers=-2, embed=1.5)),
        ft.FunctitanError,
        """\
        LlamaConfig:
          - embed is 1.5: it must be a whole number of at least 1
          - num_layers is -2: it must be a whole number of at least 1
          Fix: begin with one of llama.CONFIGS, and use _replace""",
    ),
    "a Llama's parameters under another config": (
        lambda: llama.apply(LLAMA, TOKENS, CONFIG._replace(num_layers=1, tied=True)),
        ft.FunctitanError,
        """\
        llama.apply:
          - layers.1.attention.k is only in the parameters
          - layers.1.attention.out is only in the parameters
          - layers.1.attention.q is only in the parameters
          - layers.1.attention.v is only in the parameters
          - layers.1.attention_norm.scale is only in the parameters
          - layers.1.mlp.down is only in the parameters
          - layers.1.mlp.gate is only in the parameters
          - layers.1.mlp.up is only in the parameters
          - and 2 more
          Fix: give the config that the parameters were declared with: ft.init(llama.params(config), key)""",
    ),
    "a batch without labels": (
        lambda: llama.loss(LLAMA, {"tokens": TOKENS}, CONFIG),
        ft.FunctitanError,
        """\
        llama.loss: the batch:
          - there is no 'labels'
          Fix: give {'tokens': ..., 'labels': ...}, 'batch seq'""",
    ),
    "a GPT-2 whose heads do not share its embedding": (
        lambda: gpt2.params(gpt2.DEBUG._replace(num_heads=7)),
        ft.FunctitanError,
        """\
        GPT2Config:
          - embed 256 is not a multiple of num_heads 7
          Fix: begin with one of gpt2.CONFIGS, and use _replace""",
    ),
    "a GPT-2 of Llama's parameters": (
        lambda: gpt2.loss(LLAMA, {"tokens": TOKENS, "labels": TOKENS}, gpt2.GPT2Config(8, 2, 8, 1, 2)),
        ft.FunctitanError,
        """\
        gpt2.apply:
          - layers.0.attention.k_bias is only in this config
          - layers.0.attention.out_bias is only in this config
          - layers.0.attention.q_bias is only in this config
          - layers.0.attention.v_bias is only in this config
          - layers.0.attention_norm.bias is only in this config
          - layers.0.mlp.down_bias is only in this config
          - layers.0.mlp.up_bias is only in this config
          - layers.0.mlp_norm.bias is only in this config
          - and 13 more
          Fix: give the config that the parameters were declared with: ft.init(gpt2.params(config), key)""",
    ),
    "a batch of GPT-2 without tokens": (
        lambda: gpt2.loss(LLAMA, {"labels": TOKENS}, gpt2.DEBUG),
        ft.FunctitanError,
        """\
        gpt2.loss: the batch:
          - there is no 'tokens'
          Fix: give {'tokens': ..., 'labels': ...}, 'batch seq'""",
    ),
}
