"""What a user installs: the wheel, made from the source distribution, in an environment of its own."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

from support import CHECKOUT

FOLDERS = {"saef": "core", "saef/hooks": "hooks", "saef/integrations": "integrations"}
PACKAGES = {
    "saef",
    "saef/comm",
    "saef/hooks",
    "saef/integrations",
    "saef/protocols",
    "saef/rules",
    "saef/step",
    "saef/wire",
    "saef/wire/kernels",
    "saef/wire/kernels/cpu",
    "saef/wire/kernels/cuda",
}

# The Triton kernels need Triton, which is there on Linux for x86.
ALONE_PACKAGES = sorted(name for name in PACKAGES if find_spec("triton") or not name.endswith("/cuda"))


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of `command`, started in `cwd` without this process's PYTHON* variables."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@dataclass(frozen=True)
class Installed:
    wheel: Path
    python: Path
    site: Path  # site-packages of the fresh environment

    @property
    def version(self) -> str:
        return self.wheel.name.split("-")[1]

    def imported(self, cwd: Path, *flags: str) -> list[str]:
        """[saef.__file__, saef.__version__, saef modules loaded by `import saef`] as seen from `cwd`."""
        code = (
            "import sys, saef; print(saef.__file__); print(saef.__version__); "
            "print(*sorted(m for m in sys.modules if m.split('.')[0] == 'saef'))"
        )
        return run(self.python, *flags, "-c", code, cwd=cwd).splitlines()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A wheel built from the checkout's source distribution and installed into a new virtual environment."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"  # a copy, since building leaves files in the source tree
    outputs = shutil.ignore_patterns(".git", ".venv", ".cache", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(CHECKOUT, source, ignore=outputs)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")

    # The new environment comes first on its sys.path, and after it, for torch and numba, the running one.
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder))
    install = ("install", "--no-deps", "--no-index", "--disable-pip-version-check", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder)
    running = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "running.pth").write_text("\n".join(running) + "\n")
    return Installed(wheel, python, site)


def test_wheel_holds_the_four_packages_and_nothing_else(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    info = f"saef-{installed.version}.dist-info"
    assert {name.split("/")[0] for name in names} == {"saef", info}

    code = {name for name in names if name.startswith("saef/")}
    assert {name.rpartition("/")[0] for name in code if name.endswith("/__init__.py")} == PACKAGES
    # Every module of the checkout, so that a new folder cannot be forgotten in setup.cfg, and no other file.
    modules = {
        f"{package}/{path.relative_to(CHECKOUT / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in (CHECKOUT / folder).rglob("*.py")
    }
    assert code == modules | {"saef/py.typed"}
    assert f"{info}/licenses/LICENSE" in names


def test_wheel_says_what_it_is(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        text = archive.read(f"saef-{installed.version}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    assert metadata["Name"] == "saef"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert (CHECKOUT / "README.md").read_text().strip() == str(metadata.get_payload()).strip()
    needed = {r.split(">")[0] for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r}
    assert needed == {"torch", "numpy", "numba"}


def test_import_from_elsewhere(installed: Installed, tmp_path: Path) -> None:
    file, version, loaded = installed.imported(tmp_path, "-I")
    assert Path(file) == installed.site / "saef" / "__init__.py"
    assert version == installed.version
    # Arrows point down only: the core imports neither its hooks nor its integrations.
    assert not [m for m in loaded.split() if m.startswith(("saef.hooks", "saef.integrations"))]


def test_checkout_does_not_shadow_the_installed_package(installed: Installed) -> None:
    file, version, _ = installed.imported(CHECKOUT)  # without -I, sys.path begins with the current folder
    assert Path(file) == installed.site / "saef" / "__init__.py"
    assert version == installed.version


def test_nothing_is_unpickled() -> None:
    """No module unpickles: no pickle, no collective on objects, and torch.load with weights_only=True alone."""
    loads = 0
    for folder in FOLDERS.values():
        for path in (CHECKOUT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                    assert names.isdisjoint({"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}), path
                if isinstance(node, ast.Attribute):
                    assert (
                        not node.attr.endswith(("_object", "_object_list"))
                        and node.attr != "loads"
                        or (ast.unparse(node) == "json.loads")
                    ), (path, node.lineno)
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    safe = {ast.unparse(word) for word in node.keywords if word.arg == "weights_only"}
                    assert len(safe) == 1 and "weights_only=True" in ast.unparse(node), (path, node.lineno)
                    loads += 1
    assert loads  # it did look


ALONE = """
import importlib, os, sys, traceback
import numba, torch  # which take seconds; each package is then imported in a fork that knows nothing of the others
assert not any(module.split(".")[0] == "saef" for module in sys.modules)
for name in sys.argv[1:]:
    if not os.fork():
        try:
            print(importlib.import_module(name).__file__, flush=True)
        except BaseException:
            print(repr(traceback.format_exc()), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def files(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The __file__ of each package imported on its own, or what it raised."""
    names = ALONE_PACKAGES
    words = [name.replace("/", ".") for name in names]
    said = run(installed.python, "-I", "-c", ALONE, *words, cwd=tmp_path_factory.mktemp("elsewhere"))
    return dict(zip(names, said.splitlines(), strict=True))


@pytest.mark.parametrize("package", ALONE_PACKAGES)
def test_every_package_imports_on_its_own(installed: Installed, files: dict[str, str], package: str) -> None:
    assert Path(files[package]) == installed.site / package / "__init__.py"
