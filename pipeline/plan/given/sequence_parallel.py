"""Values of `sequence_parallel_size` that a model and its ranks allow.

The setting is the number of ranks that work on a sequence together. Outside attention each of them
has a part of the tokens. Within attention it has all tokens, but only a part of the heads
(model/ulysses.py).
"""

from math import gcd

from pipeline.errors import UserError
from pipeline.plan.given.class_proof import Proof, reason_against_packs
from pipeline.plan.given.shape import ModelShape


def sizes_by_heads(shape: ModelShape) -> list[int]:
    """The sizes that divide the number of query heads of every block.

    Key heads set no limit, because they are replicated (model/ulysses.py).
    """
    heads = gcd(*(block.num_heads for block in shape.blocks))
    return [size for size in range(1, heads + 1) if heads % size == 0]


def sizes_by_ranks(nodes: int, ranks_per_node: int) -> list[int]:
    """The sizes of groups of consecutive ranks, within a node or over whole nodes."""
    world_size = nodes * ranks_per_node
    within = [size for size in range(1, ranks_per_node + 1) if ranks_per_node % size == 0]
    across = range(2 * ranks_per_node, world_size + 1, ranks_per_node)
    return within + [size for size in across if world_size % size == 0]


def key_copies(num_kv_heads: int, size: int) -> int:
    """Number of copies of each key head, so that all ranks of a group have equally many key heads.

    1 if `size` divides `num_kv_heads`.
    """
    return size // gcd(size, num_kv_heads)


def require_groups(size: int, nodes: int, ranks_per_node: int) -> None:
    """Raise UserError if the ranks cannot be divided into groups as in `sizes_by_ranks`."""
    possible = sizes_by_ranks(nodes, ranks_per_node)
    if size not in possible:
        machine = f"{nodes} nodes with {ranks_per_node} ranks each"
        if nodes == 1:
            machine = f"a node with {ranks_per_node} ranks"
        raise UserError(
            f"sequence_parallel_size: {size}: {machine} cannot be divided into groups of this size "
            "that lie within a node or consist of whole nodes; possible: "
            f"{', '.join(map(str, possible))}"
        )


def reason_against_split(shape: ModelShape, proof: Proof | None) -> str:
    """Why a sequence of this model cannot be split over ranks; empty if it can be.

    A sequence can be split if the tokens of each block depend on each other only in its attention.
    The same condition holds for packing documents in a sequence.
    """
    reason = reason_against_packs(shape, proof)
    if not reason or not shape.mixing_modules:
        return reason
    mixing = shape.num_layers - (shape.separate_blocks or 0)
    return (
        f"{mixing} of {shape.num_layers} blocks of this {shape.model_type} model have "
        f"{', '.join(shape.mixing_modules)}"
    )
