"""The Triton kernels against the reference: on CUDA where there is one, else in Triton's interpreter on CPU.

Both get the same inputs, messages included, so that a last-place difference of a scale does not spread. All
vectors (with the gaps between their blocks, which stand guard) and messages must then be equal bit for bit, but
for the bits of NaN and for scales. A scale is a float64 sum of n magnitudes, rounded once. Either sum adds
numbers of one sign, each in a chain of at most some 60 additions (pairwise, or by tiles), so it is right to
60 * 2^-53, and the two differ by less than 2^-46: in float32 by one unit in the last place, at most 2^-23.
"""

import copy
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saef.rules import AdamW
from saef.rules.rule import table as hyper_table
from saef.rules.sgd import DECAY, PLAIN, SGD
from saef.step.ways import Copies, OnCUDA
from saef.wire import codec
from saef.wire.compressors import Compressor, Identity, MajorityVote, ScaledSign, TopK, index_bytes
from saef.wire.kernels import cpu, reference
from saef.wire.kernels.table import BYTE, COUNT, FLOAT, GRAD, KIND, NUMEL, STATE, UNIT, Update, Worker
from saef.wire.plan import Plans, place
from support import fuzz

CUDA = torch.cuda.is_available()
# Triton decides when it is imported whether it interprets. Too late if some other module has imported it.
TOO_LATE = not CUDA and "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
with pytest.MonkeyPatch.context() as patch:
    if not CUDA and not TOO_LATE:
        patch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    from saef.wire.kernels import cuda
    from saef.wire.kernels.cuda import prints as cuda_prints

pytestmark = pytest.mark.slow
SCALE_TOLERANCE = {torch.float32: 2.0**-23, torch.float64: 2.0**-46}
ONCE = {dtype: torch.ones(3, dtype=dtype) for dtype in SCALE_TOLERANCE}  # rates
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda" and not CUDA:
        pytest.skip("needs a CUDA device")
    if request.param == "cpu" and CUDA:
        pytest.skip("the interpreter is for machines without a CUDA device")
    if TOO_LATE:
        pytest.skip("Triton was imported before: see test_in_a_process_of_its_own")
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            patch.setenv("TRITON_INTERPRET", "1")
            interpreter = importlib.import_module("triton.runtime.interpreter")
            patch.setattr(interpreter, "_patch_lang", prepared_once(interpreter._patch_lang))
        yield torch.device(request.param)


def prepared_once(prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The interpreter's `_patch_lang` without what takes more time than all else: preparing the language again for
    every function that a kernel calls. What is prepared has no builtins any more."""
    language = importlib.import_module("triton.language")

    @cache
    def known(function: Any) -> list[Any]:
        names = function.__globals__.values()
        return [part for part in (language, language.core) if any(value is part for value in names)]

    def needed(function: Any) -> Any:
        return prepare(function) if any(language.core.is_builtin(part.load) for part in known(function)) else None

    return needed


@pytest.mark.parametrize("which", ["block or misleads", "not (block or misleads)"])
def test_in_a_process_of_its_own(which: str) -> None:
    if not TOO_LATE:
        pytest.skip("the other tests run in this process")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", which]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# ---- scenes -------------------------------------------------------------------------------------------------


class Scene:
    """Blocks with gaps between them, their layouts, and random vectors. `codes`: (worker, server, numel)."""

    def __init__(
        self, codes: Sequence[tuple[Compressor, Compressor, int]], dtype: torch.dtype, *, groups: int = 1
    ) -> None:
        blocks, grad, state, served = [], 3, 5, 1
        for number, (worker, server, n) in enumerate(codes):
            blocks.append(codec.Block(worker, server, grad, state, served, n, number % groups))
            grad, state, served = grad + n + 1, state + n + 3, served + n + 2
        self.blocks, self.dtype, size = blocks, dtype, dtype.itemsize
        self.up = codec.lay_out(blocks, size, reply=False, served=False)
        self.up_served = codec.lay_out(blocks, size, reply=False, served=True)
        self.down = codec.lay_out(blocks, size, reply=True, served=False)
        self.down_served = codec.lay_out(blocks, size, reply=True, served=True)
        generator = torch.Generator().manual_seed(len(codes))

        def vector(length: int) -> Tensor:
            return torch.randn(length, dtype=dtype, generator=generator)

        self.g, self.e_server = vector(grad + 2), vector(served + 2)
        self.m, self.e, self.x = vector(state + 2)[None], vector(state + 2), vector(state + 2)

    @property
    def worker(self) -> Worker:
        return Worker(self.g, self.m, self.e, self.x)

    def message(self, layout: codec.Layout) -> Tensor:
        return torch.zeros(layout.message_bytes, dtype=torch.uint8)

    def messages(self, K: int, rule: Update) -> Tensor:
        """Of K workers with gradients g, -g/2, g/3, ..."""
        rows = torch.zeros(K, self.up.message_bytes, dtype=torch.uint8)
        for k in range(K):
            g = self.g * (-1) ** k / (k + 1)
            reference.compress(self.up.table, rule, self.worker._replace(g=g), rows[k])
        return rows


def rule_of(dtype: torch.dtype, s: float = 1.0, feedback: bool = True) -> Update:
    """Three groups: plain; momentum, decay; everything, Nesterov too. mu, gain and factor are no dyadic numbers."""
    hyper = [[0.1, 0, 1, 0, 0, 1], [0.3, 0.9, 1, 0, 1e-3, 0.7], [0.07, 0.8, 0.2, 1, 0.01, -1.3]]
    return Update(SGD.kind, torch.tensor(hyper, dtype=dtype), s, feedback)


def adamw_of(dtype: torch.dtype, s: float = 1.0, feedback: bool = True) -> Update:
    """Three groups: AdamW among four workers, alone, and Adam with coupled decay, in step 7."""
    groups = [
        AdamW().read(kind([torch.zeros(1)], lr=0.1, betas=(0.8, 0.95), weight_decay=0.01, maximize=maximize), 7, K)[0]
        for kind, maximize, K in (
            (torch.optim.AdamW, False, 4),
            (torch.optim.AdamW, True, 1),
            (torch.optim.Adam, False, 3),
        )
    ]
    return Update(AdamW.kind, hyper_table(groups, dtype, torch.device("cpu")), s, feedback)


def identity_rule(dtype: torch.dtype) -> Update:
    """D = g."""
    return Update(SGD.kind, torch.tensor([PLAIN], dtype=dtype), 0.0, False)


def bits(v: Tensor) -> Tensor:
    """The bits, all NaN made alike."""
    return torch.where(v.isnan(), torch.nan, v).view(torch.int32 if v.dtype == torch.float32 else torch.int64)


def assert_same(theirs: Tensor, ours: Tensor) -> None:
    assert torch.equal(bits(theirs), bits(ours.cpu()))


def assert_same_message(layout: codec.Layout, dtype: torch.dtype, theirs: Tensor, ours: Tensor) -> None:
    ours, head = ours.cpu(), layout.scalars * dtype.itemsize
    assert torch.equal(theirs[head:], ours[head:])
    table = layout.table
    rows = table[(table[:, KIND] == ScaledSign.kind) & (table[:, UNIT] == 0)]
    scale = torch.zeros(layout.scalars, dtype=torch.bool).index_fill(0, rows[:, FLOAT], True)
    a, b = codec.scalars(layout.scalars, theirs, dtype), codec.scalars(layout.scalars, ours, dtype)
    assert_same(a[~scale], b[~scale])
    torch.testing.assert_close(a[scale], b[scale], rtol=SCALE_TOLERANCE[dtype], atol=0, equal_nan=True)


def copied(arg: object, device: torch.device) -> object:
    """A copy on `device`; of messages, in rows of a wider buffer, since a backend has to mind the stride."""
    if isinstance(arg, Update):
        return arg._replace(hyper=arg.hyper.to(device))
    if isinstance(arg, Worker):
        return Worker(*(v.to(device, copy=True) for v in arg))
    if not isinstance(arg, Tensor):
        return arg
    if arg.dtype == torch.uint8 and arg.dim() == 2:
        wide = torch.full((len(arg), arg.shape[1] + 16), 171, dtype=torch.uint8, device=device)
        return wide[:, 8:-8].copy_(arg)
    return arg.to(device, copy=True)


def call(backend: object, device: torch.device, name: str, *args: object) -> list[Tensor]:
    """Call a kernel on copies of `args` on `device`; the copies that are tensors."""
    copies = [copied(arg, device) for arg in args]
    getattr(backend, name)(*copies)
    if backend is cuda:
        cuda.check(device)
    return tensors(copies)


def tensors(args: Sequence[object]) -> list[Tensor]:
    """Those among arguments, with a worker's."""
    flat = [part for arg in args for part in (arg if isinstance(arg, Worker) else [arg])]
    return [arg for arg in flat if isinstance(arg, Tensor)]


def only(g: Tensor) -> Worker:
    """A worker that has nothing but a gradient."""
    return Worker(g, g.new_empty(0, 0), g[:0], g[:0])


def agree(device: torch.device, name: str, *args: object, layout: codec.Layout | None = None) -> Tensor:
    """Both backends do the same to `args`; of which the last is a message if its `layout` is given.

    Returns the reference's last argument.
    """
    theirs, ours = call(reference, torch.device("cpu"), name, *args), call(cuda, device, name, *args)
    if layout is not None:
        dtype = next(arg.dtype for arg in theirs if arg.is_floating_point())
        assert_same_message(layout, dtype, theirs[-1], ours[-1])
        theirs, ours = [*theirs[:-1], theirs[-1]], ours[:-1]
    for a, b in zip(theirs, ours, strict=False):
        if a.is_floating_point():
            assert_same(a, b)
        else:
            assert torch.equal(a, b.cpu())
    return theirs[-1]


def agree_on_all(device: torch.device, scene: Scene, rule: Update, K: int, *, momentum: bool = True) -> None:
    """The five kernels in the order of a step."""
    up, down, table = scene.up, scene.down_served, scene.up_served.table
    m = scene.m if momentum else scene.m[:0]
    worker = (rule, scene.worker._replace(m=m))
    message = agree(device, "compress", up.table, *worker, scene.message(up), layout=up)
    agree(device, "commit", up.table, *worker, message)
    messages = scene.messages(K, rule._replace(feedback=True))
    error, empty = scene.e_server, scene.message(down)
    reply = agree(device, "serve", table, down.table, messages, error, empty, layout=down)
    agree(device, "settle", table, down.table, messages, error, reply)
    agree(device, "subtract", scene.down.table, ONCE[rule.hyper.dtype], reply, scene.x)


# ---- agreement ----------------------------------------------------------------------------------------------

SIZES = [1, 7, 8, 9, 1000, 2047, 2048, 2049, 4100]
CODES = [ScaledSign(), MajorityVote(), TopK(0.1), Identity()]
CODES += [TopK(0.1, values=torch.bfloat16), Identity(values=torch.bfloat16)]


@both_dtypes
@pytest.mark.parametrize("code", CODES, ids=repr)
def test_each_code_on_blocks_of_many_sizes(device: torch.device, code: Compressor, dtype: torch.dtype) -> None:
    sizes = SIZES if code.kind != TopK.kind or CUDA else SIZES[2::3]  # the interpreter takes its time
    scene = Scene([(code, code, n) for n in sizes], dtype, groups=3)
    agree_on_all(device, scene, rule_of(dtype), K=2)


MIXTURE = [
    (ScaledSign(), TopK(0.1), 9),
    (TopK(0.25), ScaledSign(), 1000),
    (Identity(), Identity(), 7),
    (MajorityVote(), MajorityVote(), 8),
    (TopK(0.5), Identity(), 1),
    (TopK(0.1), TopK(0.02), 2100),
    (Identity(), TopK(1.0), 300),
    (ScaledSign(), ScaledSign(), 2500),
    (TopK(0.1, values=torch.bfloat16), Identity(values=torch.bfloat16), 700),
    (Identity(values=torch.bfloat16), TopK(0.05, values=torch.bfloat16), 2300),
]


@pytest.mark.parametrize("K", [1, 2, 3, 4, 8])
def test_codes_mixed_in_one_table(device: torch.device, K: int) -> None:
    dtype = torch.float64 if K == 3 else torch.float32
    agree_on_all(device, Scene(MIXTURE, dtype, groups=3), rule_of(dtype), K)


def test_server_without_error(device: torch.device) -> None:
    scene = Scene(MIXTURE, torch.float32)
    tables, down = (scene.up_served.table, scene.down_served.table), scene.down_served
    messages = scene.messages(2, rule_of(torch.float32))
    agree(device, "serve", *tables, messages, scene.e_server[:0], scene.message(down), layout=down)


@both_dtypes
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("s", [0.0, 0.5, 1.0, 0.3])
def test_local_rules(device: torch.device, s: float, feedback: bool, momentum: bool, dtype: torch.dtype) -> None:
    scene = Scene([(Identity(), Identity(), n) for n in (20, 1, 33)], dtype, groups=3)
    m = scene.m if momentum else scene.m[:0]
    worker = (rule_of(dtype, s, feedback), scene.worker._replace(m=m))
    message = agree(device, "compress", scene.up.table, *worker, scene.message(scene.up), layout=scene.up)
    agree(device, "commit", scene.up.table, *worker, message)


@both_dtypes
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("s", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("data", ["normal", "spread", "zeros", "denormal", "NaN and Inf"])
def test_adamw(device: torch.device, data: str, s: float, feedback: bool, dtype: torch.dtype) -> None:
    """Two vectors, with and without a length that 4 divides; roots and quotients are rounded to nearest."""
    scene = Scene([(Identity(), Identity(), n) for n in (20, 1, 33)], dtype, groups=3)
    g, first = scene.g, scene.m[0]
    if data == "spread":
        g = g * torch.logspace(-30, 18, len(g), dtype=torch.float64).to(dtype)
    elif data == "zeros":
        g, first = g * 0.0, first * 0.0
    elif data == "denormal":
        g = g * torch.finfo(dtype).tiny
    elif data == "NaN and Inf":
        g = torch.where(
            torch.arange(len(g)) % 5 == 0, torch.nan, torch.where(torch.arange(len(g)) % 5 == 1, torch.inf, g)
        )
    second = first.flip(0) ** 2 - 0.2  # some of it negative
    for short in (0, len(first) % 4):
        keep = slice(0, len(first) - short)
        m = torch.stack([first[keep], second[keep]])
        rows = scene.up.table[:2] if short else scene.up.table
        worker = Worker(g, m, scene.e[keep], scene.x[keep])
        message = scene.message(scene.up)
        message = agree(device, "compress", rows, adamw_of(dtype, s, feedback), worker, message, layout=scene.up)
        agree(device, "commit", rows, adamw_of(dtype, s, feedback), worker, message)


@both_dtypes
def test_adamw_in_blocks_of_many_kinds(device: torch.device, dtype: torch.dtype) -> None:
    scene = Scene(MIXTURE, dtype, groups=3)
    scene.m = torch.stack([scene.m[0], scene.m[0].flip(0) ** 2])
    up, worker = scene.up, (adamw_of(dtype), scene.worker)
    message = agree(device, "compress", up.table, *worker, scene.message(up), layout=up)
    agree(device, "commit", up.table, *worker, message)


@both_dtypes
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("ahead", [0.0, 1.0, 0.3])
def test_advance(device: torch.device, ahead: float, feedback: bool, dtype: torch.dtype) -> None:
    """Each group with its own rate. Without feedback there is no e, and nothing to step ahead by."""
    if not feedback and ahead:
        pytest.skip("a method without errors does not step ahead")
    scene = Scene(MIXTURE, dtype, groups=3)
    update, worker = rule_of(dtype, 0.0, feedback), scene.worker
    if not feedback:
        update.hyper[:, DECAY] = 0.0
        worker = worker._replace(e=worker.e[:0])
    message, reply = scene.messages(1, rule_of(dtype))[0], scene.message(scene.down)
    reference.serve(scene.up_served.table, scene.down_served.table, message[None], scene.e_server, reply)
    rates = torch.tensor([1.0, 0.3, 0.07], dtype=dtype)
    arguments = (update, worker, message, rates, reply, scene.x * 0.5, ahead)
    agree(device, "advance", scene.up.table, scene.down.table, *arguments)
    agree(device, "subtract", scene.down.table, rates, reply, scene.x)


def test_rules_and_blocks_that_are_not_known_are_refused(device: torch.device) -> None:
    scene = Scene([(ScaledSign(), ScaledSign(), 9)], torch.float32)
    unknown = rule_of(torch.float32)._replace(kind=99)
    for name in ("compress", "commit"):
        with pytest.raises(ValueError, match="rule kind 99"):
            call(cuda, device, name, scene.up.table, unknown, scene.worker, scene.message(scene.up))
    table = scene.up.table.clone()
    table[0, KIND] = 7
    with pytest.raises(ValueError, match="block of kind 7"):
        call(cuda, device, "subtract", table, ONCE[torch.float32], scene.message(scene.up), scene.x)


LARGE = [(TopK(0.01, "layer"), 1 << 16), (TopK(0.01, "layer"), 70_001), (ScaledSign("layer"), 70_001)]


@pytest.mark.parametrize(("code", "n"), LARGE, ids=str)
def test_large_blocks(device: torch.device, code: Compressor, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:
        monkeypatch.setattr(cuda.constants, "TILE", 1 << 14)  # the interpreter takes its time per program
    scene = Scene([(code, code, n)], torch.float32)
    worker = (rule_of(torch.float32), scene.worker)
    message = scene.message(scene.up)
    message = agree(device, "compress", scene.up.table, *worker, message, layout=scene.up)
    agree(device, "commit", scene.up.table, *worker, message)
    agree(device, "subtract", scene.up.table, ONCE[scene.dtype], message, scene.x)


@both_dtypes
@pytest.mark.parametrize("code", [TopK(0.1, "layer"), ScaledSign("layer")], ids=repr)
def test_blocks_of_many_tiles(
    device: torch.device, code: Compressor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tiles than a program looks at in one go."""
    n = 3_000_000
    if not CUDA:
        monkeypatch.setattr(cuda.constants, "TILE", 64)
        monkeypatch.setattr(cuda.constants, "SPAN", 2)
        monkeypatch.setattr(cuda.constants, "WIDTH", 4)
        for module in (cuda.codes, cuda.programs, cuda.radix):
            monkeypatch.setattr(module, "_CHUNK", type(cuda.constants._CHUNK)(4))
        n = 600
    scene = Scene([(code, code, m) for m in (n, 5)], dtype)
    g = torch.round(scene.g * 8)  # many ties
    worker = (rule_of(dtype), Worker(g, scene.m[:0], scene.e * 0, scene.x))
    message = scene.message(scene.up)
    message = agree(device, "compress", scene.up.table, *worker, message, layout=scene.up)
    agree(device, "subtract", scene.up.table, ONCE[scene.dtype], message, scene.x)


@pytest.mark.parametrize("sampled", ["far too large", "zero", "all there is"])
def test_a_sample_that_misleads(device: torch.device, sampled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar of a large block may be too high, or let everything through: the selection is the same."""
    tile, runs = (64, 2) if device.type == "cpu" else (4096, 128)
    monkeypatch.setattr(cuda.constants, "TILE", tile)
    n = 20 * tile + 7
    scene = Scene([(TopK(0.2, "layer"), TopK(0.2, "layer"), n)], torch.float32)
    lane = torch.arange(tile)
    seen = lane // 32 * (n - 32) // (runs - 1) + lane % 32  # as `cuda.radix.sampled`
    row = scene.up.table[0].tolist()
    for v, at in ((scene.g, row[GRAD]), (scene.e_server, int(scene.down_served.table[0, STATE]))):
        block = v[at : at + n]
        if sampled == "far too large":
            block[seen] = 1e6
        elif sampled == "zero":
            block[seen] = 0.0
        else:
            block[torch.ones(n).index_fill_(0, seen, 0).bool()] = 0.0
    message = scene.message(scene.up)
    rule = identity_rule(torch.float32)
    agree(device, "compress", scene.up.table, rule, only(scene.g), message, layout=scene.up)
    messages = scene.messages(2, rule)
    tables, reply = (scene.up_served.table, scene.down_served.table), scene.message(scene.down_served)
    agree(device, "serve", *tables, messages, scene.e_server, reply, layout=scene.down_served)
    agree(device, "serve", *tables, messages, scene.e_server[:0], reply, layout=scene.down_served)


def test_x_in_the_parameters_own_storage(device: torch.device) -> None:
    """`OnCUDA` against `Copies` with the reference: also where x is given other storage between steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 50))
    twin = copy.deepcopy(net)
    net = net.to(device)
    ours, theirs = (kind(n, torch.optim.SGD(n.parameters()), 0.3) for kind, n in ((OnCUDA, net), (Copies, twin)))
    ours._kernels, theirs._kernels = cuda, reference
    code, numels, d = TopK(0.1, 64), ours.numels, len(ours.flat)
    placement = place(numels, [0] * 4, code, code, "replicated", 1, 0)
    for t in range(4):
        g, m, e = torch.randn(3, d)
        plans = Plans(placement, theirs.parameters, torch.float32)
        ((_, _, plan),), _ = plans.find(theirs.parameters, list(g.split(numels)), g)
        rule = identity_rule(torch.float32)._replace(feedback=True)
        message, rates = torch.zeros(plan.send.message_bytes, dtype=torch.uint8), torch.ones(1)
        reference.compress(plan.send.table, rule, Worker(g, m[None], e, theirs.flat), message)
        for weights, at in ((ours, device), (theirs, torch.device("cpu"))):
            weights.absorb()
            here = Worker(*(v.to(at, copy=True) for v in (g, m[None], e, weights.x_half()[0])))
            there = [v.to(at) for v in (rates, message)]
            weights.commit(plan.to(at), rule._replace(hyper=rule.hyper.to(at)), there[0], here, there[1], there[1])
            weights.committed()
            weights.step_ahead(here.e, slice(0, 0))
            weights.enter()
        for a, b in zip(net.parameters(), twin.parameters(), strict=True):
            assert_same(b.detach(), a.detach())
        for weights in (ours, theirs):
            assert weights.leave() == []
        for a, b in zip(ours.parts(), theirs.parts(), strict=True):
            assert_same(b, a)
        if t == 1:
            net[0].weight.data = net[0].weight.data.clone()
        if t == 2:
            for n in (net, twin):
                n[1].bias.data.mul_(0.5)


def test_indices_of_four_bytes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    n = (1 << 24) + 9
    if not CUDA:
        monkeypatch.setattr(cuda.constants, "TILE", 1 << 20)
    kept = [0, 5, 1 << 8, 1 << 16, (1 << 24) - 1, 1 << 24, n - 1]
    code = TopK(7 / n, "layer")
    layout = codec.lay_out([codec.Block(code, code, 0, 0, 0, n, 0)], 4, reply=False, served=False)
    g = torch.zeros(n)
    g[kept] = torch.tensor([1.0, -2, 3, 4, -5, 6, 7])
    message = torch.zeros(layout.message_bytes, dtype=torch.uint8)
    message[:28] = g[kept].view(torch.uint8)
    message[28:56] = torch.tensor([index >> shift & 255 for index in kept for shift in (0, 8, 16, 24)])
    assert call(cuda, device, "subtract", layout.table, ONCE[g.dtype], message, g)[-1].count_nonzero() == 0
    if CUDA:  # takes the interpreter half a minute
        rule, empty = identity_rule(torch.float32), torch.zeros_like(message)
        got = call(cuda, device, "compress", layout.table, rule, only(g), empty)[-1]
        assert torch.equal(got.cpu(), message)


def values(name: str, n: int, dtype: torch.dtype) -> Tensor:
    generator, info = torch.Generator().manual_seed(n), torch.finfo(dtype)
    v = torch.randn(n, dtype=dtype, generator=generator)
    some = torch.rand(n, generator=generator)
    tiny = info.smallest_normal * info.eps  # the least denormal
    if name == "zero":
        return torch.where(some < 0.5, 0.0, -0.0).to(dtype)
    if name == "nearly zero":
        return torch.where(some < 0.01, v, torch.where(some < 0.5, 0.0, -0.0))
    if name == "ties":
        return torch.randint(-3, 4, (n,), generator=generator).to(dtype)
    if name == "all tied":
        return torch.where(some < 0.5, 1.5, -1.5).to(dtype)
    if name == "last digits":  # equal but for the lowest 12 bits of the mantissa
        return 1 + torch.randint(0, 4096, (n,), generator=generator).to(dtype) * info.eps
    if name == "denormal":
        return torch.randint(-9, 10, (n,), generator=generator).to(dtype) * tiny
    if name == "huge":
        return torch.where(some < 0.5, info.max / 4 * v.sign(), v * info.smallest_normal)
    if name == "infinite":
        return torch.where(some < 0.05, torch.inf * v.sign(), v)
    if name == "NaN":
        negative = -torch.full((n,), torch.nan, dtype=dtype)
        v = torch.where(some < 0.03, torch.nan, torch.where(some < 0.06, negative, v))
        return torch.where(some > 0.95, torch.inf, v)
    return v * 10.0 ** torch.randint(-30, 30, (n,), generator=generator).to(dtype)  # "spread"


VALUES = ["zero", "nearly zero", "ties", "all tied", "last digits", "denormal", "huge", "infinite", "NaN", "spread"]


@both_dtypes
@pytest.mark.parametrize("name", VALUES)
def test_special_values(device: torch.device, name: str, dtype: torch.dtype) -> None:
    codes = [(ScaledSign(), 300), (MajorityVote(), 100), (TopK(0.1), 300), (TopK(0.01), 2500)]
    scene = Scene([(code, code, n) for code, n in codes], dtype)
    scene.g = values(name, len(scene.g), dtype)
    up = scene.up
    rule = identity_rule(dtype)
    message = agree(device, "compress", up.table, rule, only(scene.g), scene.message(up), layout=up)
    agree(device, "subtract", up.table, ONCE[dtype], message, scene.x)


def test_mean_is_summed_in_rank_order(device: torch.device) -> None:
    """1e8, 1, -1e8 in float32: any other order of summation gives another mean."""
    for code in (Identity(), TopK(1.0), ScaledSign()):
        scene = Scene([(code, Identity(), 20)], torch.float32)
        rows = []
        for value in (1e8, 1.0, -1e8, 0.25):
            g = torch.full_like(scene.g, value)
            message = scene.message(scene.up)
            reference.compress(scene.up.table, identity_rule(g.dtype), only(g), message)
            rows.append(message)
        tables = scene.up_served.table, scene.down_served.table
        for order in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0]):
            messages = torch.stack([rows[k] for k in order])
            error = scene.e_server
            reply = scene.message(scene.down)
            agree(device, "serve", *tables, messages, error, reply, layout=scene.down_served)


def test_empty_table(device: torch.device) -> None:
    scene = Scene([], torch.float32)
    agree_on_all(device, scene, rule_of(torch.float32), K=2)


def test_codec(device: torch.device) -> None:
    tensors = [torch.randn(3, 5), torch.randn(4000), torch.randn(1)]
    for code in CODES:
        theirs = codec.Codec(code, [15, 4000, 1], backend=reference)
        ours = codec.Codec(code, [15, 4000, 1], backend=cuda)
        message = theirs.encode(tensors)
        got = ours.encode([t.to(device) for t in tensors])
        assert_same_message(theirs.layout, torch.float32, message, got)
        for a, b in zip(theirs.decode(message), ours.decode(message.to(device)), strict=True):
            assert_same(a, b)


def test_the_good_path_does_not_wait_for_the_device(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("needs a CUDA device")
    scene = Scene([(TopK(0.1), ScaledSign(), 5000), (ScaledSign(), TopK(0.1), 5000)], torch.float32)
    up, down, served = (t.table.to(device) for t in (scene.up, scene.down_served, scene.up_served))
    rule = rule_of(torch.float32)
    rule = rule._replace(hyper=rule.hyper.to(device))
    worker, x, error = Worker(*(v.to(device) for v in scene.worker)), scene.x.to(device), scene.e_server.to(device)
    half, once = x.clone(), torch.ones(1, device=device)
    message, reply = scene.message(scene.up).to(device), scene.message(scene.down).to(device)
    for mode in ("default", "error"):  # the first round compiles, and cuts the tables into tiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            cuda.compress(up, rule, worker, message)
            cuda.commit(up, rule, worker, message)
            cuda.serve(served, down, message[None], error, reply)
            cuda.settle(served, down, message[None], error, reply)
            cuda.subtract(up, once, message, x)
            cuda.advance(up, up, rule, worker, message, once, message, half, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    cuda.check(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_fingerprints(device: torch.device, dtype: torch.dtype) -> None:
    """Any change of an entry's bits shows, and where; each is what the CPU's kernel gives."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator).to(device, dtype) for n in (1, 5, 0, 16_384, 16_385, 70_000)]
    addresses = [v.data_ptr() for v in tensors]
    sizes = [v.numel() * v.element_size() for v in tensors]

    def prints() -> Tensor:
        return cuda_prints.fingerprints(addresses, sizes, device).cpu()

    found = prints()
    assert torch.equal(found, prints())
    if dtype.itemsize >= 4:  # else what follows the last entry counts
        assert all(
            int(f) == int(cpu.fingerprints([v.data_ptr()], [v.numel() * v.element_size()]))
            for f, v in zip(found, (v.cpu() for v in tensors), strict=True)
        )

    def changed(edit: Callable[[Tensor], object], k: int) -> list[int]:
        before = tensors[k].clone()
        edit(tensors[k])
        where = (prints() != found).nonzero().view(-1).tolist()
        tensors[k].copy_(before)
        return where

    for k, v in enumerate(tensors):
        if len(v):
            assert changed(lambda v: v[-1].neg_(), k) == changed(lambda v: v.mul_(2), k) == [k]
        if len(v) > 1:
            assert changed(lambda v: v.copy_(v.roll(1)), k) == changed(lambda v: v.neg_(), k) == [k]
    assert len(cuda_prints.fingerprints([], [], device)) == 0


# ---- malformed messages ------------------------------------------------------------------------------------


def outcome(backend: object, device: torch.device, name: str, *args: object) -> tuple[str, list[Tensor]]:
    """What a kernel raises, and its arguments afterwards."""
    copies, error = [copied(arg, device) for arg in args], ""
    try:
        getattr(backend, name)(*copies)
        if backend is cuda:
            cuda.check(device)
    except ValueError as raised:
        error = str(raised)
    return error, [copy.cpu() for copy in tensors(copies)]


def assert_gaps_untouched(table: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    for old, new in zip(before, after, strict=True):
        gaps = torch.ones(len(old), dtype=torch.bool)
        for row in table.tolist():
            gaps[row[STATE] : row[STATE] + row[NUMEL]] = False
        assert gaps.sum() > len(table)
        assert torch.equal(old[gaps], new[gaps])


def assert_same_outcome(device: torch.device, table: Tensor, name: str, *args: Tensor) -> str:
    """Both raise the same (which is returned), or do the same; ours leaves alone what is between the blocks."""
    expected, theirs = outcome(reference, torch.device("cpu"), name, *args)
    got, ours = outcome(cuda, device, name, *args)
    assert got == expected
    vectors = [i for i, arg in enumerate(args) if arg.is_floating_point() and arg is not ONCE[arg.dtype]]
    assert_gaps_untouched(table, [args[i] for i in vectors], [ours[i] for i in vectors])
    if not expected:
        for i in vectors:
            assert_same(theirs[i], ours[i])
    return expected


def set_index(message: Tensor, row: list[int], j: int, index: int) -> None:
    width = index_bytes(row[NUMEL])
    start = row[BYTE] + j * width
    message[start : start + width] = torch.tensor([index >> 8 * b & 255 for b in range(width)])


def damaged(scene: Scene, number: int, damage: str) -> Tensor:
    """A message of the scene's blocks whose block `number` has wrong indices."""
    message = scene.messages(1, rule_of(scene.dtype))[0].clone()
    row = scene.up.table[number].tolist()
    n, k = row[NUMEL], row[COUNT]
    spaced = [j * (n - 1) // (k - 1) for j in range(k)]
    for j, index in enumerate(spaced):
        set_index(message, row, j, index)
    if damage == "beyond the end":
        set_index(message, row, k - 1, n)
    elif damage == "far beyond the end":
        set_index(message, row, k - 1, 256 ** index_bytes(n) - 1)
    elif damage == "twice":
        set_index(message, row, k // 2, spaced[k // 2 - 1])
    elif damage == "swapped":
        set_index(message, row, 0, spaced[k - 1])
        set_index(message, row, k - 1, spaced[0])
    elif damage == "all zero":
        message[row[BYTE] : row[BYTE] + k * index_bytes(n)] = 0
    elif damage == "all ones":
        message[row[BYTE] : row[BYTE] + k * index_bytes(n)] = 255
    return message


DAMAGES = ["none", "beyond the end", "far beyond the end", "twice", "swapped", "all zero", "all ones"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_indices(device: torch.device, damage: str) -> None:
    codes = [(TopK(0.1), TopK(0.1), n) for n in (50, 2500)]
    scene = Scene(codes, torch.float32, groups=3)
    table = scene.up.table
    for number in (0, 1) if CUDA else (0,):
        message = damaged(scene, number, damage)
        said = assert_same_outcome(device, table, "subtract", table, ONCE[torch.float32], message, scene.x)
        assert (f"block {number} " in said) == (damage != "none")
        assert assert_same_outcome(device, table, "inspect", table, message) == said
    message = damaged(scene, 1, damage)
    worker = (rule_of(torch.float32), scene.worker)
    expected, _ = outcome(reference, torch.device("cpu"), "commit", table, *worker, message)
    got, after = outcome(cuda, device, "commit", table, *worker, message)
    assert got == expected
    assert_gaps_untouched(table, [scene.m[0], scene.e], [after[2][0], after[3]])
    tables = scene.up_served.table, scene.down_served.table
    good = damaged(scene, 1, "none")
    for sent, answer in (([message, good], good), ([good, message], good), ([good], message)):
        messages = torch.stack(sent)
        said = assert_same_outcome(device, tables[1], "settle", *tables, messages, scene.e_server, answer)
        assert ("block 1 " in said) == (damage != "none")


def test_serve_refuses_and_writes_inside_the_reply(device: torch.device) -> None:
    scene = Scene([(TopK(0.1), TopK(0.1), n) for n in (50, 5000)], torch.float32, groups=2)
    tables = scene.up_served.table, scene.down_served.table
    size = scene.down_served.message_bytes
    buffer = torch.full((size + 64,), 171, dtype=torch.uint8, device=device)
    messages = torch.stack([damaged(scene, 1, "all ones"), damaged(scene, 0, "twice")]).to(device)
    with pytest.raises(ValueError, match="block 0 "):
        cuda.serve(*(t.to(device) for t in tables), messages, scene.e_server.to(device), buffer[32 : 32 + size])
        cuda.check(device)
    assert (buffer[:32] == 171).all()
    assert (buffer[32 + size :] == 171).all()
    cuda.check(device)  # a row is reported once


def test_random_bytes(device: torch.device) -> None:
    """Anything may arrive: both decode it, or both refuse it, and nothing is written beyond the blocks."""
    scene = Scene(MIXTURE, torch.float32)
    few = Scene([(TopK(0.5), TopK(0.5), n) for n in (256, 1, 4)], torch.float32)
    generator, refused = torch.Generator().manual_seed(0), 0
    for trial in range(24):
        chosen = scene if trial < 4 else few
        message = torch.randint(0, 256, (chosen.up.message_bytes,), generator=generator).to(torch.uint8)
        if chosen is few:  # indices in order now and then
            start = int(few.up.table[0, BYTE])
            message[start : start + 128] = torch.randperm(256, generator=generator)[:128].sort().values
            message[start + 128] = 0
            message[start + 129 :] %= 4
        table = chosen.up.table
        said = assert_same_outcome(device, table, "subtract", table, ONCE[torch.float32], message, chosen.x)
        assert assert_same_outcome(device, table, "inspect", table, message) == said
        refused += bool(said)
    assert 8 <= refused < 22


@pytest.mark.parametrize("name", ["sign", "mixed"])
def test_hostile_bytes(device: torch.device, name: str) -> None:
    """A short form of `fuzz.py`, which looks at what it must."""
    count, decoded = fuzz.fuzz(name, 16, backend=cuda, device=str(device), every=1)
    assert 0 < decoded < count


# ---- compiling ---------------------------------------------------------------------------------------------


COMPILE = """
import re, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:  # what compiling asks of a driver
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

triton.runtime.driver.set_active(Driver())
compiled, run = [], JITFunction.run
JITFunction.run = lambda self, *args, warmup, **options: compiled.append(run(self, *args, warmup=True, **options))

from saef.rules.sgd import SGD
from saef.wire import codec
from saef.wire.compressors import ScaledSign, TopK
from saef.wire.kernels import cuda
from saef.wire.kernels.table import Update, Worker

for dtype in (torch.float32, torch.float64):
    numels = (10, 5000)
    blocks = [codec.Block(c, c, 0, 0, 0, n, 0) for c in (ScaledSign(), TopK(0.1)) for n in numels]
    layout = codec.lay_out(blocks, dtype.itemsize, reply=False, served=False)
    table, rule = layout.table, Update(SGD.kind, torch.zeros(1, 6, dtype=dtype), 0.5, True)
    g, m, e, x = torch.zeros(4, 5000, dtype=dtype)
    worker, once = Worker(g, m[None], e, x), torch.ones(1, dtype=dtype)
    message = torch.zeros(layout.message_bytes, dtype=torch.uint8)
    messages = message.repeat(3, 1)
    cuda.compress(table, rule, worker, message)
    cuda.commit(table, rule, worker, message)
    cuda.serve(table, table, messages, e, message)
    cuda.settle(table, table, messages, e, message)
    cuda.subtract(table, once, message, x)
    cuda.inspect(table, message)
    cuda.advance(table, table, rule, worker, message, once, message, g, 1.0)

ptx = {}
for kernel in compiled:
    ptx.setdefault(kernel.metadata.name, []).append(kernel.asm["ptx"])
print(sorted(ptx))
for name, texts in ptx.items():
    for text in texts:
        for line in text.splitlines():
            assert not re.search(r"\\bfma\\.|\\.ftz|\\.approx|div\\.full", line), (name, line)
print("checked")
"""


def test_kernels_compile_for_hopper() -> None:
    """What the interpreter forgives, the compiler may not; it needs no GPU.

    The reference rounds products and sums separately, and denormals are numbers: hence no fma and no ftz.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names, checked = done.stdout.splitlines()
    assert names.count("'") == 2 * 13
    assert checked == "checked"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "saef.wire.kernels.cuda")
    with pytest.raises(ImportError, match="pip install triton"):
        importlib.import_module("saef.wire.kernels.cuda")
