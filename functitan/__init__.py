"""Functional SPMD training in pure PyTorch: every tensor axis has a name, and one table maps names to mesh dims."""

from typing import TYPE_CHECKING

from functitan import checkpoint, metrics, models, nn, optim, pipeline, random, testing, tree
from functitan.attention.context_parallel import context_parallel, zigzag
from functitan.attention.op import attention
from functitan.axes import parse_axes
from functitan.capture.jit import jit
from functitan.capture.regional import compile
from functitan.errors import (
    CaptureError,
    CheckpointError,
    CollectiveError,
    DonatedError,
    FunctitanError,
    LayoutError,
    MeshError,
    NonFiniteError,
    PatternError,
    PeerCheckpointError,
    ReplicationError,
    RulesError,
    ScheduleError,
)
from functitan.float8.wrapper import float8
from functitan.frozen import trainable
from functitan.module import from_module
from functitan.ops.dropout import dropout
from functitan.ops.einsum import einsum
from functitan.ops.linear_loss import linear_cross_entropy
from functitan.ops.lookup import iota, select, sizes, take
from functitan.ops.loss import cross_entropy
from functitan.ops.move import constrain, reshard, shard, unshard
from functitan.ops.norm import layer_norm, rms_norm
from functitan.ops.rearrange import rearrange
from functitan.ops.reduce import broadcast, count, reduce
from functitan.overlap.async_tp import async_tp
from functitan.param import Param
from functitan.profiling import profile
from functitan.remat import policies as remat_policies
from functitan.remat.checkpoint_name import checkpoint_name
from functitan.remat.wrapper import remat
from functitan.sharding.context import as_mesh, record, spmd
from functitan.sharding.distributed import make_mesh
from functitan.sharding.explain import explain
from functitan.sharding.init import init
from functitan.sharding.launch import launch
from functitan.sharding.rules import AxisRules
from functitan.sharding.simulate import simulate
from functitan.state import TrainState
from functitan.train import train_step
from functitan.transforms.accumulate import accumulate
from functitan.transforms.checked import check_equal, checked
from functitan.transforms.grad import grad, hvp, jvp, value_and_grad
from functitan.transforms.precision import precision
from functitan.transforms.vmap import vmap

if TYPE_CHECKING:
    from functitan import data

__all__ = [
    "AxisRules",
    "CaptureError",
    "CheckpointError",
    "CollectiveError",
    "DonatedError",
    "FunctitanError",
    "LayoutError",
    "MeshError",
    "NonFiniteError",
    "Param",
    "PatternError",
    "PeerCheckpointError",
    "ReplicationError",
    "RulesError",
    "ScheduleError",
    "TrainState",
    "accumulate",
    "as_mesh",
    "async_tp",
    "attention",
    "broadcast",
    "check_equal",
    "checked",
    "checkpoint",
    "checkpoint_name",
    "compile",
    "constrain",
    "context_parallel",
    "count",
    "cross_entropy",
    "data",
    "dropout",
    "einsum",
    "explain",
    "float8",
    "from_module",
    "grad",
    "hvp",
    "init",
    "iota",
    "jit",
    "jvp",
    "launch",
    "layer_norm",
    "linear_cross_entropy",
    "make_mesh",
    "metrics",
    "models",
    "nn",
    "optim",
    "parse_axes",
    "pipeline",
    "precision",
    "profile",
    "random",
    "rearrange",
    "record",
    "reduce",
    "remat",
    "remat_policies",
    "reshard",
    "rms_norm",
    "select",
    "shard",
    "simulate",
    "sizes",
    "spmd",
    "take",
    "testing",
    "train_step",
    "trainable",
    "tree",
    "unshard",
    "value_and_grad",
    "vmap",
    "zigzag",
]


def __getattr__(name: str):
    if name == "data":  # its own import of `datasets` takes a second or two
        import importlib

        return importlib.import_module("functitan.data")
    raise AttributeError(f"module 'functitan' has no attribute {name!r}")
