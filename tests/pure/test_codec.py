"""The wire format: its length by hand, its bytes by hand, the way there and back, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saef import Codec, Compressor, Identity, MajorityVote, MinSize, ScaledSign, TopK, message_bytes
from saef.wire.codec import Block, block_ranges, lay_out
from saef.wire.compressors import Sign
from saef.wire.kernels import cpu, reference
from saef.wire.kernels.table import BYTE, FLOAT, STATE
from saef.wire.plan import partition, place, plan_bucket

DTYPES = (torch.float32, torch.float64)
both_backends = pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Torch's threads wait for each other; beside other ranks' that takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def padded(n_bytes):
    return math.ceil(n_bytes / 8) * 8


# --- length -------------------------------------------------------------------------------------------------


@both_dtypes
def test_bytes_of_a_sign_message(dtype):
    """A scalar a block and ceil(n / 8) bytes of bits a block, in all a multiple of 8."""
    s = dtype.itemsize
    assert message_bytes(ScaledSign("layer"), [64], dtype) == 16  # 4 or 8, and 8
    assert message_bytes(ScaledSign("layer"), [10, 1, 0, 4], dtype) == padded(3 * s + 2 + 1 + 1)
    assert message_bytes(ScaledSign(8), [17, 8, 3], dtype) == padded(5 * s + 1 + 1 + 1 + 1 + 1)
    assert message_bytes(ScaledSign(9), [20], dtype) == padded(3 * s + 2 + 2 + 1)
    assert message_bytes(ScaledSign(1), [20], dtype) == padded(20 * s + 20)
    assert message_bytes(ScaledSign(), [65536 * 3 + 1], dtype) == padded(4 * s + 3 * 8192 + 1)
    assert message_bytes(MajorityVote("layer"), [10, 1, 0, 4], dtype) == padded(3 * s + 2 + 1 + 1)


@both_dtypes
@pytest.mark.parametrize(
    "n, k, width",
    [(1, 1, 1), (255, 1, 1), (256, 1, 1), (257, 2, 2), (65536, 256, 2), (65537, 257, 3),
     (2**24, 65536, 3), (2**24 + 1, 65537, 4)],
)  # fmt: skip
def test_bytes_of_a_top_k_message(dtype, n, k, width):
    """k = ceil(n / 256) values and as many indices."""
    assert message_bytes(TopK(1 / 256, "layer"), [n], dtype) == padded(k * (dtype.itemsize + width))
    assert message_bytes(TopK(1 / 256, n), [n], dtype) == padded(k * (dtype.itemsize + width))


@both_dtypes
def test_bytes_of_a_top_k_message_of_many_blocks(dtype):
    """The width goes by the block at hand, not by the tensor or the largest block."""
    s = dtype.itemsize
    assert message_bytes(TopK(0.5, 256), [257, 4], dtype) == padded((128 + 1 + 2) * (s + 1))
    assert message_bytes(TopK(0.5, 257), [300, 0, 4], dtype) == padded(129 * (s + 2) + (22 + 2) * (s + 1))
    assert message_bytes(TopK(2**-16), [65536 + 65536 + 256], dtype) == padded(2 * (s + 2) + s + 1)


@both_dtypes
def test_bytes_of_dense_and_mixed_messages(dtype):
    s = dtype.itemsize
    assert message_bytes(Identity(), [5, 0, 4], dtype) == padded(9 * s)
    assert message_bytes(MinSize(10, ScaledSign("layer")), [9, 10, 100], dtype) == padded((9 + 2) * s + 2 + 13)
    assert message_bytes(MinSize(10, TopK(0.1, 50)), [9, 10, 100], dtype) == padded(9 * s + (1 + 5 + 5) * (s + 1))
    half = torch.bfloat16
    assert message_bytes(Identity(values=half), [5, 0, 4], dtype) == padded(9 * 2)
    assert message_bytes(MinSize(10, TopK(0.1, 50, values=half)), [9, 10, 100], dtype) == padded(9 * s + 11 * 3)
    assert message_bytes(Identity(), [], dtype) == message_bytes(TopK(), [0, 0], dtype) == 0


@both_dtypes
@pytest.mark.parametrize("C", [ScaledSign(100), TopK(0.1, 300), MinSize(200, TopK(0.1)), Identity(), MajorityVote()])
def test_a_message_is_as_long_as_announced(C, dtype):
    numels = [1000, 1, 0, 257, 64]
    message = Codec(C, numels, dtype).encode([torch.ones(n, dtype=dtype) for n in numels])
    assert message.dtype == torch.uint8 and message.shape == (message_bytes(C, numels, dtype),)
    assert message.numel() % 8 == 0


@pytest.mark.parametrize("K", [1, 2, 4, 8])
@pytest.mark.parametrize("block", ["layer", 4096])
def test_table_1_of_dist_ef(K, block):
    """Double-way sign sends 2 K d + 64 K B bits a step, full precision 64 K d, in float32.

    Padding adds at most 7 bits a block and 7 bytes a message; a worker's message is one message for each server
    (S = 1 replicated, K sharded), and so are the replies. So at most 2 K (7 B + 56 S) bits.
    """
    numels = [9408, 64, 64, 36864, 10, 65537]
    d, B = sum(numels), len([b for n in numels for b in block_ranges(n, n if block == "layer" else block)])
    C = ScaledSign(block)
    for S in (1, K):
        blocks = partition(numels, [0] * len(numels), C, C, S)
        bucket = [(i, sum(numels[:i])) for i in range(len(numels))]
        plan = plan_bucket(blocks, bucket, S, 0, 4)
        bits = 8 * K * (sum(plan.send_bytes) + sum(plan.reply_bytes))
        assert 0 <= bits - (2 * K * d + 64 * K * B) <= 2 * K * (7 * B + 56 * S)
        if S == 1:
            assert bits == 2 * K * 8 * message_bytes(C, numels)
    assert 0 <= 2 * K * 8 * message_bytes(Identity(), numels) - 64 * K * d <= 2 * K * 56


# --- bytes --------------------------------------------------------------------------------------------------


def check_golden(backend, C, tensors, dtype, text, decoded):
    """`tensors` are encoded as the bytes in `text` (hexadecimal, padding left out), and these say `decoded`."""
    codec = Codec(C, [len(t) for t in tensors], dtype, backend)
    expected = bytes.fromhex(text)
    expected += bytes(-len(expected) % 8)
    message = codec.encode([torch.tensor(t, dtype=dtype) for t in tensors])
    assert bytes(message.tolist()).hex(" ") == expected.hex(" ")
    out = codec.decode(torch.tensor(list(expected), dtype=torch.uint8))
    assert [t.tolist() for t in out] == decoded and all(t.dtype == dtype for t in out)


@both_backends
def test_sign_message_by_hand(backend):
    """Blocks of 9 and 1. Bits + - + + + - + -, lowest first: 0b01011101 = 5d; then +; then -. 0 and -0 are +."""
    v = [[1, -1, 0, -0.0, 2, -2, 3, -3, 6, -0.5]]  # scales 18 / 9 and 0.5
    out = [[2, -2, 2, 2, 2, -2, 2, -2, 2, -0.5]]
    check_golden(backend, ScaledSign(9), v, torch.float32, "00000040 0000003f 5d 01 00", out)
    check_golden(backend, ScaledSign(9), v, torch.float64, "0000000000000040 000000000000e03f 5d 01 00", out)


@both_backends
def test_vote_message_by_hand(backend):
    out = [[1, -1, 1, 1, 1, -1, 1, -1, 1, -1]]
    v = [[1, -1, 0, -0.0, 2, -2, 3, -3, 6, -0.5]]
    check_golden(backend, MajorityVote(9), v, torch.float32, "0000803f 0000803f 5d 01 00", out)
    check_golden(backend, MajorityVote("layer"), v, torch.float64, "000000000000f03f 5d 01", out)


@both_backends
def test_top_k_message_by_hand(backend):
    """Values by index, not by size; then indices 1, 258 = 0x0102, 299 = 0x012b, the lowest byte first."""
    v = [0.0] * 300
    v[1], v[258], v[299] = -1.0, 3.0, 2.0
    text = "000080bf 00004040 00000040 0100 0201 2b01"
    check_golden(backend, TopK(0.01, "layer"), [v], torch.float32, text, [v])
    text = "000000000000f0bf 0000000000000840 0000000000000040 0100 0201 2b01"
    check_golden(backend, TopK(0.01, "layer"), [v], torch.float64, text, [v])


@both_backends
def test_three_byte_indices_by_hand(backend):
    v = [0.0] * 65537
    v[65536] = -2.0
    check_golden(backend, TopK(1e-9, "layer"), [v], torch.float32, "000000c0 000001", [v])


@both_backends
def test_mixed_message_by_hand(backend):
    """All scalars come first, in the order of the blocks, then all bytes."""
    tensors = [[4, -2, 2, 0], [-1.0, 0.5], [0, 0, 0, 8, 0]]
    text = "00000040 000080bf 0000003f cdcccc3f 0d 1f"  # 8 / 5 in float32 is 0x3fcccccd
    out = [[2, -2, 2, 2], [-1.0, 0.5], [np.float32(1.6).item()] * 5]
    check_golden(backend, MinSize(3, ScaledSign("layer")), tensors, torch.float32, text, out)
    text = "00008040 000080bf 0000003f 00000041 00 03"
    out = [[4, 0, 0, 0], [-1.0, 0.5], [0, 0, 0, 8, 0]]
    check_golden(backend, MinSize(3, TopK(0.2, "layer")), tensors, torch.float32, text, out)


def test_offsets_of_a_layout_in_a_longer_buffer():
    """`start` moves every offset; lengths stay."""
    C = [ScaledSign("layer"), Identity(), TopK(0.5, "layer")]
    blocks = [Block(c, c, 0, 10 * i, 100 + i, 9, 0) for i, c in enumerate(C)]
    at = lay_out(blocks, 4, reply=False, served=False, start=80)
    assert at.table[:, FLOAT].tolist() == [20, 21, 30] and at.scalars == 15
    assert at.table[:, BYTE].tolist() == [140, 142, 142] and at.message_bytes == padded(60 + 2 + 5)
    assert at.table[:, STATE].tolist() == [0, 10, 20]
    assert lay_out(blocks, 4, reply=True, served=True).table[:, STATE].tolist() == [100, 101, 102]


def test_cut():
    assert block_ranges(10, 4) == [(0, 4), (4, 4), (8, 2)]
    assert block_ranges(8, 4) == [(0, 4), (4, 4)] and block_ranges(3, 4) == [(0, 3)]
    assert block_ranges(10, None) == [(0, 10)] and block_ranges(0, None) == block_ranges(0, 4) == []


# --- there and back -----------------------------------------------------------------------------------------


def tolerance(C, expected, n):
    """What may lie between two scales of blocks of at most n coordinates; nothing for other codes.

    Each sums in float64: float32 rounds that once, which gives neighbours at worst. In float64 the n roundings of
    each sum remain, 2 n 2^-53 of the scale, and the rounding of a quotient that is denormal, one unit.
    """
    if not isinstance(C, ScaledSign) or isinstance(C, MajorityVote):
        return torch.zeros_like(expected)
    size = expected.abs()
    ulp = torch.nextafter(size, torch.full_like(size, math.inf)) - size
    return ulp if size.dtype == torch.float32 else ulp + 2 * n * 2.0**-53 * size


def check_there_and_back(C, tensors, backend=None):
    codec = Codec(C, [t.numel() for t in tensors], tensors[0].dtype, backend)
    message = codec.encode(tensors)
    if not all(C(t).isfinite().all() for t in tensors):  # rounded to bfloat16, up
        with pytest.raises(ValueError, match="not finite"):
            codec.decode(message)
        return
    out = codec.decode(message)
    assert len(out) == len(tensors)
    for t, got in zip(tensors, out, strict=True):
        expected = C(t).reshape(-1)
        assert got.dtype == t.dtype and got.shape == expected.shape
        assert ((got - expected).abs() <= tolerance(C.for_tensor(t.numel()), expected, t.numel())).all()


COMPRESSORS = [TopK(0.3, 10, values=torch.bfloat16), Identity(values=torch.bfloat16),
               ScaledSign("layer"), ScaledSign(1), ScaledSign(8), ScaledSign(9), MajorityVote(7), Identity(),
               TopK(0.01, "layer"), TopK(0.3, 10), TopK(1.0, 8), TopK(1e-9, 5),
               MinSize(8, ScaledSign(11)), MinSize(8, TopK(0.5, 11))]  # fmt: skip


def values(dtype):
    """Any finite numbers whose sums stay finite: denormals, huge ones, ties and zeros of both signs among them."""
    bound = 1e300 if dtype == torch.float64 else 3.0000000054977558e38
    some = [0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 2.0**-126, bound, -bound]
    return st.one_of(st.sampled_from(some), st.floats(-bound, bound, width=8 * dtype.itemsize))


@st.composite
def tensor_lists(draw):
    dtype = draw(st.sampled_from(DTYPES))
    numels = draw(st.lists(st.integers(0, 24), min_size=1, max_size=4))
    flat = draw(st.lists(values(dtype), min_size=sum(numels), max_size=sum(numels)))
    return list(torch.tensor(flat, dtype=dtype).split(numels))


@both_backends
@settings(deadline=None, derandomize=True, max_examples=150)
@given(tensors=tensor_lists(), C=st.sampled_from(COMPRESSORS))
def test_decoding_gives_what_the_compressor_keeps(backend, tensors, C):
    check_there_and_back(C, tensors, backend)


@both_dtypes
@pytest.mark.parametrize(
    "C", [ScaledSign(), ScaledSign(1000), TopK(0.01), TopK(0.05, "layer", values=torch.bfloat16), Identity()]
)
def test_decoding_gives_what_the_compressor_keeps_of_large_tensors(C, dtype):
    gen = torch.Generator().manual_seed(3)
    tensors = [torch.randn(n, dtype=dtype, generator=gen) for n in (70000, 1, 65536, 257)]
    tensors[0][::5] = tensors[0][0]  # ties
    tensors[2][::2] = 0
    check_there_and_back(C, tensors)


@pytest.mark.parametrize("C", COMPRESSORS)
def test_tensors_of_any_shape_and_stride(C):
    v = torch.arange(-15, 15.0).view(5, 6)
    check_there_and_back(C, [v, v.t(), v[::2, 1::3], torch.tensor(-3.0), v[:0]])
    x = torch.ones(3, requires_grad=True)
    assert not Codec(C, [3]).encode([x]).requires_grad


def test_a_message_may_be_any_slice():
    codec = Codec(TopK(0.5, "layer"), [9])
    message = codec.encode([torch.arange(9.0)])
    for step, offset in ((1, 3), (2, 1)):  # not aligned; not contiguous
        buffer = torch.zeros(100, dtype=torch.uint8)
        part = buffer[offset::step][: message.numel()]
        part.copy_(message)
        assert codec.decode(part)[0].tolist() == [0, 0, 0, 0, 4, 5, 6, 7, 8]


def test_decoding_does_not_change_the_message():
    codec = Codec(ScaledSign("layer"), [9])
    message = codec.encode([torch.arange(9.0)])
    before = message.clone()
    codec.decode(message)[0].fill_(7)
    assert torch.equal(message, before)


def test_no_tensors_at_all():
    for C in COMPRESSORS:
        codec = Codec(C, [])
        assert codec.encode([]).shape == (0,) and codec.decode(torch.zeros(0, dtype=torch.uint8)) == []


# --- refused ------------------------------------------------------------------------------------------------


def test_other_tensors_are_refused():
    codec = Codec(TopK(), [3, 2])
    a, b = torch.ones(3), torch.ones(2)
    for wrong in ([a], [b, a], [a, b, b], [a.double(), b.double()], [a, b.bfloat16()], [a, b.int()], []):
        with pytest.raises(ValueError, match=r"expected torch.float32 tensors of \[3, 2\] entries"):
            codec.encode(wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32])
def test_other_scalars_on_the_wire_are_refused(dtype):
    with pytest.raises(TypeError, match="scalars are float32 or float64, not torch"):
        Codec(TopK(), [3], dtype)
    with pytest.raises(TypeError, match="scalars are float32 or float64, not torch"):
        message_bytes(TopK(), [3], dtype)


CODECS = {
    "sign": (ScaledSign(9), [20, 3]),
    "vote": (MajorityVote(9), [20, 3]),
    "top-k": (TopK(0.3, 10), [25, 3]),
    "top-k in bfloat16": (TopK(0.3, 10, values=torch.bfloat16), [25, 3]),
    "dense in bfloat16": (Identity(values=torch.bfloat16), [5, 2]),
    "top-k, wide": (TopK(0.01, "layer"), [300, 3]),
    "top-k, chunks": (TopK(0.001, "layer"), [3 * cpu.CHUNK, 3]),
    "dense": (Identity(), [5, 2]),
    "mixed": (MinSize(4, TopK(0.2, 12)), [3, 30]),
}
every_codec = pytest.mark.parametrize("C, numels", CODECS.values(), ids=CODECS)


def sample(C, numels, dtype=torch.float32, backend=None):
    gen = torch.Generator().manual_seed(5)
    codec = Codec(C, numels, dtype, backend)
    return codec, codec.encode([torch.randn(n, dtype=dtype, generator=gen) for n in numels])


@both_backends
@every_codec
def test_a_message_of_another_length_is_refused(backend, C, numels):
    codec, message = sample(C, numels, backend=backend)
    n = message.numel()
    for length in [*range(n), *range(n + 1, n + 17), 2 * n]:
        other = message.repeat(3)[:length]
        with pytest.raises(ValueError, match=f"malformed message: expected {n} bytes, got {length}"):
            codec.decode(other)


@every_codec
def test_a_message_of_another_type_or_shape_is_refused(C, numels):
    codec, message = sample(C, numels)
    for wrong in (message.to(torch.int8), message.float(), message.bool(), message.view(torch.float32),
                  message.view(1, -1), message.view(-1, 8), message[0]):  # fmt: skip
        with pytest.raises(TypeError, match="a message is a 1-D uint8 tensor, got torch"):
            codec.decode(wrong)


@both_backends
@both_dtypes
@every_codec
def test_a_scalar_that_is_not_finite_is_refused(backend, dtype, C, numels):
    codec, message = sample(C, numels, dtype, backend)
    codec.decode(message)
    for i in range(codec.layout.scalars):
        for bad in (math.nan, math.inf, -math.inf):
            damaged = message.clone()
            damaged.view(dtype)[i] = bad
            with pytest.raises(ValueError, match="malformed message: a scale or value is not finite"):
                codec.decode(damaged)


@both_backends
@both_dtypes
@pytest.mark.parametrize(
    "C", [ScaledSign(4), MajorityVote(4), TopK(0.5, 4), Identity(), Identity(values=torch.bfloat16)]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_visible_in_the_message(backend, dtype, C, bad):
    """A sender cannot hide it: wherever it stands, the receiver refuses the message."""
    for i in range(6):
        v = torch.ones(6, dtype=dtype)
        v[i] = bad
        codec = Codec(C, [6], dtype, backend)
        with pytest.raises(ValueError, match="not finite"):
            codec.decode(codec.encode([v]))


INDICES = [([0, 1, 1], "twice"), ([5, 5, 5], "all the same"), ([3, 2, 7], "descending"), ([9, 0, 1], "descending"),
           ([0, 1, 10], "behind the block"), ([0, 10, 2], "behind, then back"), ([253, 254, 255], "far behind"),
           ([0, 8, 3], "descending at the end")]  # fmt: skip


@both_backends
@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("indices", [i for i, _ in INDICES], ids=[name for _, name in INDICES])
def test_indices_out_of_range_or_order_are_refused(backend, indices, block):
    """And the message names the block."""
    codec = Codec(TopK(0.3, 10), [20, 10], backend=backend)
    message = codec.encode([torch.ones(20), torch.ones(10)])
    message[9 * 4 + 3 * block : 9 * 4 + 3 * block + 3] = torch.tensor(indices, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"malformed message: the indices of block {block} are not increasing, or"):
        codec.decode(message)


@both_backends
def test_wide_indices_out_of_range_or_order_are_refused(backend):
    """A block of 300: 299 is its last; 256 after 255 is right although its lowest byte is 0."""
    codec = Codec(TopK(0.01, 300), [300], backend=backend)
    message = codec.encode([torch.ones(300)])

    def decode(*indices):
        packed = np.array(indices, dtype="<u2").view(np.uint8)
        return codec.decode(torch.cat([message[:12], torch.from_numpy(packed), message[18:]]))[0]

    assert decode(255, 256, 299).nonzero().view(-1).tolist() == [255, 256, 299]
    for wrong in ((0, 1, 300), (256, 255, 257), (299, 299, 299), (0, 1, 65535), (512, 513, 514), (1, 256, 1)):
        with pytest.raises(ValueError, match="malformed"):
            decode(*wrong)


def decode_or_refuse(codec, message):
    try:
        return torch.cat(codec.decode(message))
    except ValueError as error:
        assert "malformed" in str(error)
        return None


@every_codec
def test_random_bytes_are_refused_or_decode_to_numbers(C, numels):
    """And both decoders agree which: 300 messages of random bytes, 500 with up to three bytes of a message changed."""
    gen = np.random.default_rng(11)
    fast, message = sample(C, numels, backend=cpu)
    slow, n = Codec(C, numels, backend=reference), message.numel()
    refused = 0
    for trial in range(800):
        damaged = message.clone()
        where = gen.integers(0, n, 3) if trial >= 300 else np.arange(n)
        damaged[torch.from_numpy(where)] = torch.from_numpy(gen.integers(0, 256, len(where), dtype=np.uint8))
        out, expected = decode_or_refuse(fast, damaged), decode_or_refuse(slow, damaged)
        refused += out is None
        assert (out is None) == (expected is None)
        assert out is None or (torch.isfinite(out).all() and torch.equal(out, expected))
    assert 0 < refused < 800


@both_dtypes
@both_backends
@every_codec
def test_no_message_writes_outside_its_blocks(backend, dtype, C, numels):
    """`subtract` into the middle of a longer vector; values are not checked there, indices are."""
    gen, guard = np.random.default_rng(13), 4096
    codec, message = sample(C, numels, dtype)
    d, n, table = sum(numels), message.numel(), codec.layout.table.clone()
    table[:, STATE] += guard
    buffer, once = torch.full((guard + d + guard,), 7.0, dtype=dtype), torch.ones(1, dtype=dtype)
    for trial in range(400 if backend is cpu else 40):
        damaged = message.clone()
        where = gen.integers(0, n, 4) if trial % 2 else np.arange(codec.layout.scalars * dtype.itemsize, n)
        damaged[torch.from_numpy(where)] = torch.from_numpy(gen.integers(0, 256, len(where), dtype=np.uint8))
        said = ["", ""]
        for i, call in enumerate([(backend.subtract, once, damaged, buffer), (backend.inspect, damaged)]):
            try:
                call[0](table, *call[1:])
            except ValueError as error:
                said[i] = str(error)
        assert said[0] == said[1] and ("malformed" in said[0] or not said[0])
        assert (buffer[:guard] == 7).all() and (buffer[guard + d :] == 7).all()


def test_a_compressor_without_a_code_is_refused():
    """By name, where messages are laid out: the kernels would take it for what it inherits from."""

    class Halves(Sign):  # a sign code with other arithmetic
        def compress_block(self, v):
            return v / 2

    for lay in (lambda: Codec(Halves(), [9]), lambda: message_bytes(Halves(), [9])):
        with pytest.raises(TypeError, match="the wire format has no code for Halves"):
            lay()


def test_a_policy_of_ones_own_has_the_code_it_picks():
    class Weights(Compressor):
        def for_tensor(self, numel):
            return TopK(0.5) if numel > 4 else Identity()

    C = Weights()
    assert message_bytes(C, [4, 8]) == message_bytes(MinSize(5, TopK(0.5)), [4, 8])
    check_there_and_back(C, [torch.arange(4.0), torch.arange(8.0)])


def test_a_block_of_an_unknown_kind_is_refused(monkeypatch):
    monkeypatch.setattr(TopK, "kind", 7)
    with pytest.raises(ValueError, match="a block of kind 7"):
        lay_out([Block(TopK(), TopK(), 0, 0, 0, 9, 0)], 4, reply=False, served=False)


def test_place():
    """Replicated: every rank is server 0 of 1; sharded: its own number among all."""
    sizes, groups, C = [100, 50, 8], [0, 1, 0], ScaledSign(10)
    placed = place(sizes, groups, C, C, "replicated", 4, 3)
    assert (placed.strategy, placed.rank, placed.servers) == ("replicated", 0, 1)
    assert placed.blocks == partition(sizes, groups, C, C, 1)
    placed = place(sizes, groups, C, C, "sharded", 4, 3)
    assert (placed.strategy, placed.rank, placed.servers) == ("sharded", 3, 4)
    assert placed.blocks == partition(sizes, groups, C, C, 4)
    with pytest.raises(ValueError, match="got 'both'"):
        place(sizes, groups, C, C, "both", 4, 3)
