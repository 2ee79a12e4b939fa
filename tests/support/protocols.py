"""The protocols that tests go through, and what is known of them by hand."""

from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

import saef
from support import reference

TORUS = np.zeros((8, 8))  # 2 x 4 workers, each hears of three others: doubly stochastic, not symmetric
for _k in range(8):
    TORUS[_k, [_k, (_k + 1) % 4 + _k // 4 * 4, (_k - 1) % 4 + _k // 4 * 4, (_k + 4) % 8]] = [0.4, 0.3, 0.2, 0.1]

PROTOCOLS = [
    saef.AllReduce(1),
    saef.AllReduce(3),
    saef.LocalStep(2),
    saef.Rotating(3),
    saef.Slack(0.3),
    saef.Slack(1),
    saef.Slack(0.05, period=2),
    saef.Ring(),
    saef.Ring(period=2),
    saef.AsyncRing(),
    saef.AsyncRing(seed=7, period=2),
    saef.AsyncParameterServer(seed=5),
]
PER_WORKERS = {  # graphs are for one number of workers
    2: [*PROTOCOLS, saef.Gossip([[0.9, 0.1], [0.1, 0.9]]), saef.Gossip([[0.9, 0.1], [0.5, 0.5]])],
    4: [*PROTOCOLS, saef.Gossip([[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5], [0, 0, 0.5, 0.5]])],
    8: [*PROTOCOLS, saef.Gossip(TORUS), saef.Gossip(TORUS, period=3)],
}


def first(protocol: saef.Averaging, n: int, count: int, part: int = 0) -> list[Any]:
    return list(islice(protocol.operators(n, part), count))


def meetings_of(seed: int) -> Any:
    """AsyncRing's convention by hand: worker raw_i mod n of Philox(seed, t) meets its right neighbour."""

    def meetings(t: int, n: int) -> list[list[int]]:
        raw = np.random.Philox(key=np.array([seed, t], dtype=np.uint64)).random_raw(n)
        return [sorted((int(r) % n, (int(r) + 1) % n)) for r in raw.tolist()]

    return meetings


def expected(protocol: saef.Averaging, X: Tensor, steps: int) -> Tensor:
    """What some steps from step 0 make of the workers' states, the rows of X, by the operators."""
    n, d, out = len(X) - protocol.parameter_servers, X.shape[1], X.numpy().copy()
    for part in range(protocol.parts):
        columns = slice(d * part // protocol.parts, d * (part + 1) // protocol.parts)
        for M in first(protocol, n, n * steps, part):
            out[:, columns] = M @ out[:, columns]
    return torch.from_numpy(out)


# For errors: ours, and the reference's.
ERRORS = [
    (saef.Ring(), reference.ring),
    (saef.Ring(period=3), reference.every(3, reference.ring)),
    (saef.Slack(0.3), reference.slack(0.3)),
    (saef.AsyncRing(4), reference.pairs(meetings_of(4))),
    (saef.AsyncRing(9, period=2), reference.every(2, reference.pairs(meetings_of(9)))),
    (saef.LocalStep(4), ("allreduce", 4)),
]
