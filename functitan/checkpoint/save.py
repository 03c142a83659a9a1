"""`ft.checkpoint.save`: a tree of shards as one checkpoint in the format of torch.distributed.checkpoint.

Invariant: a rank writes its shards and nothing more; no tensor is gathered. What `save` returns from is on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from functitan import tree
from functitan.checkpoint.compare import check_replicas
from functitan.checkpoint.files import Place, clear_errors, is_complete, is_empty, locate
from functitan.checkpoint.leaves import Leaf, device_among, leaves_of, mesh_of
from functitan.checkpoint.write import Part, announce, part_of, write_part
from functitan.errors import CaptureError, CheckpointError, CollectiveError, FunctitanError, PeerCheckpointError, report
from functitan.param import Param
from functitan.reading import path_text
from functitan.sharding.context import current
from functitan.sharding.mesh import Mesh, is_seconds
from functitan.sharding.rules import AxisRules
from functitan.transforms.donate import check_donated

TIMEOUT_S = 600.0


def save(
    path: str | os.PathLike,
    state: tree.Tree,
    *,
    patterns: tree.Tree = None,
    mesh: Mesh | DeviceMesh | None = None,
    rules: AxisRules | None = None,
    timeout: float = TIMEOUT_S,
) -> None:
    """Write this rank's part of a tree, together with all other ranks of its mesh, to the new directory `path`.

    `state` is a tree of this rank's shards and of bool, int, float and str, such as {"train": a `TrainState`, "cursor":
    a `Cursor`}. `path` is a local path or an fsspec URL; ranks in several processes need a file system they share.
    `patterns` is a tree or a prefix of patterns and `Param`s (`None`: equal on every rank); `TrainState`s know their
    own, and their mesh and rules. `ft.checkpoint.per_rank` among them says that each rank has a leaf or a subtree of
    its own, such as the place of a data loader: as many ranks get it back. The ranks of a pipeline stage give its
    leaves alone, as `ft.pipeline.declarations` declares them, and the checkpoint is as if there were no pipeline.
    `timeout` in seconds ends the wait for a rank that does not write.

    The directory is there once it is whole, and torch's own tools read it (`dcp_to_torch_save`): keys are the leaves'
    paths. Raises `CheckpointError` on every rank if one cannot write, if there is such a checkpoint already, or if
    ranks differ in their leaves, or in a value that is saved once for all of them: nothing is written then.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/first", {"w": torch.ones(2, 3), "step": 7})
    ...     sorted(os.listdir(f"{folder}/first"))
    ['.metadata', '__0_0.distcp', 'checksums.json']
    """
    check_timeout("ft.checkpoint.save", timeout)
    place, part = begin(path, state, patterns, mesh, rules)
    write_part(place, part, timeout)


def begin(
    path: str | os.PathLike,
    state: tree.Tree,
    patterns: tree.Tree,
    mesh: Mesh | DeviceMesh | None,
    rules: AxisRules | None,
    marks: dict[str, bytes] | None = None,
) -> tuple[Place, Part]:
    """All that ranks must agree on before they write: an empty hidden directory, and who writes what."""
    what = f"ft.checkpoint.save to {path_text('ft.checkpoint.save', path)}"
    if current().is_captured:  # its tensors have no values, and the other ranks would not come
        problem = "it is called inside a function that is being captured"
        raise CaptureError(report(what, [problem], "save what the captured function returns"))
    check_donated(state, what, ())
    place, known = locate(path), mesh_of(state, mesh)

    def clear() -> list[Leaf]:
        leaves, _ = leaves_of(what, state, patterns, mesh, rules)
        lost = [f"{x.path} is on the device meta" for x in leaves if isinstance(x.value, Tensor) and x.value.is_meta]
        lost += [f"{x.path or 'the value'} is a Param" for x in leaves if isinstance(x.value, Param)]
        if lost:
            raise CheckpointError(report(what, lost, "save the values that were made: ft.TrainState.create, ft.init"))
        if is_complete(place) or (place.local and not is_empty(place)):
            raise CheckpointError(report(what, ["it is there already"], "choose another path, or remove it"))
        return leaves

    def make() -> None:
        if known is None or known.rank == 0:
            with clear_errors(what, "choose a directory that can be written"):
                announce(place, marks or {})

    leaves = together(known, f"is about to save {place.name}", clear)
    if known is not None:
        check_replicas(what, leaves, known, device_among(leaf.value for leaf in leaves))
    together(known, f"saves {place.name}", make)
    return place, part_of(leaves, known, marks or {})


def check_timeout(what: str, timeout: Any) -> None:
    """Raise `FunctitanError` unless it is a number of seconds."""
    if not is_seconds(timeout):
        raise FunctitanError(report(what, [f"timeout is {timeout!r}"], "give seconds, more than 0"))


def together(mesh: Mesh | None, does: str, work: Callable[[], Any]) -> Any:
    """`work()` on every rank: returns once all have done it, raises on all if one cannot."""
    try:
        result = work()
    except Exception as error:
        if mesh is not None:
            mesh.transport.agree(f"fails: {error}", wait=False, everyone=True)
        raise
    if mesh is not None:
        try:
            mesh.transport.agree(does, everyone=True)
        except CollectiveError as error:
            problems = [line.strip(" -") for line in str(error).splitlines() if "Fix:" not in line]
            what = f"rank {mesh.rank} {does}"
            raise PeerCheckpointError(report(what, problems, "see the rank that failed")) from error
    return result
