"""The structure: imports point one way, classes are abstract or final, and importing saef stays cheap."""

import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import saef

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("core", "hooks", "integrations")


def arrows(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, root / ".ci" / "arrows.py"], capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for folder in (*FOLDERS, ".ci"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_arrows_point_down() -> None:
    found = arrows(ROOT)
    assert found.returncode == 0, found.stderr
    assert found.stdout.endswith(" 0 problems\n")


UPWARDS = {
    "at the top": "from ..step.memory import Memory\n",
    "in a function": "def f():\n    from saef.step import memory\n",
    "for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import saef.step.memory\n",
}


@pytest.mark.parametrize("way", UPWARDS)
def test_an_arrow_upwards_is_found(copy: Path, way: str) -> None:
    with (copy / "core" / "comm" / "exchange.py").open("a") as file:
        file.write(UPWARDS[way])
    found = arrows(copy)
    assert found.returncode == 1
    assert "saef.comm.exchange imports saef.step.memory: arrows point down only" in found.stderr


FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {} import hooks\n"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("core/__init__.py", "from . import hooks\n"),
        ("core/__init__.py", "def f():\n    import saef.integrations\n"),
        ("core/__init__.py", FOR_TYPES.format(".") + "else:\n    from . import hooks\n"),
        ("core/__init__.py", FOR_TYPES.format(".hooks").replace("hooks\n", "presets\n")),
        ("core/state.py", FOR_TYPES.format(".")),
    ],
)
def test_only_the_package_itself_may_name_what_is_above_and_for_types_only(copy: Path, file: str, text: str) -> None:
    with (copy / file).open("a") as changed:
        changed.write(text)
    assert re.search(r"saef(\.state)? imports saef\.(hooks|integrations)\S*: arrows point", arrows(copy).stderr)


def test_wire_and_protocols_do_not_know_each_other(copy: Path) -> None:
    (copy / "core" / "wire" / "new.py").write_text("from ..protocols.averaging import Averaging\n")
    assert "saef.wire.new imports saef.protocols.averaging" in arrows(copy).stderr


def test_a_circle_in_a_folder_is_found(copy: Path) -> None:
    (copy / "core" / "comm" / "one.py").write_text("from . import two\n")
    (copy / "core" / "comm" / "two.py").write_text("def f():\n    from .one import x\n")
    found = arrows(copy)
    assert found.returncode == 1
    assert "a circle: " in found.stderr
    assert "saef.comm.one imports saef.comm.two" in found.stderr


def test_a_module_outside_the_rooms_is_found(copy: Path) -> None:
    (copy / "core" / "helpers.py").write_text("")
    assert "saef.helpers is in no room" in arrows(copy).stderr


def classes() -> list[type[Any]]:
    """All classes of the package that import without a framework."""
    found = []
    for module in pkgutil.walk_packages(saef.__path__, "saef."):
        if module.name.startswith("saef.integrations.") or ".cuda" in module.name or module.name.endswith("__main__"):
            continue
        for _, value in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if value.__module__ == module.name:
                found.append(value)
    return found


def test_a_class_is_abstract_or_final() -> None:
    found = classes()
    assert len(found) > 40
    for kind in found:
        for base in kind.__mro__[1:]:
            if base.__module__.split(".")[0] == "saef":
                assert inspect.isabstract(base) or getattr(base, "_is_protocol", False), f"{kind} derives from {base}"


def said(code: str) -> str:
    """What a new process prints that has imported saef alone."""
    words = [sys.executable, "-c", f"import sys, saef\n{code}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_saef_imports_nothing_that_takes_long() -> None:
    heavy = {"numba", "triton", "deepspeed", "horovod", "pandas"}
    loaded = "print(*sorted(m for m in sys.modules if m.split('.')[0] in " + repr({*heavy, "saef"}) + "))"
    before, after = said(f"{loaded}; saef.hooks.saef_hook, saef.integrations; {loaded}").splitlines()
    assert {m.split(".")[0] for m in before.split()} == {m.split(".")[0] for m in after.split()} == {"saef"}
    assert not [m for m in before.split() if m.startswith(("saef.hooks", "saef.integrations"))]
    assert {*after.split()} - {*before.split()} >= {"saef.hooks", "saef.hooks.saef_hook", "saef.integrations"}


@pytest.mark.slow
def test_hooks_and_integrations_are_attributes() -> None:
    assert said("print(sorted({'hooks', 'integrations', 'SAEFState'} & {*dir(saef)}), 'hooks' in vars(saef))") == (
        "['SAEFState', 'hooks', 'integrations'] False\n"
    )
    assert (
        said("f = saef.hooks.ef; import saef.hooks; print(saef.hooks.ef is f, 'hooks' in vars(saef))") == "True True\n"
    )
    assert said("from saef import hooks, integrations; print(hooks.__name__)") == "saef.hooks\n"


@pytest.mark.parametrize("module", ["saef", "saef.hooks", "saef.integrations"])
@pytest.mark.parametrize("name", ["hoks", "tests", "__wrapped__"])
def test_other_attributes_are_not_there(module: str, name: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute '{name}'"):
        getattr(importlib.import_module(module), name)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["deepspeed", "horovod"])
def test_an_adapter_is_an_attribute_and_says_what_is_missing(framework: str) -> None:
    code = f"sys.modules['{framework}'] = None\ntry: saef.integrations.{framework}\nexcept ImportError as e: print(e)"
    assert re.match(f"saef.integrations.{framework} needs {framework}".lower(), said(code).lower())
