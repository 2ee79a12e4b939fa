"""The operator C: by hand, as a contraction in exact arithmetic, against the oracle, and what it refuses."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saef
from saef import Compressor, Exempt, Identity, MajorityVote, MinSize, ScaledSign, TopK
from saef.wire.compressors import DEFAULT_BLOCK, DENSE, SIGN, TOPK, Code, Sign, index_bytes
from support import reference

DTYPES = (torch.float32, torch.float64)
NAN = float("nan")


def vector(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def scale_slack(n, dtype, scale):
    """How far a scale of n coordinates may be from the exact mean, as a Fraction.

    n - 1 additions and a division in float64 err by n 2^-53 relatively (to first order; 1 + n 2^-53 covers the
    rest). Rounding to the dtype: half a unit in the last place, 2^-24 or 2^-53, or half the least denormal.
    """
    unit, least = {torch.float32: (24, 149), torch.float64: (53, 1074)}[dtype]
    summing = scale * n / Fraction(2**53) * (1 + n / Fraction(2**53))
    return summing + (scale + summing) / 2**unit + Fraction(1, 2 ** (least + 1))


# --- by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES])
def test_scaled_sign_by_hand(dtype):
    C = ScaledSign("layer")
    for v, expected in (
        ([1, -3, 0, 4], [2, -2, 2, 2]),
        ([-0.0, 0.0, -1, 3], [1, 1, -1, 1]),  # sign(-0) = sign(0) = +1
        ([0, 0], [0, 0]),
        ([-7], [-7]),
    ):
        out = C(torch.tensor(v, dtype=dtype))
        assert out.dtype == dtype and out.tolist() == expected


def test_majority_vote_is_the_unscaled_sign():
    assert MajorityVote()(vector(5, -0.25, 0, -0.0, -1e-300, 1e300)).tolist() == [1, -1, 1, 1, -1, 1]
    assert MajorityVote(block=2)(vector(0, 0, -3)).tolist() == [1, 1, -1]
    assert not MajorityVote().feedback and ScaledSign().feedback and TopK().feedback and Identity().feedback


@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES])
def test_top_k_by_hand(dtype):
    for ratio, v, expected in (
        (0.5, [1, -2, 2, 2, -1], [0, -2, 2, 2, 0]),  # ceil(2.5) = 3
        (0.4, [1, -2, 2, 2, -1], [0, -2, 2, 0, 0]),  # three 2s for two places: the lower indices
        (0.4, [-1, 1, 1, 1, -1], [-1, 1, 0, 0, 0]),
        (1e-9, [3, -3], [3, 0]),  # at least one
        (1.0, [3, 0, -1], [3, 0, -1]),
        (0.75, [0, 0, 0, 0], [0, 0, 0, 0]),
        (0.5, [0, 5, 0, 0], [0, 5, 0, 0]),
    ):
        out = TopK(ratio, "layer")(torch.tensor(v, dtype=dtype))
        assert out.dtype == dtype and out.tolist() == expected


def test_identity_is_a_copy():
    v = vector(3, -0.0, 1e-300)
    out = Identity()(v)
    assert torch.equal(out, v) and out.data_ptr() != v.data_ptr()


def test_k_is_the_ceiling_and_at_least_one():
    for ratio, n, k in ((0.01, 1, 1), (0.01, 100, 1), (0.01, 101, 2), (0.5, 7, 4), (1.0, 7, 7), (0.25, 8, 2)):
        assert TopK(ratio).scalars(n) == k
    assert all(1 <= TopK(r).scalars(n) <= n for r in (1e-300, 0.3, 1 - 2**-53, 1.0) for n in range(1, 100))


def test_blocks_are_cut_at_multiples_of_the_size_and_the_last_is_shorter():
    v = vector(1, 3, -2, -2, 7)
    assert ScaledSign(2)(v).tolist() == [2, 2, -2, -2, 7]
    assert ScaledSign(4)(v).tolist() == [2, 2, -2, -2, 7]
    for whole in (5, 6, 2**31 - 1, "layer"):
        assert ScaledSign(whole)(v).tolist() == [3, 3, -3, -3, 3]
    assert ScaledSign(1)(v).tolist() == v.tolist()
    assert TopK(0.5, 2)(v).tolist() == [0, 3, -2, 0, 7]
    assert TopK(0.5, 3)(v).tolist() == [0, 3, -2, 0, 7]


def test_block_sizes():
    assert ScaledSign().block == TopK().block == DEFAULT_BLOCK == 65536
    for make in (ScaledSign, MajorityVote, lambda block: TopK(0.1, block)):
        assert [make("layer").block_numel(n) for n in (0, 1, 70000)] == [1, 1, 70000]
        assert [make(8).block_numel(n) for n in (0, 1, 7, 8, 9)] == [1, 1, 7, 8, 8]
    assert Identity().block_numel(70000) is None  # every partition gives the same C


@pytest.mark.parametrize(
    "C",
    [ScaledSign(2), TopK(0.5, 2), MajorityVote(2), Identity(), MinSize(2, TopK(0.5)), Identity(values=torch.bfloat16)],
)
def test_shape_is_kept_and_entries_are_taken_in_row_major_order(C):
    v = torch.arange(-6, 6.0).view(3, 4)
    assert torch.equal(C(v), C(v.reshape(-1)).view(3, 4))
    assert torch.equal(C(v.t()), C(v.t().reshape(-1)).view(4, 3))  # not in memory order
    scalar = C(torch.tensor(-5.0))
    assert scalar.shape == () and scalar.item() == (-1.0 if isinstance(C, MajorityVote) else -5.0)
    for shape in ((0,), (3, 0), (0, 2, 1)):
        assert C(torch.zeros(shape)).shape == shape


def test_the_argument_is_not_changed():
    v = vector(1, -3, 0, 4)
    for C in (ScaledSign(2), TopK(0.5), MajorityVote(), Identity(), MinSize(100, TopK())):
        C(v).fill_(9.0)
        assert v.tolist() == [1, -3, 0, 4]


def test_min_size_sends_smaller_tensors_whole():
    C = MinSize(4, ScaledSign(2))
    assert C(vector(1, 2, 4)).tolist() == [1, 2, 4]
    assert C(vector(1, 3, 5, 7)).tolist() == [2, 2, 6, 6]  # numel itself is not smaller
    assert C.for_tensor(3) == Identity() and C.for_tensor(4) == ScaledSign(2)
    assert MinSize(0, TopK()).for_tensor(0) == TopK()
    nested = MinSize(2, MinSize(4, TopK(0.5)))
    assert [nested.for_tensor(n).kind for n in (1, 3, 4)] == [DENSE, DENSE, TOPK]
    assert C.feedback and C(torch.tensor(7.0)).item() == 7.0


def vectors_whole(name, p):
    return p.ndim < 2


def test_exempt_goes_by_parameters():
    matrix, vector = torch.zeros(3, 4), torch.zeros(12)
    C = Exempt(vectors_whole, ScaledSign(2))
    assert (C.for_parameter("w", matrix), C.for_parameter("b", vector)) == (ScaledSign(2), Identity())
    C = Exempt(["head.*", "*.norm?.weight"], MinSize(12, TopK(0.5)), ScaledSign(4))
    names = ("head.weight", "body.norm1.weight", "body.norm1.bias", "head")
    assert [C.for_parameter(n, matrix).kind for n in names] == [SIGN, SIGN, TOPK, TOPK]
    assert C.for_parameter("body.bias", torch.zeros(11)) == Identity()  # as the inner policy has it
    assert MinSize(5, Exempt(["a"], TopK())).for_parameter("a", torch.zeros(6)) == Identity()
    assert C.feedback
    assert repr(C) == (
        "Exempt(['head.*', '*.norm?.weight'], MinSize(numel=12, inner=TopK(ratio=0.5, block=65536)), "
        "other=ScaledSign(block=4))"
    )
    assert "0x" not in repr(Exempt(lambda name, p: True, TopK()))  # an address would differ between ranks
    for wrong, error in (("bias", TypeError), ([1], TypeError), (None, TypeError)):
        with pytest.raises(error, match="a function of .name, parameter., or a list of patterns"):
            Exempt(wrong, TopK())
    with pytest.raises(TypeError, match="Exempt picks between compressors"):
        Exempt(["a"], 0.01)
    with pytest.raises(ValueError, match="keeps no error"):
        Exempt(["a"], TopK(), MajorityVote())
    for call in (lambda: C.for_tensor(3), lambda: C(vector), lambda: saef.message_bytes(C, [3])):
        with pytest.raises(TypeError, match="give it to a SAEFState"):
            call()


# --- cost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, width", [(1, 1), (2, 1), (255, 1), (256, 1), (257, 2), (65535, 2), (65536, 2),
                                      (65537, 3), (2**24, 3), (2**24 + 1, 4), (2**31 - 1, 4)])  # fmt: skip
def test_index_width_is_the_least_that_holds_the_last_index(n, width):
    assert index_bytes(n) == width
    assert n - 1 < 256**width and (width == 1 or n - 1 >= 256 ** (width - 1))


def test_scalars_and_bytes_of_a_block():
    for n in (1, 7, 8, 9, 16, 17, 1000):
        assert (ScaledSign().kind, ScaledSign().scalars(n)) == (SIGN, 1)
        assert ScaledSign().raw_bytes(n) == MajorityVote().raw_bytes(n) == math.ceil(n / 8)
        assert (Identity().kind, Identity().scalars(n), Identity().raw_bytes(n)) == (DENSE, n, 0)
    assert TopK(0.1).kind == TOPK
    assert [TopK(0.1).raw_bytes(n) for n in (1, 200, 256, 257, 1000, 65536)] == [1, 20, 26, 52, 200, 13108]
    assert TopK(0.1, "layer").raw_bytes(70000) == 21000


# --- contraction --------------------------------------------------------------------------------------------


def floats(width):
    """Any number whose sums stay finite, among them zeros, denormals and ties."""
    bound = 1e300 if width == 64 else 3.0000000054977558e38
    some = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 2.0**-149, -(2.0**-149), 2.0**-126])
    return st.one_of(some, st.floats(-bound, bound, width=width))


vectors = st.sampled_from(DTYPES).flatmap(
    lambda dtype: st.lists(floats(8 * dtype.itemsize), min_size=1, max_size=40).map(
        lambda values: torch.tensor(values, dtype=dtype)
    )
)


def exact(v):
    return [Fraction(a) for a in v.tolist()]


def squared(values):
    return sum(a * a for a in values)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(vectors)
def test_scaled_sign_contracts(v):
    """||C(v) - v||^2 <= (1 - d) ||v||^2 with d = ||v||_1^2 / (n ||v||_2^2), in exact arithmetic.

    With the exact mean s both sides are equal; a scale s + r, r a rounding error, adds n r^2 and nothing else.
    """
    a, c, n = exact(v), exact(ScaledSign("layer")(v)), v.numel()
    s = Fraction(sum(abs(x) for x in a), n)
    slack = scale_slack(n, v.dtype, s)
    assert abs(abs(c[0]) - s) <= slack
    assert squared([x - y for x, y in zip(c, a, strict=True)]) <= squared(a) - n * s * s + n * slack**2
    assert all(y == (abs(c[0]) if x >= 0 else -abs(c[0])) for x, y in zip(a, c, strict=True))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(vectors, st.floats(1e-6, 1.0))
def test_top_k_contracts(v, ratio):
    """||C(v) - v||^2 <= (1 - k / n) ||v||^2, in exact arithmetic and without any rounding."""
    C = TopK(ratio, "layer")
    a, c, n, k = exact(v), exact(C(v)), v.numel(), C.scalars(v.numel())
    assert squared([x - y for x, y in zip(c, a, strict=True)]) * n <= (n - k) * squared(a)
    kept = sorted(range(n), key=lambda i: (-abs(a[i]), i))[:k]
    assert c == [a[i] if i in kept else 0 for i in range(n)]


# --- the oracle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["layer", 1, 3, 8, 1000])
def test_agrees_with_the_oracle(block):
    """Top-k, votes and identity exactly; two float64 means of n numbers within 2 n roundings of their size."""
    gen = torch.Generator().manual_seed(7)
    numels = (12, 5, 1, 100, 64)
    v = torch.randn(sum(numels), dtype=torch.float64, generator=gen)
    v[20:60:3] = v[20]  # ties
    partition = reference.Partition(numels, block)
    for C, oracle, roundings in (
        (ScaledSign(block), reference.scaled_sign, 2 * 100),
        (MajorityVote(block), reference.sign, 0),
        (TopK(0.2, block), reference.top_k(0.2), 0),
        (TopK(1e-3, block), reference.top_k(1e-3), 0),
        (Identity(), reference.identity, 0),
    ):
        ours = torch.cat([C(part) for part in v.split(numels)])
        expected = reference.blockwise(oracle, partition)(v)
        assert ((ours - expected).abs() <= roundings * 2.0**-53 * expected.abs()).all()


# --- refused ------------------------------------------------------------------------------------------------

BLOCKS = [(0, ValueError), (-1, ValueError), (2**31, ValueError), (True, TypeError), (False, TypeError),
          ("tensor", TypeError), ("Layer", TypeError), (2.0, TypeError), (None, TypeError),
          ((8,), TypeError)]  # fmt: skip


@pytest.mark.parametrize("make", [ScaledSign, MajorityVote, lambda block: TopK(0.1, block)])
@pytest.mark.parametrize("block, error", BLOCKS)
def test_a_bad_block_is_refused(make, block, error):
    with pytest.raises(error, match=r'block must be ("layer" or an integer|between 1 and 2\*\*31 - 1 coord)') as e:
        make(block)
    assert repr(block) in str(e.value)


@pytest.mark.parametrize("ratio", [0, 0.0, -0.01, 1.5, 1.0000000000000002, NAN, math.inf, -math.inf])
def test_a_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got .*; 0\.01 sends 1 %"):
        TopK(ratio)


@pytest.mark.parametrize("ratio", ["0.01", None, True, 1j, [0.01]])
def test_a_ratio_that_is_no_number_is_refused(ratio):
    with pytest.raises(TypeError, match=r"ratio must be .*got"):
        TopK(ratio)


@pytest.mark.parametrize("inner", [TopK, "topk", None, 0.01, lambda v: v])
def test_min_size_of_a_non_compressor_is_refused(inner):
    with pytest.raises(TypeError, match=r"MinSize wraps a compressor, got .*; write MinSize\(4096, TopK\(0\.01\)\)"):
        MinSize(4096, inner)


def test_min_size_of_a_vote_is_refused():
    with pytest.raises(ValueError, match=r"MajorityVote\(.*\) keeps no error .*; do not wrap it"):
        MinSize(4096, MajorityVote())


def test_a_negative_min_size_is_refused():
    with pytest.raises(ValueError, match="numel must be at least 0, got -1"):
        MinSize(-1, TopK())


@pytest.mark.parametrize("numel", [NAN, 4096.5, True, "4096", None])
def test_a_min_size_that_is_no_integer_is_refused(numel):
    """NaN above all: no tensor is smaller than it, so that the policy would silently be none."""
    with pytest.raises(TypeError, match="numel must be .*got"):
        MinSize(numel, TopK())


@pytest.mark.parametrize("C", [ScaledSign(), MajorityVote(), TopK(), Identity(), MinSize(4, TopK())])
def test_compressors_are_values(C):
    """Frozen, hashable, and equal to what their repr says: ranks compare them by it."""
    assert eval(repr(C)) == C and hash(C) == hash(eval(repr(C))) and isinstance(C, Compressor)
    for name in ("block", "ratio", "numel", "anything"):
        with pytest.raises(AttributeError):
            setattr(C, name, 1)


def test_each_class_is_abstract_or_final():
    """What is not made to be used raises; what is, is not made to be inherited from."""
    for abstract in (Compressor, Code, Sign):
        with pytest.raises(TypeError, match="abstract"):
            abstract()
    assert all(c.__final__ for c in (Identity, ScaledSign, MajorityVote, TopK, MinSize) if hasattr(c, "__final__"))
    assert not issubclass(MajorityVote, ScaledSign)


def test_different_settings_are_different_values():
    different = [ScaledSign(), ScaledSign(8), MajorityVote(), MajorityVote(8), TopK(), TopK(0.02), TopK(0.01, 8),
                 Identity(), MinSize(4, TopK()), MinSize(5, TopK())]  # fmt: skip
    assert all(a != b and repr(a) != repr(b) for a, b in itertools.combinations(different, 2))


# --- bfloat16 values ----------------------------------------------------------------------------------------


def test_values_are_rounded_to_bfloat16_and_nothing_else_changes():
    v = torch.tensor([1.0, -(1 + 2**-8), 1 + 3 * 2**-8, 2.0**-130, -7.0, 0.1])  # two are half way, to even
    half = torch.bfloat16
    assert Identity(values=half)(v).tolist() == [
        1.0,
        -1.0,
        1 + 2**-6,
        2.0**-130,
        -7.0,
        float(torch.tensor(0.1).bfloat16()),
    ]
    kept = TopK(0.5, values=half)(v)
    assert torch.equal(kept, Identity(values=half)(TopK(0.5)(v))) and int((kept != 0).sum()) == 3
    assert kept.dtype == v.dtype and Identity(values=half)(v.double()).dtype == torch.float64


def test_values_have_one_form_and_others_are_refused():
    assert TopK(0.1, values="bfloat16") == TopK(0.1, values=torch.bfloat16)
    assert repr(TopK(0.1)) == "TopK(ratio=0.1, block=65536)" and repr(Identity()) == "Identity()"
    assert repr(Identity(values="bfloat16")) == "Identity(values=torch.bfloat16)"
    assert "values=torch.bfloat16" in repr(TopK(values="bfloat16"))
    for wrong in (torch.float16, "float16", 16, True):
        with pytest.raises(ValueError, match="None .* or torch.bfloat16, got"):
            Identity(values=wrong)
    with pytest.raises(TypeError):
        TopK(0.1, 64, torch.bfloat16)  # by its name only
