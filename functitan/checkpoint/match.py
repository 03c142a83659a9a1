"""Whether a checkpoint has the leaves that are asked for, as they are asked for.

Invariant: a leaf is one value of all ranks, or of each rank's own, as it was saved; every other one is named at once.
"""

from __future__ import annotations

from functitan.checkpoint.dcp import Entry
from functitan.checkpoint.leaves import Leaf, described, whose, world_of
from functitan.errors import CheckpointError, report
from functitan.sharding.mesh import Mesh


def check_same(what: str, leaves: list[Leaf], entries: dict[str, Entry], mesh: Mesh | None, partial: bool) -> None:
    """Raise `CheckpointError` that lists each leaf which differs, or which one of the two has alone."""
    problems, fixes = [], []
    ranks_of = {its[0]: its[2] for its in map(whose, entries) if its is not None}
    for leaf in leaves:
        entry, mine = entries.get(leaf.name(mesh)), described(leaf.shape, leaf.dtype)
        ranks = ranks_of.get(leaf.path)
        if entry is None and ranks and (not leaf.own or ranks != world_of(mesh)):
            here = f"here are {world_of(mesh)}" if leaf.own else "here it is asked for as one value of all ranks"
            problems.append(f"{leaf.path} is each rank's own, of {ranks} ranks, and {here}")
            fixes.append(_FIX_OWN)
        elif entry is None and leaf.own and leaf.path in entries:
            problems.append(f"{leaf.path} is one value of all ranks in the checkpoint, and not each rank's own")
            fixes.append(_FIX_SHARED)
        elif entry is None:
            problems.append(f"{leaf.path} {mine} is not in the checkpoint")
            fixes.append(FIX_OTHER)
        elif (leaf.shape, leaf.dtype) != (entry.shape, entry.dtype):
            problems.append(f"{leaf.path} is {mine}, in the checkpoint {described(entry.shape, entry.dtype)}")
            fixes.append(FIX_OTHER)
    if not partial:
        known, rank = {leaf.path for leaf in leaves}, mesh.rank if mesh else 0
        rest = {}
        for name, entry in entries.items():
            path, owner, ranks = whose(name) or (name, rank, world_of(mesh))
            if path not in known and (ranks != world_of(mesh) or owner == rank):  # another's tree may be another
                rest[path] = f"{path} {described(entry.shape, entry.dtype)} is only in the checkpoint"
        problems += rest.values()
        fixes += [FIX_OTHER] * len(rest)
    if problems:
        raise CheckpointError(report(what, problems, "; ".join(dict.fromkeys(fixes))))


_FIX_OWN = (
    "restore it by patterns={...: ft.checkpoint.per_rank}, on as many ranks as saved it; "
    "restore(path, None) gives what each of them had"
)
_FIX_SHARED = "leave out ft.checkpoint.per_rank there, and every rank has that value"
FIX_OTHER = (
    "give like= the structure that was saved: the same model, optimizer and dict around them; partial=True takes a part"
)
