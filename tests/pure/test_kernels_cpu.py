"""The numba kernels against the reference kernels: signs, indices, errors and momentum bit for bit.

The same numbers in the same order, products and sums rounded separately, give the same bits. The one exception
is a scale, a sum that the two form in different orders (`scale_tolerance`).
"""

import copy
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor

from saef import Codec, Compressor, Identity, MajorityVote, MinSize, ScaledSign, TopK
from saef.rules import RULES as KINDS
from saef.rules import AdamW, Rule
from saef.rules.rule import table as hyper_table
from saef.wire.codec import Block, Layout, block_ranges, lay_out
from saef.wire.compressors import SIGN, index_bytes
from saef.wire.kernels import cpu, fingerprints, reference, select
from saef.wire.kernels.cpu import codes, loops
from saef.wire.kernels.table import BYTE, COUNT, FLOAT, GROUP, KIND, NUMEL, STATE, UNIT, Update, Worker
from saef.wire.plan import partition, plan_bucket

DTYPES = (torch.float32, torch.float64)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
CHUNK = cpu.CHUNK  # the kernels go through a block in chunks; sizes here leave whole chunks and rests
BLOCK_SIZES = sorted({1, 7, 8, 9, 1000, 2048, 2049, CHUNK, CHUNK + 1, 65536})
DATA = ("normal", "zeros", "negative zeros", "denormal", "ties", "huge", "NaN", "Inf", "all of it", "first chunk large")
DECAY_OF = {len(kind.hyper._fields): kind.hyper._fields.index("weight_decay") for kind in KINDS.values()}
KIND_OF = {len(kind.hyper._fields): kind for kind in KINDS.values()}  # each has its number of columns
ONE_GROUP = [[0.1, 0.0, 1.0, 0.0, 0.0, 1.0]]  # eta, mu, gain, Nesterov, decay, factor


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Torch's threads wait for each other; beside other ranks' that takes longer than the work."""
    with threads(1):
        yield


@contextmanager
def threads(n: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- comparing ----------------------------------------------------------------------------------------------


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, zeros of different sign told apart; any NaN equals any other."""
    integer = {4: torch.int32, 8: torch.int64}[a.element_size()]
    number = ~(a.isnan() & b.isnan())
    return a.dtype == b.dtype and torch.equal(a[number].view(integer), b[number].view(integer))


def scale_tolerance(scale: Tensor, n: int) -> Tensor:
    """What may lie between two scales of a block of n.

    Each is a float64 sum of n numbers of one sign: n - 1 roundings, each at most 2^-53 of the sum, and that of the
    division. In float32 this is rounded once more and cannot be seen, but where the two sums lie on either side
    of a midpoint: one unit in the last place. In float64 it is all there is: 2 n 2^-53 of the scale, and one
    unit for a quotient that is denormal.
    """
    ulp = torch.nextafter(scale, torch.full_like(scale, math.inf)) - scale
    return ulp if scale.dtype == torch.float32 else ulp + 2 * n * 2.0**-53 * scale


def assert_same_message(layout: Layout, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    assert torch.equal(a[layout.scalars * dtype.itemsize :], b[layout.scalars * dtype.itemsize :])
    fa, fb = (message[: layout.scalars * dtype.itemsize].view(dtype) for message in (a, b))
    scale = torch.zeros(layout.scalars, dtype=torch.bool)
    for row in layout.table.tolist():
        if row[KIND] == SIGN and not row[UNIT]:
            at = row[FLOAT]
            scale[at] = True
            s, t = fa[at], fb[at]
            near = (s - t).abs() <= scale_tolerance(torch.minimum(s, t), row[NUMEL])
            assert near or same_bits(fa[at : at + 1], fb[at : at + 1]), (row, s, t)
    assert same_bits(fa[~scale], fb[~scale])


@contextmanager
def unchanged(*tensors):
    """Fails if a tensor is not, bit for bit, what it was."""
    before = [t.clone() for t in tensors]
    yield
    assert all(torch.equal(t.view(torch.uint8), b.view(torch.uint8)) for t, b in zip(tensors, before, strict=True))


# --- cases --------------------------------------------------------------------------------------------------


def numbers(kind: str, n: int, dtype: torch.dtype, gen: torch.Generator) -> Tensor:
    v = torch.randn(n, dtype=dtype, generator=gen)
    tiny, large = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max / 8
    spread = torch.randint(0, 5, (n,), generator=gen)
    if kind == "zeros":
        return torch.zeros(n, dtype=dtype)
    if kind == "negative zeros":
        return torch.where(spread < 3, -0.0, torch.where(spread < 4, 0.0, v))
    if kind == "denormal":
        return v * tiny / 4
    if kind == "ties":
        return torch.sign(v) * spread
    if kind == "huge":
        return torch.where(spread == 0, torch.sign(v) * large / max(n, 1), v)
    if kind == "NaN":
        return torch.where(spread == 0, math.nan, v)
    if kind == "Inf":
        return torch.where(spread == 0, torch.sign(v) * math.inf, v)
    if kind == "first chunk large":
        return torch.where(torch.arange(n) < CHUNK, 1000 * v, v)
    if kind == "all of it":
        v = numbers("ties", n, dtype, gen) * tiny / 2 + v * (v > 1)
        return torch.where(torch.arange(n) % 997 == 5, math.nan, v)
    return v


@dataclass
class Case:
    """Blocks in a bucket whose order is not the state's, and vectors for them, with gaps between the blocks."""

    dtype: torch.dtype
    send: Layout
    receive: Layout
    reply: Layout
    g: Tensor
    m: Tensor
    e: Tensor
    x: Tensor
    e_server: Tensor

    @property
    def worker(self) -> Worker:
        return Worker(self.g, self.m, self.e, self.x)


def make_case(
    codes: list[tuple[Compressor, Compressor, int]],
    dtype: torch.dtype,
    data: str = "normal",
    *,
    groups: int = 1,
    vectors: int = 1,
    feedback: bool = True,
    seed: int = 0,
) -> Case:
    """`codes`: of each tensor the worker's and the server's compressor, and its size; `vectors`: of the rule."""
    gen = torch.Generator().manual_seed(seed)
    blocks, at = [], 3
    for i, (up, down, numel) in enumerate(codes):
        size = up.block_numel(numel) or down.block_numel(numel)
        for start, n in block_ranges(numel, size):
            blocks.append(Block(up, down, at + start, at + start, 0, n, i % groups))
        at += numel + 2
    d, served = at + 5, 1
    for i, block in reversed(list(enumerate(blocks))):  # the server error is in the opposite order
        blocks[i] = block._replace(grad=d - block.grad - block.numel, served=served)
        served += block.numel
    g, e, x, *m = (numbers(data, d, dtype, gen) for _ in range(3 + vectors))
    empty = torch.empty(0, dtype=dtype)
    return Case(
        dtype,
        send=lay_out(blocks, dtype.itemsize, reply=False, served=False),
        receive=lay_out(blocks, dtype.itemsize, reply=False, served=True),
        reply=lay_out(blocks, dtype.itemsize, reply=True, served=True),
        g=g,
        m=torch.stack(m) if m else g.new_empty(0, d),
        e=e if feedback else empty,
        x=x,
        e_server=numbers(data, served + 1, dtype, gen) if feedback else empty,
    )


def make_rule(hyper: list[list[float]], dtype: torch.dtype, step_ahead: float = 1.0, feedback: bool = True) -> Update:
    return Update(KIND_OF[len(hyper[0])].kind, torch.tensor(hyper, dtype=dtype), step_ahead, feedback)


def vectors_of(hyper: list[list[float]]) -> int:
    return len(KIND_OF[len(hyper[0])].names)


def compress(kernels, case: Case, rule: Update) -> Tensor:
    """The message; everything else is asserted to stay as it is, and a second call to give the same."""
    message = torch.full((case.send.message_bytes,), 0xA5, dtype=torch.uint8)
    again = message.clone()
    with unchanged(case.send.table, rule.hyper, *case.worker):
        kernels.compress(case.send.table, rule, case.worker, message)
        kernels.compress(case.send.table, rule, case.worker, again)
    assert torch.equal(message, again)
    return message


def commit(kernels, case: Case, rule: Update, message: Tensor) -> tuple[Tensor, Tensor]:
    """(m, e) afterwards."""
    m, e = case.m.clone(), case.e.clone()
    with unchanged(case.send.table, rule.hyper, case.g, case.x, message):
        kernels.commit(case.send.table, rule, case.worker._replace(m=m, e=e), message)
    return m, e


def serve(kernels, case: Case, messages: Tensor) -> Tensor:
    reply = torch.full((case.reply.message_bytes,), 0xA5, dtype=torch.uint8)
    again = reply.clone()
    with unchanged(case.receive.table, case.reply.table, messages, case.e_server):
        kernels.serve(case.receive.table, case.reply.table, messages, case.e_server, reply)
        kernels.serve(case.receive.table, case.reply.table, messages, case.e_server, again)
    assert torch.equal(reply, again)
    return reply


def settle(kernels, case: Case, messages: Tensor, reply: Tensor) -> Tensor:
    e = case.e_server.clone()
    with unchanged(case.receive.table, case.reply.table, messages, reply):
        kernels.settle(case.receive.table, case.reply.table, messages, e, reply)
    return e


def once(table: Tensor, v: Tensor) -> Tensor:
    """Rates of 1 for all groups."""
    return v.new_ones(1 + int(table[:, GROUP].max()) if len(table) else 1)


def subtract(kernels, layout: Layout, message: Tensor, v: Tensor) -> Tensor:
    v = v.clone()
    with unchanged(layout.table, message):
        kernels.subtract(layout.table, once(layout.table, v), message, v)
    return v


def check_worker(case: Case, rule: Update) -> Tensor:
    """Compress and commit; the reference's message."""
    message = compress(reference, case, rule)
    fast = compress(cpu, case, rule)
    assert_same_message(case.send, fast, message, case.dtype)
    for sent in (message, fast):
        (m, e), (m_fast, e_fast) = commit(reference, case, rule, sent), commit(cpu, case, rule, sent)
        assert same_bits(m, m_fast) and same_bits(e, e_fast)
        assert rule.feedback or same_bits(e, case.e)
    assert same_bits(subtract(reference, case.send, message, case.x), subtract(cpu, case.send, message, case.x))
    return message


def check_server(case: Case, messages: Tensor) -> None:
    """Serve and settle."""
    reply, fast = serve(reference, case, messages), serve(cpu, case, messages)
    assert_same_message(case.reply, fast, reply, case.dtype)
    if case.e_server.numel():
        assert same_bits(settle(reference, case, messages, reply), settle(cpu, case, messages, reply))


def check(codes, dtype, data="normal", K=2, hyper=ONE_GROUP, step_ahead=1.0, vectors=None, seed=0) -> None:
    """All five kernels."""
    feedback = all(up.feedback for up, _, _ in codes)
    rule = make_rule(hyper, dtype, step_ahead, feedback)
    messages = []
    for k in range(K):
        kept = vectors_of(hyper) if vectors is None else vectors
        case = make_case(codes, dtype, data, groups=len(hyper), vectors=kept, feedback=feedback, seed=100 * seed + k)
        messages.append(check_worker(case, rule) if k == 0 else compress(reference, case, rule))
    check_server(case, torch.stack(messages))


def codes_for(block) -> list[Compressor]:
    half = torch.bfloat16
    whole = [ScaledSign(block), TopK(0.01, block), TopK(0.6, block), TopK(1.0, block), Identity()]
    return [*whole, TopK(0.3, block, values=half), Identity(values=half)]


MIXED = [
    (ScaledSign("layer"), ScaledSign("layer"), 100),
    (TopK(0.1, "layer"), TopK(0.1, "layer"), 300),
    (Identity(), Identity(), 17),
    (ScaledSign("layer"), TopK(0.2, "layer"), CHUNK + 1),
    (TopK(0.01, "layer"), ScaledSign("layer"), 2 * CHUNK + 1),
    (ScaledSign("layer"), Identity(), 33),
    (TopK(0.5, "layer"), Identity(), 10),
    (Identity(), ScaledSign("layer"), 9),
    (Identity(), TopK(0.3, "layer"), CHUNK + 952),
    (Identity(values=torch.bfloat16), TopK(0.3, "layer", values=torch.bfloat16), CHUNK + 951),
    (TopK(0.1, "layer", values=torch.bfloat16), Identity(values=torch.bfloat16), 301),
    (TopK(1e-9, "layer"), TopK(1.0, "layer"), CHUNK + 452),
    (ScaledSign("layer"), ScaledSign("layer"), 1),
]


# --- against the reference ----------------------------------------------------------------------------------


def test_cpu_tensors_get_these_kernels():
    assert select(torch.device("cpu")) is cpu


@both_dtypes
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_every_code_at_every_block_size(block, dtype):
    """Tensors of two whole blocks and a rest, and one smaller than a block."""
    rest = min(block - 1, 77)
    for code in codes_for(block):
        check([(code, code, 2 * block + rest), (code, code, max(1, block // 3))], dtype, hyper=[[0.1, 0.9, 1, 0, 0, 1]])


@both_dtypes
@pytest.mark.parametrize("server", ["same", "single-way"])
def test_one_large_block(server, dtype):
    """300,000 coordinates: indices of three bytes, many chunks."""
    for code in (ScaledSign("layer"), TopK(0.01, "layer")):
        check([(code, code if server == "same" else Identity(), 300_000)], dtype)


@both_dtypes
@pytest.mark.parametrize("data", DATA)
def test_every_kind_of_number(data, dtype):
    """In mixed tables, whose blocks have other codes on the way back."""
    check(MIXED, dtype, data, K=3, hyper=[[0.5, 0.9, 1, 1, 0.25, 1]])
    check(MIXED, dtype, data, K=2, vectors=0)


@both_dtypes
@pytest.mark.parametrize("up", [Identity(), ScaledSign("layer"), TopK(0.1, "layer")])
@pytest.mark.parametrize("data", ["first chunk large", "zeros", "ties", "NaN"])
def test_a_first_chunk_unlike_the_others(data, up, dtype):
    """What the largest entries of the first chunk suggest for all others may be wrong, and k not reached."""
    check([(up, TopK(ratio, "layer"), 6 * CHUNK + 5) for ratio in (0.01, 0.1)], dtype, data)
    check([(TopK(ratio, "layer"), up, 6 * CHUNK + 5) for ratio in (0.01, 0.1)], dtype, data, vectors=0)


@both_dtypes
@pytest.mark.parametrize("data", DATA)
def test_majority_vote(data, dtype):
    """Signum: momentum with a gain, no errors."""
    vote = [(MajorityVote(b), MajorityVote(b), n) for b, n in (("layer", CHUNK + 952), (7, 50), (8, 16), (1, 3))]
    check(vote, dtype, data, K=3, hyper=[[0.1, 0.9, 1.0 - 0.9, 0, 0, 1]])
    check(vote, dtype, data, K=4, vectors=0)


@both_dtypes
@pytest.mark.parametrize("K", [1, 2, 3, 4, 8])
def test_every_number_of_workers(K, dtype):
    """1 / K is rounded for K = 3; the sum runs in rank order."""
    check(MIXED, dtype, K=K)


RULES = {
    "no momentum": [0.1, 0.0, 1.0, 0.0, 0.0, 1.0],
    "heavy ball": [0.1, 0.9, 1.0, 0.0, 0.0, 1.0],
    "nesterov": [0.3, 0.9, 1.0, 1.0, 0.0, 1.0],
    "signum's gain": [0.1, 0.9, 0.1, 0.0, 0.0, 1.0],
    "nesterov with a gain": [0.1, 0.9, 0.1, 1.0, 0.0, 1.0],
    "decay": [0.1, 0.0, 1.0, 0.0, 5e-4, 1.0],
    "clipped": [0.1, 0.9, 1.0, 0.0, 0.01, 0.37],
    "maximize": [0.1, 0.9, 1.0, 1.0, 0.01, -1.0],
    "learning rate 0": [0.0, 0.9, 1.0, 0.0, 0.01, 1.0],
}


@both_dtypes
@pytest.mark.parametrize("step_ahead", [0.0, 0.5, 1.0, 0.3])
@pytest.mark.parametrize("vectors", [1, 0], ids=["m", "no m"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule(rule, vectors, step_ahead, dtype):
    codes = [MIXED[0], MIXED[1], MIXED[2], (ScaledSign("layer"), ScaledSign("layer"), CHUNK + 452)]
    case = make_case(codes, dtype, vectors=vectors)
    check_worker(case, make_rule([rule], dtype, step_ahead))


def adamw_hyper(t: int = 7, K: int = 4, kind: type = torch.optim.AdamW, rule: Rule = AdamW(), **options) -> list[float]:
    """The columns of one group, as they are read."""
    optimizer = kind([torch.zeros(1)], **{"lr": 0.1, "betas": (0.8, 0.95), **options})
    return hyper_table(rule.read(optimizer, t, K), torch.float64, torch.device("cpu"))[0].tolist()


ADAMW = {
    "corrected": adamw_hyper(),
    "the first step": adamw_hyper(t=0),
    "one worker": adamw_hyper(K=1),
    "plain v": adamw_hyper(rule=AdamW(noise_correction=False)),
    "coupled decay": adamw_hyper(kind=torch.optim.Adam, weight_decay=0.01),
    "maximize, without betas": adamw_hyper(maximize=True, betas=(0.0, 0.0), eps=1e-3),
    "learning rate 0": adamw_hyper(lr=0.0),
}


@both_dtypes
@pytest.mark.parametrize("step_ahead", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("rule", ADAMW.values(), ids=ADAMW)
def test_adamw(rule, step_ahead, dtype):
    """Blocks of whole chunks too, which for signs have a loop of their own."""
    codes = [MIXED[1], MIXED[2], (ScaledSign("layer"), ScaledSign("layer"), 2 * CHUNK + 452)]
    check_worker(make_case(codes, dtype, vectors=2), make_rule([rule], dtype, step_ahead))


@both_dtypes
@pytest.mark.parametrize("data", DATA)
def test_adamw_of_every_kind_of_number(data, dtype):
    """Negative second moments, 0 / eps, overflow to infinity, NaN: as the definition has them."""
    check(MIXED, dtype, data, hyper=[ADAMW["corrected"], ADAMW["coupled decay"], ADAMW["one worker"]])
    check([MIXED[0], MIXED[4]], dtype, data, hyper=[ADAMW["the first step"]])


@both_dtypes
def test_adamw_without_feedback(dtype):
    """D = u. No method has it; the kernels do."""
    case = make_case(MIXED, dtype, vectors=2, feedback=False)
    check_worker(case, make_rule([ADAMW["corrected"]], dtype, 0.0, feedback=False))


@both_dtypes
def test_parameter_groups_each_with_its_own_rule(dtype):
    """All of RULES in one table, the blocks taking turns: each block as if all groups had its rule."""
    hyper = list(RULES.values())
    case = make_case(MIXED, dtype, groups=len(hyper))
    message = check_worker(case, make_rule(hyper, dtype, 0.5))
    for i in range(len(MIXED)):
        alone = case.send.table[i : i + 1]
        own = torch.zeros_like(message)
        reference.compress(alone, make_rule([hyper[i % len(hyper)]] * len(hyper), dtype, 0.5), case.worker, own)
        row = alone[0].tolist()
        a, b = row[FLOAT] * dtype.itemsize, (row[FLOAT] + row[COUNT]) * dtype.itemsize
        assert torch.equal(own[a:b], message[a:b])


@both_dtypes
def test_no_server_error(dtype):
    """An empty e: the reply is C of the mean."""
    case = make_case(MIXED, dtype)
    messages = torch.stack([compress(reference, case, make_rule(ONE_GROUP, dtype))] * 3)
    case.e_server = torch.empty(0, dtype=dtype)
    check_server(case, messages)


@both_dtypes
def test_an_empty_table(dtype):
    """All tensors of a bucket may be empty."""
    case, rule = make_case([], dtype), make_rule(ONE_GROUP, dtype)
    for kernels in (reference, cpu):
        message = compress(kernels, case, rule)
        m, e = commit(kernels, case, rule, message)
        x = subtract(kernels, case.send, message, case.x)
        assert message.numel() == 0 and same_bits(m, case.m) and same_bits(e, case.e) and same_bits(x, case.x)


@both_dtypes
def test_worker_by_hand(dtype):
    """Nesterov with decay at x_half, in binary fractions; signs and scale of D, then the residual."""
    C = ScaledSign("layer")
    table = lay_out([Block(C, C, 0, 0, 0, 2, 0)], dtype.itemsize, reply=False, served=False).table
    rule = make_rule([[0.5, 0.5, 1.0, 1.0, 0.25, -2.0]], dtype, 0.5)
    g, m, e, x = (torch.tensor(v, dtype=dtype) for v in ([1, -2], [4, 8], [2, -4], [5, 6]))
    # x_half = (4, 8); g = (-2, 4) + (1, 2) = (-1, 6); m = (1, 10); u = (-0.5, 11); D = (1.75, 1.5); scale 1.625
    for kernels in (reference, cpu):
        message, m_new, e_new = torch.zeros(16, dtype=torch.uint8), m[None].clone(), e.clone()
        kernels.compress(table, rule, Worker(g, m_new, e_new, x), message)
        assert message.view(dtype)[0] == 1.625 and message[dtype.itemsize] == 0b11
        kernels.commit(table, rule, Worker(g, m_new, e_new, x), message)
        assert m_new[0].tolist() == [1, 10] and e_new.tolist() == [0.125, -0.125]


@both_dtypes
def test_server_by_hand(dtype):
    C = TopK(0.5, "layer")
    codec = Codec(C, [3], dtype)
    table = codec.layout.table
    messages = torch.stack([codec.encode([torch.tensor(v, dtype=dtype)]) for v in ([8, 4, 1], [0, 16, -4])])
    # sent (8, 4, 0) and (0, 16, -4); D = (1, 1, 1) + (4, 10, -2) = (5, 11, -1); R = (5, 11, 0)
    for kernels in (reference, cpu):
        reply, e = torch.zeros_like(messages[0]), torch.ones(3, dtype=dtype)
        kernels.serve(table, table, messages, e, reply)
        assert codec.decode(reply)[0].tolist() == [5, 11, 0] and e.tolist() == [1, 1, 1]
        kernels.settle(table, table, messages, e, reply)
        assert e.tolist() == [0, 0, -1]
        kernels.subtract(table, torch.ones(1, dtype=dtype), reply, e)
        assert e.tolist() == [-5, -11, -1]


@both_dtypes
@pytest.mark.parametrize("ahead", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("feedback", [True, False], ids=["e", "no e"])
@pytest.mark.parametrize("hyper", [[[0.1, 0.9, 1, 0, 0, 1], [0.3, 0.9, 1, 1, 0.01, 0.7]],
                                   [ADAMW["corrected"], ADAMW["coupled decay"]]], ids=["sgd", "adamw"])  # fmt: skip
def test_advance(hyper, feedback, ahead, dtype):
    """As `commit`, `subtract` and x_half one after the other; x in another place than the worker's vectors."""
    if not feedback and ahead:
        pytest.skip("a method without errors does not step ahead")
    hyper = copy.deepcopy(hyper)
    case = make_case(MIXED, dtype, groups=2, feedback=feedback, vectors=vectors_of(hyper))
    hyper[1][DECAY_OF[len(hyper[1])]] *= feedback
    rule = make_rule(hyper, dtype, 0.0, feedback)
    message = compress(reference, case, rule)
    out = case.reply.table.clone()
    rates = torch.tensor([1.0, 0.3], dtype=dtype)
    case.e_server = torch.empty(0, dtype=dtype)
    replies = serve(reference, case, message[None])
    found = []
    for kernels in (reference, cpu):
        m, e, half = case.m.clone(), case.e.clone(), case.x * 0.5
        x = torch.arange(2.0 * len(half), dtype=dtype)
        with unchanged(case.g, message, replies, rates, rule.hyper):
            worker = Worker(case.g, m, e, x)
            kernels.advance(case.send.table, out, rule, worker, message, rates, replies, half, ahead)
        found.append((m.view(-1), e, x, half))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
    assert not same_bits(found[0][2], torch.arange(2.0 * len(half), dtype=dtype))


@both_dtypes
@pytest.mark.parametrize("threads", [1, 2])
def test_fingerprints(dtype, threads, monkeypatch):
    """Any change of an entry's bits shows, and where; `advance` gives those of what x becomes."""
    monkeypatch.setattr(cpu, "PARALLEL_NUMEL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    case, rule = make_case(MIXED, dtype), make_rule(ONE_GROUP, dtype, 0.0)
    message, case.e_server = compress(reference, case, rule), torch.empty(0, dtype=dtype)
    replies = serve(reference, case, message[None])
    starts, numels = case.reply.table[:, STATE].contiguous(), case.reply.table[:, NUMEL].contiguous()

    def prints_of(v):  # counted from where v begins
        addresses = [v.data_ptr(), *(v.data_ptr() + starts * dtype.itemsize).tolist()]
        return cpu.fingerprints(addresses, [4, *(numels * dtype.itemsize).tolist()])[1:]

    prints, x = torch.ones(len(starts), dtype=torch.int64), case.x.clone()
    worker = Worker(case.g, case.m, case.e, x)
    rest = message, torch.ones(1, dtype=dtype), replies, case.x.clone(), 1.0
    cpu.advance(case.send.table, case.reply.table, rule, worker, *rest, prints)
    found = prints_of(x)
    assert torch.equal(found, prints - 1) and not same_bits(x, case.x)

    def changed(edit):
        edited = x.clone()
        edit(edited)
        return (prints_of(edited) != found).nonzero().view(-1).tolist()

    k = int(numels.argmax())
    at, n = int(starts[k]), int(numels[k])
    big = slice(at, at + n)
    for edit in (
        lambda v: v[at + n - 1].neg_(),
        lambda v: v[at : at + 2].copy_(v[at : at + 2].flip(0).clone()),
        lambda v: v[big].copy_(v[big].roll(1)),
        lambda v: v[big].neg_(),
        lambda v: v[big].zero_(),
        lambda v: v[big].mul_(1 + 2 * torch.finfo(dtype).eps),
    ):
        assert changed(edit) == [k]
    assert changed(lambda v: None) == []
    odd = [torch.ones(n, dtype=torch.bfloat16) for n in (3, 0, 5)]
    before = fingerprints(odd, x.device)
    odd[2][4] = 2
    assert (fingerprints(odd, x.device) != before).tolist() == [False, False, True]
    assert len(fingerprints([], x.device)) == 0
    assert changed(lambda v: v.copy_(torch.nextafter(v, v + 1))) == list(range(len(starts)))


@both_dtypes
def test_a_rate_multiplies_what_is_subtracted(dtype):
    case = make_case(MIXED, dtype, groups=3)
    message, rates = compress(reference, case, make_rule(ONE_GROUP * 3, dtype)), torch.tensor([1, 0.1, 0], dtype=dtype)
    found = [case.x.clone(), case.x.clone()]
    for kernels, x in zip((reference, cpu), found, strict=True):
        kernels.subtract(case.send.table, rates, message, x)
    assert same_bits(*found) and not same_bits(found[0], case.x)
    for row in case.send.table[2::3].tolist():
        at = slice(row[STATE], row[STATE] + row[NUMEL])
        assert torch.equal(found[0][at], case.x[at])


def test_a_vote_moves_by_the_rate():
    """x - eta sign, eta once rounded."""
    C = MajorityVote("layer")
    codec, eta = Codec(C, [9], torch.float32, cpu), torch.tensor([0.1])
    v = torch.arange(-4.0, 5.0)
    for kernels in (reference, cpu):
        x = torch.ones(9)
        kernels.subtract(codec.layout.table, eta, codec.encode([v]), x)
        assert torch.equal(x, torch.ones(9) - torch.where(v >= 0, eta, -eta))


@pytest.mark.parametrize("kernels", [reference, cpu], ids=["reference", "cpu"])
def test_rules_and_blocks_that_are_not_known_are_refused(kernels):
    """Never taken for one that is."""
    case = make_case([(ScaledSign(), ScaledSign(), 9)], torch.float32)
    unknown, message = make_rule(ONE_GROUP, torch.float32)._replace(kind=99), torch.zeros(16, dtype=torch.uint8)
    for f in (kernels.compress, kernels.commit):
        with pytest.raises(ValueError, match="rule kind 99"):
            f(case.send.table, unknown, case.worker, message)
    table = case.send.table.clone()
    table[0, KIND] = 7
    for f, arguments in ((kernels.subtract, (torch.ones(1), message, case.x)), (kernels.inspect, (message,))):
        with pytest.raises(ValueError, match="block of kind 7"):
            f(table, *arguments)


# --- top-k --------------------------------------------------------------------------------------------------


def adversaries(n: int, k: int) -> dict[str, np.ndarray]:
    """Orders that a selection by threshold or by pivot may find hard."""
    i, gen = np.arange(n, dtype=np.float64), np.random.default_rng(n + k)
    kth = np.where(i % 3 == 0, 5.0, np.where(i % 3 == 1, 5.0, 1.0))
    kth[gen.permutation(n)[: max(0, k - 2)]] = 9.0  # fewer than k above, and more than enough ties for the rest
    nan = gen.normal(size=n)
    nan[gen.random(n) < 0.5] = np.nan
    few_nan = gen.normal(size=n)
    few_nan[gen.permutation(n)[: max(1, k // 2)]] = np.nan
    return {
        "ascending": i,
        "descending": n - i,
        "ascending, signs alternate": i * (-1.0) ** i,
        "all equal": np.full(n, -3.0),
        "all zero": np.where(i % 2 == 0, 0.0, -0.0),
        "all NaN": np.full(n, np.nan),
        "ties around the k-th": kth,
        "ties, then larger": np.where(i < n - k // 2 - 1, 2.0, 3.0),
        "many NaN": nan,
        "fewer NaN than k": few_nan,
        "NaN last": np.where(i >= n - k, np.nan, i),
        "Inf and NaN": np.where(i % 5 == 0, np.inf, np.where(i % 7 == 0, np.nan, -np.inf)),
        "organ pipe": np.minimum(i, n - i),
        "valley": np.maximum(i, n - i),
        "saw": i % 13,
        "denormal": i * 2.0**-149,
        "k-th at the end": np.where(i >= n - k, 1.0, 0.0),
        "first chunk large": gen.normal(size=n) * np.where(i < CHUNK, 1000.0, 1.0),
        "first chunk zero": gen.normal(size=n) * (i >= CHUNK),
        "only the first chunk": gen.normal(size=n) * (i < CHUNK),
        "first chunk of ties": np.where(i < CHUNK, 2.0, 2.0 + (i % 2)),
        "first chunk NaN": np.where(i < CHUNK, np.nan, i),
        "normal": gen.normal(size=n),
    }


@both_dtypes
@pytest.mark.parametrize("n, k", [(1, 1), (7, 1), (9, 8), (100, 100), (300, 4), (2049, 1), (5000, 50), (20000, 1000),
                                  (3 * CHUNK, 64), (70000, 700)])  # fmt: skip
def test_top_k_is_that_of_a_full_stable_sort(n, k, dtype):
    """NaN counts as largest, ties go to the lower index; the sort is numpy's."""
    C = TopK(k / n, "layer")
    codec = Codec(C, [n], dtype, cpu)
    assert C.scalars(n) == k
    for name, a in adversaries(n, k).items():
        v = torch.from_numpy(a).to(dtype)
        a = np.abs(v.numpy())
        order = np.lexsort((np.arange(n), -np.nan_to_num(a, nan=0.0, posinf=np.inf), ~np.isnan(a)))
        kept = np.sort(order[:k])
        message, width = codec.encode([v]), index_bytes(n)
        at = codec.layout.table[0, BYTE]
        packed = message[at : at + k * width].view(k, width).long()
        indices = (packed << (8 * torch.arange(width))).sum(1)
        assert torch.equal(indices, torch.from_numpy(kept)), name
        assert same_bits(message[: k * dtype.itemsize].view(dtype), v[indices]), name


def test_index_widths_are_the_codecs():
    """Up to blocks of more than 2^24, which are too large to encode here."""
    edges = [2**8, 2**16, 2**24, 2**31 - 2]
    compiled_bytes = njit(lambda n: codes.index_bytes(n))  # what kernels call cannot be called from here
    for n in [1, 2, *(edge + j for edge in edges for j in (-1, 0, 1))]:
        assert compiled_bytes(n) == index_bytes(n)
    packed = np.array([0x03020100, 0xFEDCBA98], dtype="<u4").view(np.uint8)
    compiled_index = njit(lambda j: codes.index_at(packed, 0, 4, j))
    assert [compiled_index(j) for j in (0, 1)] == [0x03020100, 0xFEDCBA98]


# --- threads ------------------------------------------------------------------------------------------------

PARALLEL = [(ScaledSign(), ScaledSign(), 5 * 65536 + 11), (TopK(), ScaledSign(), 4 * 65536 + 5),
            (ScaledSign("layer"), TopK(0.01, "layer"), 70001), (Identity(), Identity(), 3),
            (Identity(), TopK(0.5, 999), 5000)]  # fmt: skip


@both_dtypes
@pytest.mark.parametrize("hyper", [[0.1, 0.9, 1, 0, 0.01, 1], ADAMW["corrected"]], ids=["sgd", "adamw"])
def test_threads_do_not_change_a_bit(hyper, dtype):
    rule = make_rule([hyper], dtype)
    case = make_case(PARALLEL, dtype, vectors=vectors_of([hyper]))
    assert case.send.table[:, NUMEL].sum() > cpu.PARALLEL_NUMEL and len(case.send.table) > 8
    found = []
    for n in (1, 2, 4, 7):
        with threads(n):
            message = compress(cpu, case, rule)
            m, e = commit(cpu, case, rule, message)
            messages = torch.stack([message, message])
            reply = serve(cpu, case, messages)
            e_server = settle(cpu, case, messages, reply)
            x = subtract(cpu, case.send, message, case.x)
        found.append([message, reply, *(v.view(torch.uint8) for v in (m, e, e_server, x))])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@both_dtypes
def test_a_block_alone_gives_what_it_gives_in_a_table(dtype):
    """Its scale does not depend on the rows around it, nor on how many there are."""
    rule = make_rule(ONE_GROUP, dtype)
    case = make_case([*MIXED, (ScaledSign(1000), ScaledSign(1000), 5500)], dtype)
    message, alone = compress(cpu, case, rule), torch.zeros(case.send.message_bytes, dtype=torch.uint8)
    for i in reversed(range(len(case.send.table))):
        cpu.compress(case.send.table[i : i + 1], rule, case.worker, alone)
    used = case.send.table[-1, BYTE] + math.ceil(case.send.table[-1, NUMEL] / 8)
    assert torch.equal(alone[:used], message[:used])


@pytest.mark.parametrize("n", [1, 4])
def test_a_malformed_block_is_named_whatever_the_threads(n):
    """The first one of the table, so that the error does not depend on the machine."""
    codec = Codec(TopK(0.01, 65536), [65536 * 12])
    message = codec.encode([torch.ones(65536 * 12)])
    for block in (2, 5, 11):
        at = codec.layout.table[block, BYTE]
        message[at : at + 4] = 0
    with threads(n), pytest.raises(ValueError, match="malformed message: the indices of block 2 are not"):
        codec.decode(message)


# --- messages from elsewhere --------------------------------------------------------------------------------


def is_refused(f, *arguments) -> bool:
    try:
        f(*arguments)
    except ValueError as error:
        assert "malformed message: the indices of block 1 are not increasing, or" in str(error)
        return True
    return False


@both_dtypes
def test_malformed_messages_are_refused_by_server_and_worker(dtype):
    """Any message of the K; nothing is written beyond a block, and the server error stays."""
    C = TopK(0.3, 10)
    case = make_case([(C, C, 25)], dtype)
    good = torch.stack([compress(reference, case, make_rule(ONE_GROUP, dtype))] * 3)
    reply = serve(reference, case, good)
    row, gen, refused = case.receive.table[1].tolist(), np.random.default_rng(17), 0
    for trial in range(200):
        bad, k = good.clone(), trial % 3
        bad[k, row[BYTE] : row[BYTE] + 3] = torch.from_numpy(gen.integers(0, 14, 3, dtype=np.uint8))
        bad_reply = reply.clone()
        bad_reply[row[BYTE] : row[BYTE] + 3] = bad[k, row[BYTE] : row[BYTE] + 3]
        answers = [
            is_refused(f, *arguments)
            for kernels in (reference, cpu)
            for f, *arguments in (
                (serve, kernels, case, bad),
                (settle, kernels, case, bad, reply),
                (settle, kernels, case, good, bad_reply),
                (subtract, kernels, case.reply, bad_reply, case.e_server),
            )
        ]
        assert len(set(answers)) == 1
        refused += answers[0]
    assert 0 < refused < 200


@both_dtypes
def test_a_reply_stays_within_its_bytes(dtype):
    """Whatever the messages say, and in a longer buffer."""
    codes = [(TopK(0.3, 10), TopK(0.2, 10), 25), (ScaledSign(9), ScaledSign(9), 20), (Identity(), TopK(0.9, 7), 9)]
    case = make_case(codes, dtype)
    gen, guard = np.random.default_rng(19), 64
    out = case.reply.table.clone()
    out[:, FLOAT] += guard // dtype.itemsize
    out[:, BYTE] += guard
    message = compress(reference, case, make_rule(ONE_GROUP, dtype))
    for _ in range(300):
        messages = message.repeat(2, 1)
        where = torch.from_numpy(gen.integers(0, messages.numel(), 3))
        messages.view(-1)[where] = torch.from_numpy(gen.integers(0, 256, 3, dtype=np.uint8))
        reply = torch.full((guard + case.reply.message_bytes + guard,), 0xA5, dtype=torch.uint8)
        try:
            with unchanged(messages, case.e_server):
                cpu.serve(case.receive.table, out, messages, case.e_server, reply)
        except ValueError as error:
            assert "malformed" in str(error)
        assert (reply[:guard] == 0xA5).all() and (reply[-guard:] == 0xA5).all()


@pytest.mark.slow
def test_no_index_leaves_its_array():
    """All kernels as plain Python in a process of its own: there numpy checks every index."""
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def every_path() -> None:
    """What `test_no_index_leaves_its_array` runs: chunks and rests, all codes, good and malformed messages."""
    assert not hasattr(loops.subtract, "py_func")  # not compiled
    codes = [(C, C, n) for n in (1, 9) for C in codes_for("layer")]
    codes += [(ScaledSign("layer"), TopK(0.02, "layer"), CHUNK + 12),
              (TopK(0.02, "layer"), ScaledSign("layer"), CHUNK + 9)]  # fmt: skip
    with np.errstate(all="ignore"):
        for dtype in DTYPES:
            for data in ("normal", "NaN"):
                check(codes, dtype, data, hyper=[[0.1, 0.9, 1, 1, 0.01, 1]])
            check(codes[:3], dtype, vectors=0)
            check(codes[::2], dtype, hyper=[ADAMW["corrected"], ADAMW["coupled decay"]])
            check([(MajorityVote(7), MajorityVote(7), 20)], dtype)
        C, gen = TopK(0.3, 10), np.random.default_rng(23)
        codec = Codec(C, [25])
        message = codec.encode([torch.randn(25)])
        for _ in range(1000):
            damaged = message.clone()
            where = torch.from_numpy(gen.integers(0, message.numel(), 2))
            damaged[where] = torch.from_numpy(gen.integers(0, 256, 2, dtype=np.uint8))
            try:
                codec.decode(damaged)
            except ValueError as error:
                assert "malformed" in str(error)


# --- compiling ----------------------------------------------------------------------------------------------

PREPARE = """
import logging
logging.basicConfig(format="log %(levelname)s %(message)s")
import torch
from saef.wire import kernels
kernels.prepare(torch.device("cpu"), torch.float32)
kernels.prepare(torch.device("cpu"), torch.float32)
from saef.wire.kernels.cpu import loops
names = "compress", "commit", "advance", "serve", "settle", "subtract", "inspect", "fingerprints"
every = [getattr(loops, name) for name in names]
assert all(len(kernel.signatures) == 1 for kernel in every)
print("hits", sum(sum(kernel.stats.cache_hits.values()) for kernel in every))
"""


def start(code: str, **environment: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_one_process_compiles_and_says_so(tmp_path):
    """Two at once in a fresh cache, then a third: eight kernels compiled once, and loaded twice without a word."""
    running = [start(PREPARE, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    ended = [process.communicate() for process in running]
    late = start(PREPARE, NUMBA_CACHE_DIR=str(tmp_path))
    ended.append(late.communicate())
    assert [process.returncode for process in (*running, late)] == [0, 0, 0], ended
    (first, loaded, warm) = sorted(ended, key=lambda said: not said[1])
    assert first[0] == "hits 0\n" and loaded == warm == ("hits 8\n", "")
    lines = first[1].splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("log WARNING compiling the CPU kernels for float32") and str(tmp_path) in lines[0]
    assert lines[1].startswith("log WARNING compiled the CPU kernels for float32 in ")


def test_without_a_cache_each_process_compiles(tmp_path):
    """As with a read-only installation and home: said once, with what helps. Only `inspect`, to be quick."""
    code = """
import logging, sys
logging.basicConfig(format="log %(message)s")
from numba.core.caching import CacheImpl
CacheImpl._locator_classes = []
from numba import int64, uint8
from saef.wire.kernels.cpu import compiling, loops
assert loops.inspect.stats.cache_path is None
assert compiling.prepare([(loops.inspect, (int64[:, ::1], uint8[::1]))], "float32")
assert not compiling.prepare([(loops.inspect, (int64[:, ::1], uint8[::1]))], "float32")
"""
    process = start(code, NUMBA_CACHE_DIR=str(tmp_path))
    said = process.communicate()
    assert process.returncode == 0, said
    lines = said[1].splitlines()
    assert len(lines) == 2 and "NUMBA_CACHE_DIR" in lines[0] and lines[1].startswith("log compiled")


@pytest.mark.slow
def test_a_compiler_that_dies_stops_nobody(tmp_path):
    """The system takes its lock away."""
    code = """
import os, sys
from saef.wire.kernels.cpu import compiling
with compiling._lock(sys.argv[1] if len(sys.argv) > 1 else os.environ["PLACE"]):
    print("locked", flush=True)
    sys.stdin.read() if os.environ["STAY"] == "1" else None
"""
    env = {**os.environ, "PLACE": str(tmp_path), "STAY": "1"}
    holder = subprocess.Popen([sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"locked\n"
    waiting = start(code, PLACE=str(tmp_path), STAY="0")
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.communicate(timeout=15)
    holder.kill()
    assert waiting.communicate()[0] == "locked\n"
    holder.communicate()


def test_importing_the_wire_compiles_nothing():
    """Neither numba nor triton, which take seconds, before there is a vector to work on."""
    code = """
import sys, types
import importlib.metadata, importlib.machinery, importlib.util
saef = types.ModuleType("saef")  # not what the package itself imports
saef.__path__ = importlib.util.find_spec("saef").submodule_search_locations
sys.modules["saef"] = saef
import saef.wire.kernels, saef.wire.codec, saef.wire.plan
print([name for name in ("numba", "triton") if name in sys.modules])
"""
    process = start(code)
    assert process.communicate() == ("[]\n", "")


@pytest.mark.slow
def test_compiling_ahead_of_time():
    """In this session's cache, where the kernels are."""
    cpu.prepare(torch.float32)
    command = [sys.executable, "-m", "saef.wire.kernels", "float32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "CPU kernels for float32 were there; loaded in" in done.stdout
    wrong = subprocess.run([*command, "float16"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "expected float32 or float64, got float16" in wrong.stderr


# --- strategies ---------------------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("K", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("C", [ScaledSign(64), TopK(0.1, 64), MinSize(20, TopK(0.1, 100, values=torch.bfloat16))])
def test_sharded_and_replicated_servers_give_the_same_bits(C, K, dtype):
    """K ranks in this process: each compresses; servers answer; the replies move x. Two buckets, two steps."""
    numels, gen = [300, 1, 65, 10, 128], torch.Generator().manual_seed(29)
    d, offsets = sum(numels), [sum(numels[:i]) for i in range(len(numels))]
    buckets = [[(4, 0), (3, 128)], [(2, 0), (1, 65), (0, 66)]]
    rule = make_rule([[0.1, 0.9, 1, 0, 0.01, 1]], dtype)
    gradients = torch.randn(2, K, d, dtype=dtype, generator=gen)
    found = []
    for servers in (1, K):
        blocks = partition(numels, [0] * 5, C, C, servers)
        x, m, e = torch.ones(d, dtype=dtype), torch.zeros(K, d, dtype=dtype), torch.zeros(K, d, dtype=dtype)
        e_server = [torch.zeros(served, dtype=dtype) for served in blocks.served]
        for step in range(2):
            for bucket in buckets:
                plans = [plan_bucket(blocks, bucket, servers, r, dtype.itemsize) for r in range(servers)]
                send, replies, sent = plans[0].send, [], []
                for k in range(K):
                    g = torch.cat([gradients[step, k, offsets[i] :][: numels[i]] for i, _ in bucket])
                    message = torch.zeros(send.message_bytes, dtype=torch.uint8)
                    worker = Worker(g, m[k : k + 1], e[k], x)
                    cpu.compress(send.table, rule, worker, message)
                    cpu.commit(send.table, rule, worker, message)
                    sent.append(message.split(plans[0].send_bytes))
                for r, plan in enumerate(plans):
                    messages = torch.stack([sections[r] for sections in sent])
                    reply = torch.zeros(plan.reply.message_bytes, dtype=torch.uint8)
                    if reply.numel():  # there may be more servers than blocks
                        cpu.serve(plan.receive.table, plan.reply.table, messages, e_server[r], reply)
                        cpu.settle(plan.receive.table, plan.reply.table, messages, e_server[r], reply)
                    replies.append(reply)
                assert [reply.numel() for reply in replies] == plans[0].reply_bytes
                cpu.subtract(plans[0].apply.table, torch.ones(1, dtype=dtype), torch.cat(replies), x)
        left = torch.full((d,), math.nan, dtype=dtype)  # the server errors, each where it belongs
        for r in range(servers):
            for b in blocks.served_by(r):
                left[b.state : b.state + b.numel] = e_server[r][b.served : b.served + b.numel]
        found.append((x, e, m, left))
    assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(*found, strict=True))


if __name__ == "__main__":
    every_path()
