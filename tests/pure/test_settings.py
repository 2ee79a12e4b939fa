"""What is decided before the first gradient: settings, hyperparameters, who serves what, and which exchange."""

import inspect
import json
import math
from collections import Counter
from dataclasses import fields
from typing import get_type_hints
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saef import (
    AllReduce,
    Averaging,
    Identity,
    MajorityVote,
    MinSize,
    Nesterov,
    Rotating,
    SAEFState,
    ScaledSign,
    TopK,
    hooks,
    message_bytes,
)
from saef.comm.agreement import compare
from saef.comm.exchange import LATENCY_BYTES, choose
from saef.hooks.presets import Rest
from saef.integrations.deepspeed_config import HYPER, OF_RULE, Params, parse
from saef.rules import SGD, Difference, rule_for
from saef.rules.sgd import Hyper
from saef.step.arguments import Agreed, StateSettings, nearest
from saef.step.clock import Clock
from saef.step.settings import Settings
from saef.wire.kernels.table import BYTE, COLUMNS, COUNT, FLOAT, GRAD, GROUP, KIND, NUMEL, STATE
from saef.wire.plan import Plans, partition, place, plan_bucket

NAN, INF = math.nan, math.inf

# --- settings -----------------------------------------------------------------------------------------------

DEFAULTS = {
    "compressor": ScaledSign(),
    "server_compressor": "same",
    "step_ahead": 1.0,
    "averaging": None,
    "weight_decay_mode": "coupled",
    "exchange": "auto",
    "max_grad_norm": None,
    "max_consecutive_skips": 10,
    "audit_every": 100,
    "noise_correction": True,
    "server_step_ahead": "auto",
    "error_decay": 1.0,
    "v_averaging": None,
    "local_steps": 1,
    "outer": None,
    "on_bad_round": "restore",
    "overlap": False,
}
VOTE = {"compressor": MajorityVote(), "step_ahead": 0.0, "weight_decay_mode": "outer"}


def test_the_state_has_these_defaults():
    arguments = inspect.signature(SAEFState).parameters
    assert {name: arguments[name].default for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    "changed",
    [{}, VOTE, {"server_compressor": None}, {"server_compressor": TopK()}, {"step_ahead": 0}, {"step_ahead": 0.5},
     {"averaging": AllReduce(1)}, {"averaging": Rotating(20)}, {"weight_decay_mode": "outer"},
     {"max_consecutive_skips": 0}, {"max_consecutive_skips": None}, {"audit_every": 1},
     {"exchange": "sharded"}, {"exchange": "replicated"}, {"max_grad_norm": 1e-3}, {"max_grad_norm": 1},
     {"compressor": MinSize(4096, TopK(0.01))}, {**VOTE, "server_compressor": MajorityVote()},
     {"compressor": Identity(), "server_compressor": Identity()}, {"noise_correction": False},
     {"server_step_ahead": True}, {"server_step_ahead": False, "step_ahead": 0}, {"error_decay": 0.95},
     {"local_steps": 16}, {"outer": Nesterov(lr=1.0, momentum=0.0)}, {"on_bad_round": "keep"}],
)  # fmt: skip
def test_what_can_be_honoured_is_accepted(changed):
    assert Settings(**{**DEFAULTS, **changed})


def test_what_follows_from_the_settings():
    made = lambda **changed: Settings(**{**DEFAULTS, **changed})  # noqa: E731
    assert made().reply_compressor == ScaledSign() and made(server_compressor=None).reply_compressor == Identity()
    assert made(server_compressor=TopK()).reply_compressor == TopK()
    assert made().feedback and not made(**VOTE).feedback and made(compressor=MinSize(3, TopK())).feedback
    assert made(weight_decay_mode="outer").outer_decay and not made().outer_decay


NO_COMPRESSOR = r"compressor must be e\.g\. saef\.ScaledSign\(\) or saef\.TopK\(0\.01\), got "
NO_SERVER = r'server_compressor must be "same", None \(single-way\) or a compressor, got '
NO_STEP = r"step_ahead must be in \[0, 1\] \(0: EF, 1: SAEF\), got "
NO_AVERAGING = r"averaging must be e\.g\. saef\.AllReduce\(period=20\), or None, got "
NO_NORM = "max_grad_norm must be a positive number, or None, got "
REFUSED = [
    ("compressor", "sign", TypeError, NO_COMPRESSOR + "'sign'"),
    ("compressor", None, TypeError, NO_COMPRESSOR + "None"),
    ("compressor", ScaledSign, TypeError, NO_COMPRESSOR + "<class"),
    ("server_compressor", "Same", TypeError, NO_SERVER + "'Same'"),
    ("server_compressor", TopK, TypeError, NO_SERVER + "<class"),
    ("server_compressor", 0, TypeError, NO_SERVER + "0"),
    ("step_ahead", -0.1, ValueError, NO_STEP + "-0.1"),
    ("step_ahead", 1.5, ValueError, NO_STEP + "1.5"),
    ("step_ahead", NAN, ValueError, NO_STEP + "nan"),
    ("averaging", 20, TypeError, NO_AVERAGING + "20"),
    ("averaging", AllReduce, TypeError, NO_AVERAGING + "<class"),
    ("averaging", "allreduce", TypeError, NO_AVERAGING + "'allreduce'"),
    ("weight_decay_mode", "decoupled", ValueError, r"weight_decay_mode must be one of \('coupled', 'outer'\), got 'd"),
    ("weight_decay_mode", None, ValueError, r"weight_decay_mode must be one of .*, got None"),
    ("exchange", "ring", ValueError, r"exchange must be one of \('auto', 'replicated', 'sharded'\), got 'ring'"),
    ("exchange", None, ValueError, r"exchange must be one of .*, got None"),
    ("max_grad_norm", 0.0, ValueError, NO_NORM + "0.0"),
    ("max_grad_norm", -1, ValueError, NO_NORM + "-1"),
    ("max_grad_norm", INF, ValueError, NO_NORM + "inf"),
    ("max_grad_norm", NAN, ValueError, NO_NORM + "nan"),
    ("max_consecutive_skips", -1, ValueError, "max_consecutive_skips must be an integer >= 0 .*, or None, got -1"),
    ("max_consecutive_skips", 1.0, ValueError, "max_consecutive_skips must be an integer >= 0 .*, or None, got 1.0"),
    ("audit_every", 0, ValueError, r"audit_every must be an integer >= 1 \(steps between two audits\), or None, got 0"),
    ("server_step_ahead", 1, ValueError, 'server_step_ahead must be "auto", True or False, got 1'),
    ("server_step_ahead", "atuo", ValueError, r"got 'atuo' \(did you mean 'auto'\?\)"),
    ("error_decay", 0.0, ValueError, r"error_decay must be in \(0, 1\] \(1: errors stay as they are\), got 0.0"),
    ("error_decay", 1.1, ValueError, r"error_decay must be in \(0, 1\] .*, got 1.1"),
    ("error_decay", True, ValueError, r"error_decay must be in \(0, 1\] .*, got True"),
    ("local_steps", 0, ValueError, r"local_steps must be an integer >= 1 \(steps of the optimizer .*\), got 0"),
    ("local_steps", 2.0, ValueError, r"local_steps must be an integer >= 1 .*, got 2.0"),
    ("outer", 0.7, TypeError, r"outer must be saef.Nesterov\(lr=..., momentum=...\), or None, got 0.7"),
    ("on_bad_round", "kep", ValueError, r"on_bad_round must be one of .*, got 'kep' \(did you mean 'keep'\?\)"),
    ("v_averaging", 20, TypeError, r"v_averaging must be e.g. saef.AllReduce\(period=20\), or None, got 20"),
    ("noise_correction", 1, TypeError, "noise_correction must be True or False, got 1"),
    ("audit_every", True, ValueError, "audit_every must be an integer >= 1 .*, or None, got True"),
]


@pytest.mark.parametrize("field, value, error, message", REFUSED)
def test_what_cannot_be_honoured_is_refused(field, value, error, message):
    with pytest.raises(error, match=message):
        Settings(**{**DEFAULTS, field: value})


@pytest.mark.parametrize("field, value", [("step_ahead", "1"), ("step_ahead", None), ("max_grad_norm", "1"),
                                          ("max_grad_norm", [1.0])])  # fmt: skip
def test_what_is_no_number_is_refused_by_name(field, value):
    with pytest.raises((TypeError, ValueError), match=f"{field} must be .*, got "):
        Settings(**{**DEFAULTS, field: value})


@pytest.mark.parametrize("changed", [{"compressor": ScaledSign(), "server_compressor": MajorityVote()},
                                     {**VOTE, "server_compressor": ScaledSign()},
                                     {**VOTE, "server_compressor": None}])  # fmt: skip
def test_a_vote_goes_both_ways(changed):
    with pytest.raises(ValueError, match=r'votes both ways; use MajorityVote\(\) with server_compressor="same"'):
        Settings(**{**DEFAULTS, **changed})


@pytest.mark.parametrize("changed", [{"step_ahead": 1.0}, {"step_ahead": 0.1}, {"averaging": AllReduce(20)},
                                     {"weight_decay_mode": "coupled"}, {"error_decay": 0.9}])  # fmt: skip
def test_a_vote_keeps_no_error(changed):
    advice = r'use step_ahead=0, averaging=None, error_decay=1, weight_decay_mode="outer" .*signsgd_majority_vote'
    with pytest.raises(ValueError, match=advice):
        Settings(**{**DEFAULTS, **VOTE, **changed})


def test_nothing_is_full_about_no_step_ahead():
    with pytest.raises(ValueError, match="server_step_ahead=True steps ahead by step_ahead times .*step_ahead is 0"):
        Settings(**{**DEFAULTS, "step_ahead": 0.0, "server_step_ahead": True})


# --- names and words ----------------------------------------------------------------------------------------


def keywords(function):
    return {n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}


def test_the_types_of_settings_are_those_of_the_state():
    state = get_type_hints(SAEFState.__init__)
    assert get_type_hints(StateSettings) == {name: state[name] for name in keywords(SAEFState)}
    assert not StateSettings.__required_keys__


def test_what_ranks_agree_on_is_what_settings_hold():
    assert get_type_hints(Agreed) == {f.name: get_type_hints(Settings)[f.name] for f in fields(Settings)}


def test_deepspeeds_keys_have_types():
    assert [*Params.__annotations__] == ["rule", *HYPER, *OF_RULE, *DEFAULTS, "node_size"]
    ours, theirs = get_type_hints(Agreed), get_type_hints(Params)
    for name in {*DEFAULTS} - {
        "compressor",
        "server_compressor",
        "averaging",
        "v_averaging",
        "outer",
    }:  # which are objects in JSON
        assert theirs[name] == ours[name], name


NOT_AHEAD = {"step_ahead", "server_step_ahead"}  # with s = 0 there is nothing of the server's error to step ahead by
FIXED = {"ef": NOT_AHEAD}


@pytest.mark.parametrize("name", sorted({*hooks.__all__} - {"saef_hook", "register"}))
def test_a_preset_takes_what_it_does_not_fix(name):
    fixed = FIXED.get(name, NOT_AHEAD | {"weight_decay_mode"})
    preset = getattr(hooks, name)
    assert keywords(preset) | {*Rest.__annotations__} == {*StateSettings.__annotations__} - fixed
    assert get_type_hints(preset)["settings"].__args__ == (Rest,)  # Unpack[Rest]


MISSPELT = [("compresor", "compressor"), ("Compressor", "compressor"), ("step_ahed", "step_ahead"),
            ("weigth_decay_mode", "weight_decay_mode"), ("exchang", "exchange"), ("averging", "averaging"),
            ("max_gradnorm", "max_grad_norm"), ("audit", "audit_every"), ("gradscaler", "grad_scaler"),
            ("procces_group", "process_group")]  # fmt: skip


@pytest.mark.parametrize("word, meant", MISSPELT)
@pytest.mark.parametrize("make", [SAEFState, hooks.ef])
def test_a_misspelt_keyword_of_a_state_is_told_the_nearest(make, word, meant):
    """Before anything else is looked at: there are no ranks here, and no model."""
    with pytest.raises(TypeError, match=rf"SAEFState: '{word}' is unknown \(did you mean '{meant}'\?\); expected 'mod"):
        make(None, None, **{word: None})


def test_a_keyword_that_is_like_no_other_is_told_all():
    with pytest.raises(TypeError, match=r"SAEFState: 'lr' is unknown; expected 'model', 'optimizer', 'compressor', "):
        SAEFState(None, None, compressor=ScaledSign(), lr=0.1)


WORDS = [("exchange", "shraded", "sharded"), ("exchange", "Replicated", "replicated"), ("exchange", "atuo", "auto"),
         ("weight_decay_mode", "couple", "coupled"), ("weight_decay_mode", "OUTER", "outer")]  # fmt: skip


def test_a_mesh_in_deepspeeds_json_is_told_the_key_for_nodes():
    with pytest.raises(ValueError, match='mesh is an object of Python: write "node_size": 8'):
        parse({"mesh": [2, 2]})


@pytest.mark.parametrize("size", [0, -2, 2.0, True, None, "2", "atuo"])
def test_a_node_size_in_deepspeeds_json_is_a_count_or_auto(size):
    with pytest.raises(ValueError, match=rf"node_size must be an integer >= 1 .*, got {size!r}"):
        parse({"node_size": size})
    assert parse({"node_size": 2}) == parse({"node_size": "auto"}) == parse({})  # it is no setting of a state


@pytest.mark.parametrize("field, word, meant", [*WORDS, ("server_compressor", "Same", "same")])
def test_a_misspelt_word_is_told_the_nearest(field, word, meant):
    with pytest.raises((TypeError, ValueError), match=rf"{field} must be .*got '{word}' \(did you mean '{meant}'\?\)"):
        Settings(**{**DEFAULTS, field: word})


@pytest.mark.parametrize("field, word, meant", [*WORDS, ("server_compressor", "sane", "same")])
def test_a_misspelt_word_in_deepspeeds_json_is_told_the_nearest(field, word, meant):
    with pytest.raises(
        (TypeError, ValueError), match=rf"^optimizer\.params.*got '{word}' \(did you mean '{meant}'\?\)"
    ):
        parse({"lr": 0.1, field: word})


@pytest.mark.parametrize("word, meant", [*MISSPELT[:8], ("momentun", "momentum"), ("LR", "lr")])
def test_a_misspelt_key_of_deepspeeds_json_is_told_the_nearest(word, meant):
    with pytest.raises(ValueError, match=rf"^optimizer\.params: '{word}' is unknown \(did you mean '{meant}'\?\); exp"):
        parse({word: None})


def test_the_rule_of_deepspeeds_json():
    assert parse({"momentum": 0.9})[:2] == (torch.optim.SGD, {**HYPER, "momentum": 0.9})
    given = {"type": "adamw", "betas": [0.9, 0.95], "eps": 1e-6}
    kind, hyper, settings = parse({"rule": given, "lr": 0.25, "weight_decay": 0.1, "noise_correction": False})
    expected = {"lr": 0.25, "weight_decay": 0.1, "maximize": False, "betas": [0.9, 0.95], "eps": 1e-6}
    assert (kind, hyper, settings) == (torch.optim.AdamW, expected, {"noise_correction": False})
    assert parse({"rule": {"type": "adam"}})[0] is torch.optim.Adam
    assert parse({"rule": {"type": "adam"}})[1]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("params, error, message", [
    ({"rule": "adamw"}, TypeError, r"rule must be an object with a type, such as .*sgd.*, got 'adamw'"),
    ({"rule": {"type": "adamww"}}, ValueError, r"rule\.type: 'adamww' is unknown \(did you mean 'adamw'\?\)"),
    ({"rule": {"type": "adamw", "beta": 0.9}}, ValueError, r"rule: 'beta' is unknown \(did you mean 'betas'\?\)"),
    ({"rule": {"type": "adamw", "betas": 0.9}}, TypeError, "betas must be two numbers and eps a number, got 0.9"),
    ({"rule": {"type": "adam", "eps": "1e-8"}}, TypeError, "betas must be two numbers and eps a number"),
    ({"rule": {"type": "adamw"}, "momentum": 0.9}, ValueError, "momentum is SGD's, and .*: give the rule betas"),
    ({"rule": {"type": "adam"}, "nesterov": True}, ValueError, "nesterov is SGD's, and .* 'adam': take it out"),
])  # fmt: skip
def test_what_a_rule_of_deepspeeds_json_refuses(params, error, message):
    with pytest.raises(error, match=rf"^optimizer\.params\.?.*{message}"):
        parse(params)


@pytest.mark.parametrize("word", ["ring", "", None, 3, ["sharded", "auto"]])
def test_what_is_like_no_word_gets_no_hint(word):
    assert nearest(word, ["auto", "replicated", "sharded"]) == ""


# --- averaging ----------------------------------------------------------------------------------------------


class Recorder:
    """A Transport of two ranks that notes what is averaged and changes the numbers."""

    rank, size = 0, 2

    def __init__(self):
        self.sent_bytes, self.calls = Counter(), []

    def mean(self, v, purpose):
        self.calls.append((v.numel(), purpose))
        v.add_(1)


@pytest.mark.parametrize("protocol", [AllReduce, Rotating])
@pytest.mark.parametrize("period, error", [(0, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError),
                                           (INF, TypeError), (NAN, TypeError), ("20", TypeError),
                                           (None, TypeError)])  # fmt: skip
def test_a_bad_period_is_refused(protocol, period, error):
    with pytest.raises(error, match=r"period must be .*, got .*; averaging=None never averages"):
        protocol(period)


def test_a_protocol_must_be_defined():
    with pytest.raises(TypeError, match="abstract"):
        Averaging()


@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_all_reduce_averages_everything_when_t_plus_1_is_a_multiple_of_the_period(period):
    for t in range(20):
        e, transport = torch.zeros(10), Recorder()
        due = AllReduce(period).due(t, 10)
        AllReduce(period).average(t, e[due], transport)
        assert due == slice(0, 10 if (t + 1) % period == 0 else 0)
        assert transport.calls == [(due.stop, "averaging")] and e.tolist() == [float(due.stop > 0)] * 10


@pytest.mark.parametrize("d", [1, 3, 10, 1001])
@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_rotating_averages_every_coordinate_once_in_a_period(period, d):
    e, transport = torch.zeros(d), Recorder()
    for t in range(5 * period, 6 * period):
        before = e.clone()
        Rotating(period).average(t, e[Rotating(period).due(t, d)], transport)
        j = t % period
        assert (e != before).nonzero().view(-1).tolist() == list(range(d * j // period, d * (j + 1) // period))
    assert e.tolist() == [1.0] * d
    assert all(n <= -(-d // period) for n, _ in transport.calls)  # no spike


# --- hyperparameters ----------------------------------------------------------------------------------------


def sgd(**options):
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], **{"lr": 0.1, **options})


def test_sgd_is_accepted():
    rule_for(sgd(), outer=False, signum=False)
    rule_for(sgd(momentum=0.9, nesterov=True, weight_decay=1e-4, maximize=True), outer=False, signum=False)


class MySGD(torch.optim.SGD):
    """Computes something else in its step."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] *= 0.9
        return super().step(closure)


class NamedSGD(torch.optim.SGD):
    """Keeps SGD's step, as the optimizers of other frameworks' adapters do."""


def test_a_subclass_that_keeps_sgds_step_is_sgd():
    rule_for(NamedSGD([torch.nn.Parameter(torch.ones(2))], lr=0.1), outer=False, signum=False)


@pytest.mark.parametrize("make", [torch.optim.RMSprop, torch.optim.ASGD, MySGD])
def test_other_optimizers_take_their_own_steps(make):
    optimizer = make([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert rule_for(optimizer, outer=False, signum=False) == Difference(make.__name__, 1)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam])
def test_with_local_steps_all_do(make):
    optimizer = make([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert rule_for(optimizer, outer=False, signum=False, local_steps=2) == Difference(make.__name__, 2)
    assert rule_for(optimizer, outer=False, signum=False).of_gradients


def test_hyper_is_what_the_groups_say():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.SGD(
        [{"params": params[0]}, {"params": params[1], "lr": 0.5, "momentum": 0.9, "nesterov": True},
         {"params": params[2], "weight_decay": 0.25, "maximize": True}],
        lr=0.1,
    )  # fmt: skip
    assert SGD(outer=False, signum=False).read(optimizer, 0) == [
        Hyper(0.1, 0.0, 1.0, False, 0.0, 1.0),
        Hyper(0.5, 0.9, 1.0, True, 0.0, 1.0),
        Hyper(0.1, 0.0, 1.0, False, 0.25, -1.0),
    ]


def test_hyper_is_read_live():
    optimizer = sgd(momentum=0.9)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    assert SGD(outer=False, signum=False).read(optimizer, 0) == [Hyper(0.25, 0.9, 1.0, False, 0.0, 1.0)]
    optimizer.param_groups[0].update(lr=0.0, momentum=0.0)
    assert SGD(outer=False, signum=False).read(optimizer, 0) == [Hyper(0.0, 0.0, 1.0, False, 0.0, 1.0)]


def test_outer_decay_is_not_in_the_gradient():
    assert SGD(outer=True, signum=False).read(sgd(weight_decay=0.5), 0)[0].weight_decay == 0.0
    assert SGD(outer=False, signum=False).read(sgd(weight_decay=0.5), 0)[0].weight_decay == 0.5


def test_signums_momentum_is_an_average():
    """Gain 1 - mu; without momentum there is nothing to average, and g counts whole."""
    assert SGD(outer=True, signum=True).read(sgd(momentum=0.75), 0)[0].gain == 0.25
    assert SGD(outer=True, signum=False).read(sgd(momentum=0.75), 0)[0].gain == 1.0
    assert SGD(outer=True, signum=True).read(sgd(momentum=0.0), 0)[0].gain == 1.0


def test_dampening_is_refused():
    optimizer = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.ones(2))]},
         {"params": [torch.nn.Parameter(torch.ones(2))], "momentum": 0.9, "dampening": 0.1}],
        lr=0.1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"param group 1 has dampening=0\.1; .*set dampening=0 \(and scale lr"):
        SGD(outer=False, signum=False).read(optimizer, 0)


@pytest.mark.parametrize("field, value", [("lr", -0.1), ("lr", NAN), ("lr", INF), ("momentum", -0.1), ("momentum", 1.0),
                                          ("momentum", NAN), ("weight_decay", -1e-9), ("weight_decay", INF),
                                          ("weight_decay", NAN)])  # fmt: skip
@pytest.mark.parametrize("outer", [True, False])
def test_a_setting_out_of_range_is_refused(field, value, outer):
    """torch checks only what SGD was made with, not what a scheduler wrote later."""
    optimizer = sgd(momentum=0.5)
    optimizer.param_groups[0][field] = value
    advice = rf"param group 0 has .*{field}={value}.*; expected finite lr >= 0, 0 <= momentum < 1, finite weight_decay"
    with pytest.raises(ValueError, match=advice):
        SGD(outer=outer, signum=False).read(optimizer, 0)


# --- who serves what ----------------------------------------------------------------------------------------


@st.composite
def models(draw):
    """(numels, groups, worker, server, servers): compressors that go together, empty tensors included."""
    numels = draw(st.lists(st.integers(0, 200), min_size=1, max_size=12))
    groups = [draw(st.integers(0, 2)) for _ in numels]
    block = draw(st.sampled_from(["layer", 1, 8, 50]))
    small = draw(st.integers(0, 60))
    codes = [ScaledSign(block), TopK(0.1, block), Identity(), MinSize(small, TopK(0.1, block))]
    up, down = draw(st.sampled_from(codes)), draw(st.sampled_from(codes))
    return numels, groups, up, down, draw(st.integers(1, 9))


def every_block(blocks):
    pairs = zip(blocks.of_parameter, blocks.owner, strict=True)
    return [(b, r) for parameter, owners in pairs for b, r in zip(parameter, owners, strict=True)]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(models())
def test_every_block_has_one_server(model):
    """The blocks cover the flat state once, in order; each server's part has no gap."""
    numels, groups, up, down, servers = model
    found = partition(numels, groups, up, down, servers)
    at, served = 0, [0] * servers
    for i, parameter in enumerate(found.of_parameter):
        assert sum(b.numel for b in parameter) == numels[i]
        start = at
        for b, r in zip(parameter, found.owner[i], strict=True):
            assert b.numel > 0 and 0 <= r < servers
            assert (b.state, b.grad, b.group, b.served) == (at, at - start, groups[i], served[r])
            assert (b.up, b.down) == (up.for_tensor(numels[i]), down.for_tensor(numels[i]))
            at, served[r] = at + b.numel, served[r] + b.numel
    assert found.served == served and sum(served) == at == sum(numels)
    assert [sum(b.numel for b in found.served_by(r)) for r in range(servers)] == served
    assert partition(numels, groups, up, down, servers) == found  # deterministic


@settings(deadline=None, derandomize=True, max_examples=200)
@given(models())
def test_loads_differ_by_one_block_at_most(model):
    """Each block goes to the least load; so max - min never exceeds the largest block."""
    found = partition(*model)
    loads = Counter(dict.fromkeys(range(model[4]), 0))
    for b, r in every_block(found):
        assert loads[r] == min(loads.values())
        loads[r] += b.numel
    largest = max((b.numel for b, _ in every_block(found)), default=0)
    assert max(loads.values()) - min(loads.values()) <= largest


def test_servers_by_hand():
    """Blocks of 4: sizes 4 4 2 | 3 | 4 1 to three servers, the lowest rank first among equals."""
    C = ScaledSign(4)
    found = partition([10, 3, 5], [0, 1, 0], C, C, 3)
    assert found.owner == [[0, 1, 2], [2], [0, 1]]
    assert [[b.served for b in p] for p in found.of_parameter] == [[0, 0, 0], [2], [4, 4]]
    assert found.served == [8, 5, 5]
    assert found.served_by(1) == [found.of_parameter[0][1], found.of_parameter[2][1]]


def test_one_server_serves_everything():
    found = partition([10, 3], [0, 0], ScaledSign(4), ScaledSign(4), 1)
    assert found.served == [13] and {r for _, r in every_block(found)} == {0}
    assert all(b.served == b.state for b, _ in every_block(found))


@pytest.mark.parametrize("up, down", [(ScaledSign(8), ScaledSign(9)), (TopK(0.1, "layer"), ScaledSign(8)),
                                      (MinSize(3, TopK(0.1, 50)), TopK(0.1, 51))])  # fmt: skip
def test_compressors_that_cut_differently_are_refused(up, down):
    with pytest.raises(ValueError, match="cut a tensor of 100 entries into different blocks; .*the same block size"):
        partition([5, 100], [0, 0], up, down, 2)


@pytest.mark.parametrize("up, down", [(ScaledSign(8), ScaledSign(9)), (ScaledSign(8), TopK(0.1, "layer")),
                                      (ScaledSign(8), Identity()), (Identity(), TopK(0.1, 3)),
                                      (MinSize(9, TopK(0.1, 4)), ScaledSign(7))])  # fmt: skip
def test_compressors_that_cut_these_tensors_alike_are_accepted(up, down):
    """Tensors that both leave whole, or that one sends dense and the other cuts."""
    assert sum(b.numel for b, _ in every_block(partition([8, 3], [0, 0], up, down, 2))) == 11


# --- where it lies in the messages --------------------------------------------------------------------------


def buckets_of(numels, size):
    """The tensors in buckets of `size`, last first, as DDP has them: lists of (index, offset in the bucket)."""
    order, buckets = list(reversed(range(len(numels)))), []
    for at in range(0, len(order), size):
        part = order[at : at + size]
        buckets.append([(i, sum(numels[j] for j in part[:n])) for n, i in enumerate(part)])
    return buckets


@settings(deadline=None, derandomize=True, max_examples=60)
@given(models(), st.integers(1, 12), st.sampled_from([4, 8]))
def test_sections_cover_every_block_of_a_bucket_once(model, size, itemsize):
    """`send` and `apply` have every block, section by section; `receive` and `reply` have the server's own."""
    numels, servers = model[0], model[4]
    found = partition(*model)
    for bucket in buckets_of(numels, size):
        plans = [plan_bucket(found, bucket, servers, r, itemsize) for r in range(servers)]
        offset = dict(bucket)
        expected = sorted(
            (offset[i] + b.grad, b.state, b.numel, b.group) for i in offset for b in found.of_parameter[i]
        )
        for layout in (plans[0].send, plans[0].apply):
            rows = layout.table[:, [GRAD, STATE, NUMEL, GROUP]].tolist()
            assert sorted(map(tuple, rows)) == expected and layout.table.shape[1] == COLUMNS
        mine = sum((plan.receive.table[:, GRAD].tolist() for plan in plans), [])
        assert mine == plans[0].send.table[:, GRAD].tolist() == plans[0].apply.table[:, GRAD].tolist()
        for plan, served in zip(plans, found.served, strict=True):
            for layout in (plan.receive, plan.reply):
                assert all(row[STATE] + row[NUMEL] <= served for row in layout.table.tolist())
            assert torch.equal(plan.receive.table[:, STATE], plan.reply.table[:, STATE])
            assert torch.equal(plan.send.table, plans[0].send.table)
            assert torch.equal(plan.apply.table, plans[0].apply.table)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(models(), st.integers(1, 12), st.sampled_from([4, 8]))
def test_messages_are_divided_without_gap_or_overlap(model, size, itemsize):
    """Each section begins at a multiple of 8 bytes and holds its blocks' scalars and bytes, nothing twice."""
    numels, servers = model[0], model[4]
    for bucket in buckets_of(numels, size):
        plans = [plan_bucket(partition(*model), bucket, servers, r, itemsize) for r in range(servers)]
        for whole, lengths in ((plans[0].send, plans[0].send_bytes), (plans[0].apply, plans[0].reply_bytes)):
            assert len(lengths) == servers and whole.message_bytes == sum(lengths)
            assert all(n % 8 == 0 for n in lengths)
        assert [plan.receive.message_bytes for plan in plans] == plans[0].send_bytes
        assert [plan.reply.message_bytes for plan in plans] == plans[0].reply_bytes
        for way, part in (("send", "receive"), ("apply", "reply")):
            start, rows = 0, iter(getattr(plans[0], way).table.tolist())
            for r, plan in enumerate(plans):
                section, used = getattr(plan, part), set()
                for own in section.table.tolist():
                    row = next(rows)  # the same block, `start` bytes further on
                    assert row[FLOAT] == own[FLOAT] + start // itemsize and row[BYTE] == own[BYTE] + start
                    assert [row[c] for c in (KIND, NUMEL, COUNT)] == [own[c] for c in (KIND, NUMEL, COUNT)]
                    code = code_bytes(row, itemsize)
                    assert used.isdisjoint(code) and max(code) < start + section.message_bytes and min(code) >= start
                    used |= code
                assert section.message_bytes - len(used) < 8  # only padding is left
                if way == "apply":
                    assert plans[0].heads[r] == (start, section.scalars, section.halves)
                start += section.message_bytes


def code_bytes(row, itemsize):
    """The bytes of a message that a block's code takes, by its row."""
    n, k = row[NUMEL], row[COUNT]
    packed = {0: 0, 1: -(-n // 8), 2: k}[row[KIND]]  # blocks here have at most 256 coordinates
    floats = range(row[FLOAT] * itemsize, (row[FLOAT] + k) * itemsize)
    return {*floats, *range(row[BYTE], row[BYTE] + packed)}


def test_replicated_is_one_section():
    C, numels = TopK(0.1, 64), [300, 1, 65]
    plan = plan_bucket(partition(numels, [0] * 3, C, C, 1), [(0, 0), (1, 300), (2, 301)], 1, 0, 4)
    assert plan.send_bytes == plan.reply_bytes == [message_bytes(C, numels)]
    assert plan.send.message_bytes == plan.receive.message_bytes == plan.reply.message_bytes == message_bytes(C, numels)
    assert plan.heads == [(0, plan.apply.scalars, plan.apply.halves)]


def test_rebuilding_buckets_moves_no_server_error():
    """A block keeps its server and its place there, in whatever bucket it travels."""
    C, numels = ScaledSign(16), [100, 3, 40, 7, 64]
    found = partition(numels, [0] * 5, C, C, 3)
    places = []
    for size in (1, 2, 5):
        rows = {}
        for bucket in buckets_of(numels, size):
            plan = plan_bucket(found, bucket, 3, 1, 4)
            offset = {at: i for i, at in bucket}
            for row in plan.receive.table.tolist():
                at = max(a for a in offset if a <= row[GRAD] and numels[offset[a]])
                rows[offset[at], row[GRAD] - at] = (row[STATE], row[NUMEL])
        places.append(rows)
    assert places[0] == places[1] == places[2]
    assert sum(n for _, n in places[0].values()) == found.served[1]


def test_a_plan_sees_a_number_that_is_not_finite_in_any_reply():
    C, numels = MinSize(5, ScaledSign(16)), [100, 3, 40, 7, 64]
    for servers in (1, 3):
        found = partition(numels, [0] * 5, C, C, servers)
        plan = plan_bucket(found, buckets_of(numels, 5)[0], servers, 0, 4)
        for byte in (0x00, 0xFF):  # bits may be anything: all ones are a NaN only where a scalar is read
            replies = torch.full((plan.apply.message_bytes,), byte, dtype=torch.uint8)
            scalars = [row[FLOAT] + j for row in plan.apply.table.tolist() for j in range(row[COUNT])]
            replies.view(torch.float32)[scalars] = 1.0
            assert plan.finite(replies, torch.float32)
            for at in scalars:
                for bad in (NAN, INF, -INF):
                    damaged = replies.clone()
                    damaged.view(torch.float32)[at] = bad
                    assert not plan.finite(damaged, torch.float32)


# --- which exchange -----------------------------------------------------------------------------------------


def test_the_exchange_is_replicated_unless_that_sends_more_than_a_latency_more():
    """(K - 1) a against (K - 1) / K (a + b) + 65536 bytes, by hand for a = b."""
    assert LATENCY_BYTES == 65536
    for K, largest in ((1, None), (2, None), (3, 98304), (4, 43690), (8, 12483)):
        # K = 1, 2: never more. 2 a - 4/3 a = 65536; 3 a - 1.5 a; 7 a - 1.75 a = 5.25 a.
        if largest is None:
            assert all(choose(K, a, a) == "replicated" for a in (0, 1, 10**6, 10**12))
        else:
            assert choose(K, largest, largest) == "replicated" and choose(K, largest + 1, largest + 1) == "sharded"


@pytest.mark.parametrize("K", [1, 2, 3, 4, 8])
def test_a_large_reply_speaks_for_replicated(K):
    """Single-way: nobody sends the dense reply. a = 10^6, b = 32 10^6: replicated up to K = 33."""
    assert choose(K, 10**6, 32 * 10**6) == "replicated"
    assert choose(34, 10**6, 32 * 10**6) == "sharded"


@pytest.mark.parametrize("K", [1, 2, 3, 4, 8])
def test_a_small_model_is_replicated(K):
    assert choose(K, 4096, 4096) == "replicated"


# --- agreement ----------------------------------------------------------------------------------------------


class Ranks:
    """A Transport whose other ranks have the given settings."""

    rank, size = 0, 3

    def __init__(self, *others):
        self.texts = [json.dumps({field: repr(value) for field, value in o.items()}).encode() for o in others]
        self.sent_bytes = Counter()

    def call(self, work):
        return work()

    def all_gather(self, message, sizes, purpose):
        assert purpose == "settings" and message.dtype == torch.uint8 and message.dim() == 1
        if sizes == [8] * self.size:
            parts = [torch.tensor([len(text)]).view(torch.uint8) for text in self.texts]
        else:
            parts = [torch.tensor(list(text), dtype=torch.uint8) for text in self.texts]
            assert sizes == [message.numel(), *map(len, self.texts)]
        return torch.cat([message, *parts])


def test_equal_settings_agree():
    mine = {"compressor": TopK(0.01), "numels": [3, 4], "name": "größer"}
    compare(mine, Ranks(mine, mine), torch.device("cpu"))


def test_different_settings_are_named_by_rank_and_field():
    mine = {"compressor": TopK(0.01), "step_ahead": 1.0, "numels": [3, 4]}
    ranks = Ranks({**mine, "step_ahead": 0.0}, {**mine, "compressor": ScaledSign(), "numels": [3]})
    with pytest.raises(ValueError, match="the ranks' settings differ; give every rank the same") as e:
        compare(mine, ranks, torch.device("cpu"))
    lines = str(e.value).splitlines()[1:]
    assert sorted(lines) == [
        f"compressor: rank 0 has {TopK(0.01)!r}, rank 2 has {ScaledSign()!r}",
        "numels: rank 0 has [3, 4], rank 2 has [3]",
        "step_ahead: rank 0 has 1.0, rank 1 has 0.0",
    ]


def test_a_bucket_is_cut_where_parameters_end() -> None:
    """In pieces of about equal size, each parameter once and in order, and as many as the bucket's size asks for."""
    numels, C = [1000, 10, 3000, 1, 1989], ScaledSign()
    parameters = [torch.zeros(n) for n in numels]
    flat = torch.zeros(sum(numels))
    views = list(flat.split(numels))
    placement = place(numels, [0] * 5, C, C, "sharded", 2, 0)
    for pieces, expected in ((1, [5]), (2, [2, 3]), (3, [2, 3]), (100, [2, 2, 1])):
        plans = Plans(placement, parameters, torch.float32, piece_numel=sum(numels) // pieces)
        found, own = plans.find(parameters, views, flat)
        assert [len(piece.parameters) for piece in found] == expected
        assert [i for piece in found for i in piece.parameters] == [*range(5)]
        assert [n for piece in found for n in [v.numel() for v in own[piece.among]]] == numels
        for piece in found:  # places in the bucket's gradients, whatever piece they are in
            assert min(piece.plan.send.table[:, GRAD].tolist()) == sum(numels[: piece.parameters[0]])
        assert plans.find(parameters, views, flat)[0] is found
    whole, _ = Plans(placement, parameters, torch.float32).find(parameters, views, flat)
    assert len(whole) == 1


def test_time_in_which_two_threads_do_the_same_counts_once() -> None:
    clock, now = Clock(), [0.0]
    with mock.patch("saef.step.clock.time.perf_counter", side_effect=lambda: now[0]):
        with clock.span("exchange"):
            now[0] = 1.0
            with clock.span("exchange"), clock.span("compress"):
                now[0] = 3.0
            now[0] = 4.0
        with pytest.raises(KeyError), clock.span("exchange"):
            now[0] = 5.0
            raise KeyError
    assert clock.seconds == {"exchange": 5.0, "compress": 2.0}
