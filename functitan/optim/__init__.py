"""Optimizers as gradient transformations, in optax's form."""

from functitan.optim.adafactor import adafactor, scale_by_param_block_rms
from functitan.optim.adam import AdamState, adamw, scale_by_adam
from functitan.optim.clip import ClipState, clip_by_block_rms, clip_by_global_norm, clip_grads
from functitan.optim.factored import FactoredState, scale_by_factored_rms
from functitan.optim.lion import LionState, lion, scale_by_lion
from functitan.optim.loss_scale import LossScaleState, dynamic_loss_scale, loss_scale
from functitan.optim.masked import masked, multi_transform
from functitan.optim.muon import muon, orthogonalized, scale_by_muon
from functitan.optim.norms import global_norm
from functitan.optim.rounded import RoundedState, bfloat16_state, stochastic_round
from functitan.optim.schedules import (
    Schedule,
    constant,
    cosine,
    linear,
    piecewise,
    warmup_cosine,
    warmup_stable_decay,
)
from functitan.optim.sgd import MomentumState, scale_by_momentum, sgd
from functitan.optim.stored import stored
from functitan.optim.transform import (
    GradientTransformation,
    ScheduleState,
    add_decayed_weights,
    apply_updates,
    chain,
    decay_matrices,
    identity,
    scale,
    scale_by_learning_rate,
)

__all__ = [
    "AdamState",
    "ClipState",
    "FactoredState",
    "GradientTransformation",
    "LionState",
    "LossScaleState",
    "MomentumState",
    "RoundedState",
    "Schedule",
    "ScheduleState",
    "adafactor",
    "adamw",
    "add_decayed_weights",
    "apply_updates",
    "bfloat16_state",
    "chain",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_grads",
    "constant",
    "cosine",
    "decay_matrices",
    "dynamic_loss_scale",
    "global_norm",
    "identity",
    "linear",
    "lion",
    "loss_scale",
    "masked",
    "multi_transform",
    "muon",
    "orthogonalized",
    "piecewise",
    "scale",
    "scale_by_adam",
    "scale_by_factored_rms",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_momentum",
    "scale_by_muon",
    "scale_by_param_block_rms",
    "sgd",
    "stochastic_round",
    "stored",
    "warmup_cosine",
    "warmup_stable_decay",
]
