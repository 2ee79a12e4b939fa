"""What evolves in training, and what gives it its meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from ..comm.exchange import PIECE_BYTES, choose
from ..comm.node import Node
from ..comm.transport import Purpose, Transport
from ..rules import AdamW, Difference, Rule
from ..wire.codec import message_bytes
from ..wire.compressors import DENSE, SIGN, Compressor
from ..wire.plan import Placement, place
from .settings import Settings
from .weights import Weights

MOST_SHARDED = 16  # ranks up to which the sharded form of full step ahead was better than none; of 32 and 64 it was not


class Context(NamedTuple):
    """What is fixed until what is trained changes, and a memory's numbers refer to.

    Attributes:
        weights: names, shapes and order of the parameters; x.
        settings: compressors and the like. rule: whose vectors `Memory.m` holds.
        placement: which rank serves which blocks.
        transport: the workers; where these are nodes, the ranks of the same place in each. node: this worker's ranks.
        piece_numel: coordinates in one message where replies travel beside the messages that follow; None where they do
            not: a short message has none that follow.
    """

    weights: Weights
    settings: Settings
    rule: Rule
    placement: Placement
    transport: Transport
    node: Node
    piece_numel: int | None

    @classmethod
    def create(cls, weights: Weights, settings: Settings, rule: Rule, transport: Transport, node: Node) -> Context:
        """Choose the strategy, and which rank serves which blocks."""
        up, down = weights.codes(settings.compressor), weights.codes(settings.reply_compressor)
        strategy, sizes = settings.exchange, [message_bytes(c, weights.numels, weights.dtype) for c in (up, down)]
        if strategy == "auto":
            strategy = choose(transport.size, *(int(max(node.gather(size))) for size in sizes))  # alike in all places
        at = place(weights.numels, weights.groups, up, down, strategy, transport.size, transport.rank)
        long = transport.pipelines and sizes[0] > PIECE_BYTES
        piece_numel = max(1, PIECE_BYTES * sum(weights.numels) // sizes[0]) if long else None
        return cls(weights, settings, rule, at, transport, node, piece_numel)

    @property
    def serves_with_error(self) -> bool:
        """Whether servers keep an error: not where all they send is uncompressed, D - C(D) = 0."""
        return self.settings.feedback and not self._exact(self.settings.reply_compressor)

    @property
    def owes(self) -> bool:
        """Whether any error can be other than 0: not where all that travels is uncompressed."""
        exact = self._exact(self.settings.compressor) and self._exact(self.settings.reply_compressor)
        return self.settings.feedback and not exact

    @property
    def server_ahead(self) -> float:
        """s' of `saef.step.server_ahead`; 0 where the server's error is not stepped ahead by, or there is none."""
        chosen, ranks = self.settings.server_step_ahead, self.transport.size
        sharded = self.placement.strategy == "sharded"
        if chosen == "auto":
            kinds = {code.kind for code in self.weights.codes(self.settings.compressor)}
            signs = SIGN in kinds and kinds <= {SIGN, DENSE}
            chose = self.settings
            single = isinstance(self.rule, Difference) and chose.local_steps == 1 and not chose.overlap
            chosen = (isinstance(self.rule, AdamW) or single) and signs and (not sharded or ranks <= MOST_SHARDED)
        if not chosen or not self.serves_with_error:
            return 0.0
        return self.settings.step_ahead * (ranks if sharded else 1)

    @property
    def clips(self) -> bool:
        """Whether what is sent is clipped: all of it must be there first. Before local steps gradients are, alone."""
        return self.settings.max_grad_norm is not None and self.rule.of_gradients

    def _exact(self, compressor: Compressor) -> bool:
        return all(code.kind == DENSE and not code.half for code in self.weights.codes(compressor))


@final
@dataclass(slots=True)
class Memory:
    """All that evolves besides x. Written by the step's commit, by averaging, and by loading a checkpoint.

    Vectors are flat, of the state's dtype, in the order of `Weights`: d coordinates. Those that the method does not
    have are empty.
    """

    # Error feedback, in parameter units.
    e: Tensor  # [d] e_k, what this worker has not sent yet
    e_server: Tensor  # [served] e, what the server has not sent yet, for the blocks that this rank serves

    # The local rule, in gradient units.
    m: Tensor  # [S, d] what the rule keeps of this worker's gradients: a momentum; AdamW's m and v
    m_decay: Tensor  # [d] m~, the momentum of a decay at x; the same on every rank

    # The outer optimizer, in parameter units.
    outer: Tensor  # [d] b, its momentum; the same on every rank

    # Counters.
    steps: int = 0  # t, exchanges committed
    skipped: int = 0  # steps skipped
    skipped_in_a_row: int = 0  # those since the last commit
    counted_from: int = 0  # the step since when bytes are counted

    @classmethod
    def create(cls, context: Context) -> Memory:
        """Before the first step: errors zero, the rule's vectors not there yet."""
        like = context.weights.flat
        blocks, rank = context.placement.blocks, context.placement.rank
        served = blocks.served[rank] if context.serves_with_error else 0
        return cls(
            e=torch.zeros_like(like) if context.settings.feedback else like.new_empty(0),
            e_server=like.new_zeros(served),
            m=like.new_empty(0, like.numel()),
            m_decay=like.new_empty(0),
            outer=like.new_empty(0) if context.settings.outer is None else torch.zeros_like(like),
        )

    def grow(self, vectors: int, decay: bool) -> None:
        """Make room for what a rule keeps now; what is there stays.

        Args:
            vectors: S.
            decay: whether m~ is kept.
        """
        kept, numel = self.m.shape
        if vectors > kept:
            grown = self.m.new_zeros(vectors, numel)
            grown[:kept] = self.m
            self.m = grown
        if decay and not self.m_decay.numel():
            self.m_decay = self.m_decay.new_zeros(numel)

    def commit(self, error_decay: float) -> None:
        """A step has happened. All errors are multiplied by `error_decay`."""
        if error_decay != 1.0:
            self.e.mul_(error_decay)
            self.e_server.mul_(error_decay)
        self.steps += 1
        self.skipped_in_a_row = 0

    def skip(self) -> None:
        """A step has not happened, on any rank."""
        self.skipped += 1
        self.skipped_in_a_row += 1

    def owe_nothing(self) -> None:
        """Errors <- 0: x has taken them over."""
        self.e.zero_()
        self.e_server.zero_()

    def count_from(self, steps: int, skipped: int, in_a_row: int, counted_from: int) -> None:
        """The counters of a checkpoint."""
        self.steps, self.skipped, self.skipped_in_a_row, self.counted_from = steps, skipped, in_a_row, counted_from


def all_server_errors(memory: Memory, context: Context, purpose: Purpose) -> Tensor:
    """The server errors of all blocks, flat like e; empty if there are none. Collective, in `Transport.call`."""
    weights, placement = context.weights, context.placement
    if placement.strategy == "replicated" or not context.serves_with_error:
        return memory.e_server.clone()
    blocks, dtype = placement.blocks, weights.dtype
    sizes = [n * dtype.itemsize for n in blocks.served]
    every = context.transport.all_gather(memory.e_server.view(torch.uint8), sizes, purpose).view(dtype)
    server = torch.zeros_like(weights.flat)
    for owner, error in enumerate(every.split(blocks.served)):
        for block in blocks.served_by(owner):
            server[block.state : block.state + block.numel] = error[block.served : block.served + block.numel]
    return server


def own_server_errors(server: Tensor, placement: Placement) -> Sequence[tuple[slice, Tensor]]:
    """Of server errors that are flat like e, those of the blocks that this rank serves: (where in e_server, values)."""
    return [
        (slice(b.served, b.served + b.numel), server[b.state : b.state + b.numel])
        for b in placement.blocks.served_by(placement.rank)
    ]
