"""Mistakes in rules, declarations, and meshes: the call, the kind of error, its whole text."""

from __future__ import annotations

import functitan as ft
from user_errors.given import RULES, inside, on

MISTAKES = {
    "rules that cannot be": (
        lambda: ft.AxisRules({"layer": "pp", "a b": "tp", "c": 3, "d": ("tp", "tp"), "e": "dp,fsdp"}),
        ft.RulesError,
        """\
        AxisRules:
          - rule 'layer': 'pp' carries pipeline stages, which run different programs; no axis maps to it
          - 'a b' is not an axis name: letters, digits and '_', beginning with a letter
          - rule 'c': 3 is neither a mesh dim, nor a tuple of them, nor None
          - rule 'd': a mesh dim stands twice in ('tp', 'tp')
          - rule 'e': 'dp,fsdp' is not a mesh dim's name
          Fix: write rules as in AxisRules({'batch': ('dp', 'fsdp'), 'mlp': 'tp', 'head_dim': None})""",
    ),
    "rules that are no table": (
        lambda: ft.AxisRules("batch: dp"),
        ft.RulesError,
        """\
        AxisRules:
          - a str is no table
          Fix: write rules as in AxisRules({'batch': ('dp', 'fsdp'), 'mlp': 'tp', 'head_dim': None})""",
    ),
    "rules that misspell mesh dims": (
        lambda: inside(lambda: None, ft.AxisRules({"batch": "fdsp", "embed": ("tp", "modle")}), fsdp=2, model=2),
        ft.RulesError,
        """\
        AxisRules on this mesh:
          - rule 'batch': unknown mesh dim 'fdsp' (did you mean 'fsdp'?); this mesh has ['fsdp', 'model']
          - rule 'embed': unknown mesh dim 'modle' (did you mean 'model'?); this mesh has ['fsdp', 'model']
          Fix: use one of the mesh's dims, or None""",
    ),
    "a declaration that fits nothing": (
        lambda: ft.Param("embed mlp", (4, 0, 2.5), init=0.02, dtype="float32"),
        ft.PatternError,
        """\
        Param('embed mlp', (4, 0, 2.5)):
          - the pattern names 2 axes, the shape has 3: (4, 0, 2.5)
          - 0 is not a size: a whole number of at least 1
          - 2.5 is not a size: a whole number of at least 1
          - init is 0.02, not a function such as ft.param.normal(0.02)
          - dtype is 'float32', not a dtype of torch
          Fix: write as in ft.Param('embed mlp', (256, 768)): one size for each name, in order""",
    ),
    "a declaration with commas": (
        lambda: ft.Param("embed, mlp", (4, 3)),
        ft.PatternError,
        """\
        pattern 'embed, mlp':
          - 'embed,' in 'embed, mlp' is not an axis name: letters, digits and '_', beginning with a letter
          Fix: name each axis once, with spaces between, as in 'batch seq embed'""",
    ),
    "sizes of a mesh that are none": (
        lambda: ft.simulate(fsdp=0, tp="2", dp=-1),
        ft.MeshError,
        """\
        mesh {'fsdp': 0, 'tp': '2', 'dp': -1}:
          - mesh dim 'fsdp' has size 0: a size is a whole number of at least 1
          - mesh dim 'tp' has size '2': a size is a whole number of at least 1
          - mesh dim 'dp' has size -1: a size is a whole number of at least 1
          Fix: write sizes as in dict(fsdp=4, tp=2)""",
    ),
    "a mesh with two sizes to infer": (
        lambda: ft.make_mesh(fsdp=-1, tp=-1),
        ft.MeshError,
        """\
        mesh {'fsdp': -1, 'tp': -1}:
          - the sizes of ['fsdp', 'tp'] are -1: one alone can be inferred
          Fix: give the others""",
    ),
    "a mesh that the processes do not fill": (
        lambda: ft.make_mesh(fsdp=2, tp=4),
        ft.MeshError,
        """\
        mesh {'fsdp': 2, 'tp': 4}:
          - its sizes multiply to 8, but the number of processes is 1
          Fix: start 8 processes (torchrun --nproc-per-node=8, ft.launch), choose sizes whose product is 1, or \
run on threads with ft.simulate""",
    ),
    "a mesh whose rest is no whole number": (
        lambda: ft.make_mesh(fsdp=-1, tp=3),
        ft.MeshError,
        """\
        mesh {'fsdp': -1, 'tp': 3}:
          - its sizes multiply to 3, which does not divide the number of processes, 1: fsdp has no size
          Fix: start 3 processes (torchrun --nproc-per-node=3, ft.launch), choose sizes whose product is 1, or \
run on threads with ft.simulate""",
    ),
    "a device and a timeout that are none": (
        lambda: ft.make_mesh(fsdp=1, device_type="gpu", timeout=-1),
        ft.MeshError,
        """\
        ft.make_mesh:
          - timeout is -1: it must be more than 0 seconds
          - torch has no device 'gpu'
          Fix: write as in make_mesh(fsdp=2, device_type='cuda', timeout=60)""",
    ),
    "an unknown backend": (
        lambda: ft.make_mesh(fsdp=1, backend="glo"),
        ft.MeshError,
        """\
        ft.make_mesh:
          - torch.distributed has no backend 'glo'; it has ['undefined', 'gloo', 'nccl', 'xccl', 'ucc', 'mpi', \
'fake']
          Fix: choose one of them, or register it with torch first""",
    ),
    "a mesh that is none": (
        lambda: ft.spmd(lambda: None, mesh={"fsdp": 2}, rules=RULES),
        ft.MeshError,
        """\
        mesh:
          - {'fsdp': 2} is a dict
          Fix: make one by ft.make_mesh(fsdp=2, tp=2), or run under ft.simulate(fsdp=2, tp=2)""",
    ),
    "a mesh without rules": (
        lambda: ft.spmd(lambda: None, mesh=on(fsdp=2)),
        ft.MeshError,
        """\
        ft.spmd:
          - rules is None
          Fix: give a table: rules=ft.AxisRules({...})""",
    ),
    "rules that are a dict": (
        lambda: ft.spmd(lambda: None, mesh=None, rules={"batch": "fsdp"}),
        ft.MeshError,
        """\
        ft.spmd:
          - rules is {'batch': 'fsdp'}
          Fix: give a table: rules=ft.AxisRules({...})""",
    ),
    "a call in place of a function": (
        lambda: ft.simulate(fsdp=2)(print(end="")),
        ft.FunctitanError,
        """\
        ft.simulate(...):
          - it wraps a function, not a value of type 'NoneType'
          Fix: write ft.simulate(...)(fn, ...), and call what it returns""",
    ),
    "no number of processes": (
        lambda: ft.launch(max, nprocs=0),
        ft.FunctitanError,
        """\
        ft.launch of <built-in function max>:
          - nprocs is 0: a whole number of at least 1
          Fix: call it as ft.launch(train, config, nprocs=2), where train is defined at the top level of a \
module and gets what it needs as arguments""",
    ),
}
