"""A collective that some ranks come to and others do not is an error on all of them, which says who is where.

It must be found without a timeout where all ranks wait, so most groups here have the pool's of two minutes.
"""

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import saef
from saef.comm import meeting, torch_transport
from saef.comm.meeting import Meetings, Note, NotTogether
from saef.comm.torch_transport import TorchTransport
from saef.comm.transport import Ordered
from saef.step.audit import AFTER_A_CHANGE
from support.ranks import RankPool
from support.training import Job, batch, make_net, wrap

pytestmark = pytest.mark.slow

STEP = '"a training step"'
UNFROZEN = "the trainable parameters changed"


@contextmanager
def quick() -> Iterator[None]:
    """Ranks that wait look at once where the others are."""
    with mock.patch.object(Ordered, "look_s", 0.1), mock.patch.object(meeting, "PROBE_S", 0.1):
        yield


def step(group: dist.ProcessGroup, model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    optimizer.zero_grad()
    x, y = batch(dist.get_rank(group), t)
    (model(x) - y).square().mean().backward()
    optimizer.step()


def error(work: Callable[[], Any]) -> str:
    try:
        work()
    except RuntimeError as found:
        return str(found)
    return "nothing was raised"


# ---- one rank calls, the others train ----------------------------------------------------------------------------

METHODS: dict[str, tuple[str, Callable[[saef.SAEFState], Any]]] = {
    "x_tilde": ("SAEFState.x_tilde()", lambda state: state.x_tilde()),
    "flush": ("SAEFState.flush()", lambda state: state.flush()),
    "diagnose": ("SAEFState.diagnose()", lambda state: state.diagnose()),
    "consolidated": ("SAEFState.consolidated_state_dict()", lambda state: state.consolidated_state_dict()),
    "save": ("saef.save_checkpoint()", lambda state: saef.save_checkpoint(tempfile.mkdtemp(), state)),
    "load": ("saef.load_checkpoint()", lambda state: saef.load_checkpoint(tempfile.mkdtemp(), state)),
    "meet": (UNFROZEN, lambda state: state.engine.transport.meet(UNFROZEN)),
    "load_state_dict": (AFTER_A_CHANGE, lambda state: state.load_state_dict(state.state_dict())),
    "reset_errors": (AFTER_A_CHANGE, lambda state: state.reset_errors()),
}
WAYS: list[dict[str, Any]] = [
    {"exchange": "replicated"},
    {"exchange": "sharded", "averaging": saef.AllReduce(2)},
    {"exchange": "sharded", "averaging": saef.Rotating(3), "max_grad_norm": 1.0},
    {"exchange": "replicated", "averaging": saef.Ring()},
]


def train_but(group: dist.ProcessGroup, method: str, who: int, settings: dict[str, Any]) -> str:
    """What a rank is told in training, in which rank `who` alone calls a method after three steps."""
    _, model, optimizer, state = wrap(group, Job(groups=[{"momentum": 0.9}], state=settings))

    def train() -> None:
        for t in range(20):
            step(group, model, optimizer, t)
            if t == 2 and dist.get_rank(group) == who:
                METHODS[method][1](state)

    with quick():
        return error(train)


@pytest.mark.parametrize("settings", WAYS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("method", METHODS)
def test_one_rank_alone_is_named_on_all(pool: RankPool, method: str, settings: dict[str, Any]) -> None:
    ranks = 2 + (list(METHODS).index(method) + WAYS.index(settings)) % 2
    who = list(METHODS).index(method) % ranks
    found = pool.run(train_but, method, who, settings, ranks=ranks)
    name = re.escape(METHODS[method][0])
    for rank, said in enumerate(found):
        if rank == who:
            assert re.search(rf'rank {who} of {ranks} is at "{name}", but not ranks? .*\(at {STEP}\)', said), found
        else:
            assert re.search(rf'at {STEP}, but not rank {who} \(at "{name}"\)', said), found
        assert "do it on every rank" in said


def in_the_middle(group: dist.ProcessGroup) -> str:
    """Rank 1 looks between its backward and its step, when the others have exchanged the same gradients."""
    _, model, optimizer, state = wrap(group, Job(groups=[{"momentum": 0.9}]))

    def train() -> None:
        for t in range(20):
            optimizer.zero_grad()
            x, y = batch(dist.get_rank(group), t)
            (model(x) - y).square().mean().backward()
            if t == 3 and dist.get_rank(group) == 1:
                state.diagnose()
            optimizer.step()

    with quick():
        return error(train)


def test_between_backward_and_step(pool: RankPool) -> None:
    others = pool.run(in_the_middle, ranks=3)
    assert f'rank 1 of 3 is at "SAEFState.diagnose()", but not ranks 0, 2 (at {STEP})' in others.pop(1)
    assert all(f'is at {STEP}, but not rank 1 (at "SAEFState.diagnose()")' in said for said in others)


# ---- ranks call different ones ---------------------------------------------------------------------------------


def different(group: dist.ProcessGroup) -> str:
    _, model, optimizer, state = wrap(group, Job())
    step(group, model, optimizer, 0)
    calls = (state.x_tilde, state.diagnose, state.x_tilde)
    with quick():
        return error(calls[dist.get_rank(group)])


def test_different_methods(pool: RankPool) -> None:
    first, second, third = pool.run(different, ranks=3)
    for said in (first, third):
        assert re.search(r'is at "SAEFState.x_tilde\(\)", but not .*rank 1 \(at "SAEFState.diagnose\(\)"\)', said)
    assert re.search(r'rank 1 of 3 is at "SAEFState.diagnose\(\)", but not .*\(at "SAEFState.x_tilde\(\)"\)', second)


# ---- nobody else comes -----------------------------------------------------------------------------------------


CREATE: dict[str, tuple[str, Callable[[dist.ProcessGroup], Any]]] = {
    "state": (
        "SAEFState()",
        lambda group: saef.SAEFState(net := make_net(), torch.optim.SGD(net.parameters(), 0.1), process_group=group),
    ),
    "averager": (
        "ModelAverager.average_parameters()",
        lambda group: saef.ModelAverager(saef.Ring(), process_group=group).average_parameters(make_net().parameters()),
    ),
    "server": ("ParameterServer()", lambda group: saef.ParameterServer(make_net().parameters(), process_group=group)),
    "estimate": ("saef.estimate_mixing_time()", lambda group: saef.estimate_mixing_time(saef.Ring(), group)),
    "distance": (
        "saef.stationary_distance()",
        lambda group: saef.stationary_distance(make_net().parameters(), group),
    ),
}


def create_alone(group: dist.ProcessGroup, who: int) -> tuple[dict[str, str], dict[str, str]]:
    """Each by rank `who` alone; the others come to the last one too late; then each by all, which must work."""
    calls: dict[str, Any] = {name: make for name, (_, make) in CREATE.items()}
    with mock.patch.object(torch_transport, "timeout_of", return_value=timedelta(seconds=0.5)):
        if dist.get_rank(group) == who:
            alone = {name: error(lambda make=make: make(group)) for name, make in calls.items()}
        dist.barrier(group)
        if dist.get_rank(group) != who:
            alone = {"late": error(lambda: calls["distance"](group))}
    dist.barrier(group)
    return alone, {name: error(lambda make=make: make(group)) for name, make in calls.items()}


def test_what_one_rank_creates_alone(pool: RankPool) -> None:
    found = pool.run(create_alone, 1, ranks=3)
    for _, again in found:
        assert {*again.values()} == {"nothing was raised"}, again
    for name, said in found[1][0].items():
        assert f'rank 1 of 3 is at "{CREATE[name][0]}", but not ranks 0, 2 (did not come within 0.5 s' in said
    for rank in (0, 2):
        assert re.search(r'at "saef.stationary_distance\(\)", but not rank.* 1.* \(gave up', found[rank][0]["late"])


def second_state(group: dist.ProcessGroup) -> str:
    """Rank 0 makes another state of a model that trains."""
    _, model, optimizer, state = wrap(group, Job())
    transport: Any = state.engine.transport
    for t in range(3):  # DDP itself exchanges something in the second
        step(group, model, optimizer, t)
    dist.barrier(group)
    transport._private._set_default_timeout(timedelta(seconds=4))
    with mock.patch.object(torch_transport, "timeout_of", return_value=timedelta(seconds=2)):
        if dist.get_rank(group) == 0:
            return error(lambda: CREATE["state"][1](group))
        return error(lambda: [step(group, model, optimizer, t) for t in range(3, 20)])


def test_a_second_state_on_one_rank(pool: RankPool) -> None:
    first, second = pool.run(second_state, ranks=2)
    assert 'rank 0 of 2 is at "SAEFState()", but not rank 1' in first
    assert f'rank 1 of 2 is at {STEP}, but not rank 0 (at "SAEFState()")' in second


def nobody(group: dist.ProcessGroup) -> str:
    """Rank 2 comes once more than the others to where all have been."""
    _, model, optimizer, state = wrap(group, Job())
    step(group, model, optimizer, 0)
    state.consolidated_state_dict()
    METHODS["meet"][1](state)
    transport: Any = state.engine.transport
    transport._meetings._timeout = timedelta(seconds=1)
    return error(lambda: METHODS["meet"][1](state)) if dist.get_rank(group) == 2 else "has ended"


def test_the_others_have_ended(pool: RankPool) -> None:
    said = pool.run(nobody, ranks=3)[2]
    assert f'rank 2 of 3 is at "{UNFROZEN}", but not ranks 0, 1 (did not come within 1 s, the process' in said


def killed(group: dist.ProcessGroup) -> None:
    """Rank 1 dies while rank 0 waits for it: not a matter of the timeout."""
    _, model, optimizer, state = wrap(group, Job())
    step(group, model, optimizer, 0)
    if dist.get_rank(group) == 1:
        time.sleep(0.5)
        os._exit(1)
    with quick():
        state.x_tilde()


def test_a_rank_that_dies_is_not_waited_for() -> None:
    pool = RankPool(2)
    with pytest.raises(AssertionError, match=r'rank 0.*rank 1 did not come to "SAEFState.x_tilde\(\)" and has ended'):
        try:
            pool.run(killed, ranks=2)
        except AssertionError as found:
            raise AssertionError(str(found).replace("\n", " ")) from None
        finally:
            pool.stop()


# ---- nothing is wrong --------------------------------------------------------------------------------------------


def late(group: dist.ProcessGroup) -> torch.Tensor:
    """Ranks that come one after the other, and not in their order; to each method, and train on."""
    _, model, optimizer, state = wrap(group, Job(groups=[{"momentum": 0.9}], state={"averaging": saef.AllReduce(2)}))
    state.load_state_dict(state.state_dict())
    with quick():
        for t, method in enumerate(("x_tilde", "diagnose", "load", "consolidated", "meet", "flush", "reset_errors")):
            step(group, model, optimizer, t)
            time.sleep(0.3 * ((dist.get_rank(group) + t) % 3))
            METHODS[method][1](state)
        step(group, model, optimizer, 10)
    return state.x_tilde()


def test_late_ranks_are_waited_for(pool: RankPool) -> None:
    first, *others = pool.run(late, ranks=3)
    assert all(torch.equal(first, x) for x in others)


def slow_step(group: dist.ProcessGroup) -> torch.Tensor:
    """Rank 0 keeps the others waiting in a step for much longer than they need to look; also in a receive."""
    _, model, optimizer, state = wrap(group, Job(state={"averaging": saef.Ring()}))
    with quick():
        for t in range(4):
            time.sleep(0.5 * (dist.get_rank(group) == 0))
            step(group, model, optimizer, t)
        return state.x_tilde()


def test_a_slow_step_is_no_error(pool: RankPool) -> None:
    first, *others = pool.run(slow_step, ranks=3)
    assert all(torch.equal(first, x) for x in others)


def subgroups(group: dist.ProcessGroup) -> str:
    """Two groups train side by side; in one of them a rank is alone in a method."""
    rank = dist.get_rank(group)
    pairs = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    return train_but(pairs[rank % 2], "x_tilde" if rank % 2 else "meet", 0 if rank % 2 else 5, WAYS[0])


def test_groups_do_not_hear_of_each_other(pool: RankPool) -> None:
    found = pool.run(subgroups, ranks=4)
    assert found[0] == found[2] == "nothing was raised"
    assert f'rank 0 of 2 is at "SAEFState.x_tilde()", but not rank 1 (at {STEP})' in found[1]
    assert f'rank 1 of 2 is at {STEP}, but not rank 0 (at "SAEFState.x_tilde()")' in found[3]


def unused(group: dist.ProcessGroup) -> tuple[int, int]:
    """How often the store is used in 20 steps; and how many keys 20 meetings add."""
    _, model, optimizer, state = wrap(group, Job(groups=[{"momentum": 0.9}], state={"averaging": saef.AllReduce(3)}))
    step(group, model, optimizer, 0)
    sent = state.metrics()
    with mock.patch.object(Meetings, "_read") as read, mock.patch.object(Meetings, "_write") as write:
        for t in range(1, 21):
            step(group, model, optimizer, t)
    if dist.get_world_size(group) == 1:
        with mock.patch.object(Meetings, "_read") as read, mock.patch.object(Meetings, "_write") as write:
            for _, call in METHODS.values():
                call(state)
        return read.call_count + write.call_count, 0
    state.engine.transport.meet("once")
    before, store = state.metrics(), dist.distributed_c10d._get_default_store()
    dist.barrier(group)
    keys = store.num_keys()
    for _ in range(20):
        state.engine.transport.meet("again and again")
    dist.barrier(group)
    assert state.metrics() == before and before["bytes_sent_settings"] == sent["bytes_sent_settings"]
    return read.call_count + write.call_count, store.num_keys() - keys


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_does_not_use_the_store_and_meetings_do_not_fill_it(pool: RankPool, ranks: int) -> None:
    with mock.patch.object(Ordered, "look_s", 60.0):
        assert pool.run(unused, ranks=ranks) == [(0, 0)] * ranks


def connected_to_the_store() -> int:
    """How many connections this process has to it: of IPv4, as the kernel lists them, or of IPv4 in IPv6."""
    port = f":{dist.distributed_c10d._get_default_store().underlying_store.port:04X}"
    own = {os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/self/net", name).read_text().splitlines()]
    return sum(row[2].endswith(port) and f"socket:[{row[9]}]" in own for row in rows)


def connections(group: dist.ProcessGroup) -> list[int]:
    found, states = [], []
    for _ in range(3):
        states.append(wrap(group, Job())[-1])
        found.append(connected_to_the_store())
    return found


def test_all_states_share_a_connection_to_the_store(pool: RankPool) -> None:
    """Besides torch's own: for each of them torch asks the name server who is at either end."""
    for found in pool.run(connections, ranks=2):
        assert found == [2, 2, 2]


# ---- the place where they meet, by threads ---------------------------------------------------------------------


@pytest.fixture(params=["hash", "file", "tcp"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> list[Any]:
    """One store as three ranks see it."""
    if request.param == "hash":
        return [dist.HashStore()] * 3
    if request.param == "file":
        return [dist.FileStore(str(tmp_path / "store"), 3) for _ in range(3)]
    server = dist.TCPStore("localhost", 0, 3, True, wait_for_workers=False)
    return [server, *(dist.TCPStore("localhost", server.port, 3, False, wait_for_workers=False) for _ in range(2))]


def places(stores: list[Any], seconds: float) -> list[Meetings]:
    return [Meetings(store, r, len(stores), timedelta(seconds=seconds), None) for r, store in enumerate(stores)]


def together(work: Callable[[int], Any]) -> list[str]:
    with ThreadPoolExecutor(3) as threads:
        return list(threads.map(lambda r: error(lambda: work(r)), range(3)))


def test_many_meetings(stores: list[Any]) -> None:
    met = places(stores, 30)

    def come(r: int) -> None:
        for t in range(30):
            met[r].meet(f"number {t}", t)

    assert together(come) == ["nothing was raised"] * 3
    assert met[1]._read([0, 1, 2]) == dict.fromkeys(range(3), Note(30, 29, "number 29"))


def test_a_failed_meeting_can_be_held_again(stores: list[Any]) -> None:
    """Whoever comes to one that was given up is told at once; when all have failed, all may come again."""
    met = places(stores, 0.3)
    for r in range(2):
        with pytest.raises(NotTogether):
            met[r].meet("x")
    with pytest.raises(NotTogether, match=r"rank 2 of 3 is at \"x\", but not ranks 0, 1 \(gave up waiting there\)"):
        places(stores, 30)[2].meet("x")
    met = places(stores, 30)
    for _ in range(2):
        assert together(lambda r: met[r].meet("x")) == ["nothing was raised"] * 3
    said = together(lambda r: met[r].meet("y" if r else "x"))
    assert 'rank 0 of 3 is at "x", but not rank' in said[0] and 'but not rank 0 (at "x")' in said[1]
    assert together(lambda r: met[r].meet("z")) == ["nothing was raised"] * 3


def test_a_wait_in_a_collective_is_in_vain_only_if_the_other_met_before_it(stores: list[Any]) -> None:
    met = places(stores, 0.3)
    met[1].check("a step", 7)
    with pytest.raises(NotTogether):
        met[0].meet("x", place=7)
    met = places(stores, 30)
    met[0]._write(Note(1, 7, "x"))
    met[1].check("a step", 7)
    with pytest.raises(NotTogether, match=r"rank 1 of 3 is at \"a step\", but not rank 0 \(at \"x\"\)"):
        met[1].check("a step", 8)
    with pytest.raises(NotTogether, match=r"but not rank 1 \(at \"a step\"\)"):
        met[0].meet("x", place=7)


def test_a_user_made_transport_need_not_meet() -> None:
    """Where there is no store, a subclass of Ordered goes on as ever."""
    with mock.patch.multiple(Ordered, __abstractmethods__=frozenset()):
        ordered = Ordered(0, 2, torch.device("cpu"), thread=True)  # type: ignore[abstract]
        ordered.meet("anything")
        assert ordered.call(lambda: 5) == 5 and TorchTransport._meet is not Ordered._meet
