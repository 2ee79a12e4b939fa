"""`saef.advise`: what it makes of measurements, and of bad arguments; tests/frameworks has the command itself."""

import json
import os
from unittest import mock

import pytest
import torch
from torch import nn

from saef import advise, probe
from saef.comm.cost import Curve, Network, alpha_beta

D, COMPUTE_S = 10_000_000, 0.1
KERNELS = {name: 1e-9 * i for i, name in enumerate(probe.NAMES)}


def measured(bits_per_s: float, *, workers: int = 4, latency_s: float = 1e-5, overlap: bool = False) -> probe.Measured:
    network = alpha_beta(workers, latency_s, bits_per_s / 8)
    return probe.Measured(network, KERNELS, None, overlap, "a device")


def advice(bits_per_s: float, **kwargs: object) -> advise.Advice:
    return advise.advise(measured(bits_per_s, **kwargs), D, COMPUTE_S)  # type: ignore[arg-type]


def line(found: advise.Advice, name: str) -> advise.Line:
    return next(line for line in found.lines if line.method == name)


def test_on_a_fast_network_the_advice_is_not_to_compress() -> None:
    found = advice(1e13)
    assert found.verdict.startswith("do not compress: your network (1e+04 Gb/s) is faster than the break-even of ")
    even = max(li.break_even_bits_per_s for li in found.lines[1:] if li.steps_between_exchanges == 1)
    assert even < 1e13 and found.verdict.endswith(advise.rate(even))


def test_on_a_slow_network_it_names_the_fastest_method() -> None:
    found = advice(1e8)
    each = [li for li in found.lines if li.steps_between_exchanges == 1]
    fastest = min(each, key=lambda li: li.step_s)
    assert found.verdict.startswith(f"use {fastest.method}: {fastest.speed_up:.1f} times as fast as plain DDP")
    assert "With several steps between two exchanges, saef sign, H = 16" in found.verdict


def test_where_nothing_ever_pays_it_says_so() -> None:
    slow = {name: (0.0 if name == "plain DDP" else 1e3) for name in KERNELS}
    found = advise.advise(_with(slow), D, COMPUTE_S)
    assert found.verdict == (
        "do not compress: kernels and latency cost more than any method saves, at any rate; yours is 1 Gb/s"
    )


def test_where_only_latency_counts_fewer_exchanges_help() -> None:
    network = alpha_beta(4, 0.05, 1e12 / 8)
    found = advise.advise(probe.Measured(network, KERNELS, None, False, "a device"), 1000, COMPUTE_S)
    assert ". With several steps between two exchanges, saef sign, H = 16: " in found.verdict


def _with(kernels: dict[str, float]) -> probe.Measured:
    some = measured(1e9)
    return probe.Measured(some.network, kernels, None, some.overlap, some.device)


def test_a_small_gain_is_not_worth_it() -> None:
    """fp16 alone is measured, and gains 4 % of a step: half of plain DDP's exchange, which is 8 % of it."""
    exchange_s = 2 * 3 / 4 * 4 * D * 8 / 1e9
    some = _with({"plain DDP": 0.0, "fp16 hook": 0.0})
    found = advise.advise(some, D, exchange_s * 0.92 / 0.08)
    assert found.verdict == "do not compress: the fastest method, fp16 hook, gains only 4%"


@pytest.mark.parametrize("workers", [2, 4, 16])
def test_what_a_line_says(workers: int) -> None:
    found = advice(1e9, workers=workers)
    assert [li.method for li in found.lines] == [*probe.NAMES]
    plain, sign, often, rare = (
        line(found, n) for n in ("plain DDP", "saef sign", "saef sign, Rotating(20)", "saef sign, H = 16")
    )
    assert plain.bytes == 2 * (workers - 1) / workers * 4 * D and plain.speed_up == 1.0 and plain.memory_bytes == 0
    assert sign.strategy == ("replicated" if workers == 2 else "sharded")
    blocks = -(-D // 65536)
    message = D / 8 + 4 * blocks  # docs/performance.md, Bytes; padded to 8 bytes, and cut at tensors
    assert sign.bytes == pytest.approx(2 * (workers - 1) / workers * message, rel=1e-3)
    assert often.bytes == pytest.approx(sign.bytes + plain.bytes / 20)
    assert rare.bytes == pytest.approx(sign.bytes / 16)
    server = 1 if workers == 2 else 1 / workers
    assert sign.memory_bytes == pytest.approx(4 * D * (2 + server), rel=0.2)  # and messages, some per cent
    assert rare.memory_bytes - sign.memory_bytes == pytest.approx(4 * D * 2)  # x_half - X, and momentum's copy


def test_a_slower_network_is_never_predicted_to_be_faster() -> None:
    for overlap in (True, False):
        steps = [[li.step_s for li in advice(r, overlap=overlap).lines] for r in (1e11, 1e10, 1e9, 1e8, 1e7)]
        for of_method in zip(*steps, strict=True):
            assert list(of_method) == sorted(of_method)


def test_adamw_keeps_more() -> None:
    sgd, adamw = (advise.advise(measured(1e9), D, COMPUTE_S, optimizer=name) for name in ("sgd", "adamw"))
    more = line(adamw, "saef sign, H = 4").memory_bytes - line(sgd, "saef sign, H = 4").memory_bytes
    assert more == pytest.approx(4 * D)
    assert line(adamw, "saef sign").memory_bytes == line(sgd, "saef sign").memory_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_other_dtypes(dtype: torch.dtype) -> None:
    """Gradients travel as they are; a state, and what it sends, is of float32 beside 16 bits, of float64 beside 64."""
    single, other = (advise.advise(measured(1e9), D, COMPUTE_S, dtype=one) for one in (torch.float32, dtype))
    bytes_of, double = dtype.itemsize, dtype == torch.float64
    assert line(other, "plain DDP").bytes == pytest.approx(line(single, "plain DDP").bytes * bytes_of / 4)
    assert line(other, "fp16 hook").bytes == line(single, "fp16 hook").bytes
    sign, before = line(other, "saef sign"), line(single, "saef sign")
    assert sign.memory_bytes == pytest.approx(before.memory_bytes * (2 if double else 1), rel=0.2)
    assert sign.bytes == (pytest.approx(before.bytes, rel=1e-2) if double else before.bytes)
    averaged, bare = line(other, "saef sign, Rotating(20)").bytes, sign.bytes
    assert averaged - bare == pytest.approx(2 * 3 / 4 * max(4, bytes_of) * D / 20)
    assert other.dtype == str(dtype).removeprefix("torch.") and f" parameters of {other.dtype}, " in advise.table(other)
    plain = [found.lines[0].step_s - COMPUTE_S for found in (single, other)]
    assert plain[1] == pytest.approx(plain[0] * bytes_of / 4, rel=1e-2)  # and latency, of as many buckets


def test_the_dtype_of_a_model() -> None:
    assert advise.dtype_of([torch.zeros(2, dtype=torch.bfloat16)] * 2) == torch.bfloat16
    for several in ([], [torch.zeros(1), torch.zeros(1, dtype=torch.float64)]):
        with pytest.raises(ValueError, match="a model that trains parameters of one dtype"):
            advise.dtype_of(several)
    with pytest.raises(ValueError, match="a GradScaler, which is not run here: give it in bfloat16"):
        advise.dtype_of([torch.zeros(1, dtype=torch.float16)])


def test_messages_shorter_than_any_measured_do_not_travel_in_no_time() -> None:
    """As `saef.probe` measures: the shortest message is one of 1 KiB."""
    sizes, seconds = (0.0, 1024.0, 65536.0), (1e-3, 1e-3, 2e-3)
    network = Network(4, *(Curve(sizes, seconds) for _ in range(3)))
    found = advise.advise(probe.Measured(network, KERNELS, None, False, "a device"), 1000, COMPUTE_S)
    plain, sign = line(found, "plain DDP"), line(found, "saef sign")
    assert plain.step_s > COMPUTE_S + 1e-3 and sign.step_s > COMPUTE_S + 1e-3  # of one collective each
    slow = network.slower(1e6)
    assert slow.all_reduce(100.0) == slow.all_gather(0.0) == 1e-3 and slow.all_reduce(4000.0) > 1.0
    assert "break-even of 0 " not in found.verdict and "below 0 " not in found.verdict


def test_the_table_and_the_json_have_every_method() -> None:
    found = advice(1e8)
    text = advise.table(found)
    assert all(f"\n{name} " in text for name in probe.NAMES) and text.endswith(found.verdict)
    read = json.loads(advise.as_json(found))
    assert [li["method"] for li in read["lines"]] == [*probe.NAMES]
    assert read["lines"][0]["break_even_bits_per_s"] is None and read["verdict"] == found.verdict


# -- arguments ---------------------------------------------------------------------------------------------------------

RANKS = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
NUMBERS = ["--parameters", "1e6", "--step-ms", "10"]
MODEL = ["--model", "torch.nn:Identity", "--batch", "builtins:dict"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --parameters and --step-ms, or --model and --batch"),
        (["--parameters", "1e6"], "give --parameters and --step-ms"),
        ([*NUMBERS[:2], *MODEL], "give one or the other"),
        (MODEL[:2], "--model and --batch come together"),
        ([*NUMBERS, *MODEL[2:]], "--model and --batch come together"),
        (["--parameters", "-3", "--step-ms", "10"], "expected a positive number, got '-3'"),
        (["--parameters", "many", "--step-ms", "10"], "expected a positive number, got 'many'"),
        (["--parameters", "0.5", "--step-ms", "10"], "must be at least 1, got 0.5"),
        (["--parameters", "nan", "--step-ms", "10"], "expected a positive number"),
        (["--model", "train", "--batch", "train:b"], "expected MODULE:FACTORY, such as train:make_model, got 'train'"),
        (["--model", "nowhere_at_all:f", "--batch", "builtins:dict"], "cannot be imported: No module named"),
        (["--model", "torch.nn:Linnear", "--batch", "builtins:dict"], "cannot be imported: "),
        (["--model", "math:pi", "--batch", "builtins:dict"], "'math:pi' is not a function"),
        ([*NUMBERS, "--optimizer", "lion"], "invalid choice: 'lion'"),
        ([*NUMBERS, "--dtype", "int8"], "invalid choice: 'int8'"),
        ([*MODEL, "--dtype", "bfloat16"], "--dtype is of --parameters: a model has its own"),
    ],
)
def test_bad_arguments(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict(os.environ, RANKS), pytest.raises(SystemExit) as error:
        advise.parse(words)
    assert error.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"WORLD_SIZE": "1"}, "one rank has nobody to exchange with"), ({"RANK": ""}, "start this with torchrun")],
)
def test_it_wants_ranks(environment: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict(os.environ, RANKS | environment), pytest.raises(SystemExit):
        if not environment.get("RANK", "0"):
            del os.environ["RANK"]
        advise.parse(NUMBERS)
    assert said in capsys.readouterr().err


# -- a model -----------------------------------------------------------------------------------------------------------


class Output(dict[str, torch.Tensor]):
    """As Hugging Face's models return them."""

    loss = torch.tensor(3.0)


@pytest.mark.parametrize(
    ("out", "loss"),
    [
        (torch.tensor(2.0), 2.0),
        (torch.tensor([1.0, 3.0]), 5.0),
        ((torch.tensor([[2.0]]), None), 2.0),
        ({"logits": torch.tensor([3.0, 3.0])}, 9.0),
        (Output(logits=torch.ones(2)), 3.0),
    ],
)
def test_a_loss_of_what_a_forward_returns(out: object, loss: float) -> None:
    assert float(advise.loss_of(out)) == loss


def test_no_loss() -> None:
    with pytest.raises(TypeError, match="the model's forward must return a tensor"):
        advise.loss_of("text")


@pytest.mark.parametrize("batch", [torch.ones(2, 3), (torch.ones(2, 3),), {"input": torch.ones(2, 3)}])
def test_a_step_is_a_step(batch: object) -> None:
    net = nn.Linear(3, 2)
    before = net.weight.detach().clone()
    advise.step_of(net, torch.optim.SGD(net.parameters(), lr=0.1), advise.moved(batch, torch.device("cpu")))()
    assert not torch.equal(net.weight, before)
