"""What the README lists is what there is."""

import inspect
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import saef
from saef.integrations.deepspeed_config import AVERAGING, COMPRESSORS, HYPER, SETTINGS

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_the_keys_of_deepspeeds_json_and_their_defaults() -> None:
    section = README[README.index("## DeepSpeed") : README.index("### Coming from OneBitAdam")]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    listed = {key: row for row in rows for key in re.findall(r"`(\w+)`", row[0])}
    assert [key for key in listed if key in {*HYPER, *SETTINGS}] == [*HYPER, *SETTINGS]
    defaults = {name: p.default for name, p in inspect.signature(saef.SAEFState).parameters.items()} | HYPER
    for key in (*HYPER, *SETTINGS):
        shown = json.loads(listed[key][2].strip("`"))
        assert (saef.ScaledSign() if shown == {"type": "sign"} else shown) == defaults[key], key
    for name, kind in {**COMPRESSORS, **AVERAGING}.items():
        (row,) = [row for row in rows if f'`"{name}"`' in row[0]]
        shown = dict(re.findall(r"`(\w+)`(?: \(([^)]*)\))?", row[1]))
        assert shown == {f.name: "" if f.default is MISSING else str(f.default) for f in fields(kind)}, name


def test_the_arguments_of_a_state_and_their_defaults() -> None:
    section = README[README.index("## Options") : README.index("Presets in `saef.hooks`")]
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^|]*)` \|", section, re.MULTILINE))
    parameters = inspect.signature(saef.SAEFState).parameters
    shown = {name: eval(text, vars(saef).copy()) for name, text in rows.items()}
    assert shown == {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def test_the_mixing_times() -> None:
    """The columns n = 4, 8 and 32, rounded; at period 1, where a "p" stands for the factor p."""
    section = README[README.index("## Which averaging") : README.index("**Any network on which")]
    rows = {line.split("`")[1].split("(")[0]: line.split(" | ")[3:6] for line in section.splitlines() if "`" in line}
    protocols = {
        "AllReduce": saef.AllReduce(1),
        "Rotating": saef.Rotating(1),
        "Slack": saef.Slack(0.1),
        "Ring": saef.Ring(),
        "AsyncRing": saef.AsyncRing(),
    }
    for name, protocol in protocols.items():
        shown = [float(cell.strip(" p")) for cell in rows[name]]
        times = [saef.mixing_time(protocol, n) for n in (4, 8, 32)]
        assert shown == [pytest.approx(time, rel=0.005) for time in times], name
    coupons = [n * sum(1 / k for k in range(1, n + 1)) for n in (4, 8, 32)]
    assert [float(cell) for cell in rows["AsyncParameterServer"]] == [pytest.approx(c, rel=0.005) for c in coupons]
