"""What the README and the pages of docs/ say is what there is."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import textwrap
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

import saef
import saef.hooks
from saef.integrations.deepspeed_config import AVERAGING, COMPRESSORS, HYPER, NODE_SIZE, RULE, RULES, SETTINGS

CHECKOUT = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.cfg").is_file())
README = (CHECKOUT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in sorted((CHECKOUT / "docs").glob("*.md"))}
TEXTS = {name: (CHECKOUT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
TEXTS |= {f"docs/{name}": text for name, text in PAGES.items()}

# A fenced block with its language, or what is indented after an empty line.
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]]*\]\(([^)]+)\)")


def prose(text: str) -> str:
    """The text without fenced blocks and without code in the line, in which brackets mean something else."""
    return re.sub(r"`[^`\n]*`", "`code`", FENCED.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs both make them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def rows(text: str) -> list[list[str]]:
    """Every table row that begins with a word in code, cut into its cells."""
    return [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]


def quoted(text: str) -> list[str]:
    """All that stands in the text's code within lines."""
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", text))


# -- the first page ---------------------------------------------------------------------------------------------------


def test_the_readme_is_a_first_page() -> None:
    assert len(README.splitlines()) <= 135
    linked = {target.partition("#")[0] for target in LINK.findall(prose(README))}
    assert {f"docs/{name}" for name in PAGES if name != "index.md"} <= linked


def test_the_readme_says_where_the_loss_of_a_training_loop_is_taken() -> None:
    said = " ".join(README.split())
    assert "The loss that a training loop prints is the one at x_half" in said
    assert "for the loss there, call the model under `torch.no_grad()`" in said


def test_papers_are_linked_where_they_are_first_named() -> None:
    for paper, address in (("SAEF", "2008.05823"), ("dist-EF", "1905.10936"), ("MixML", "2005.06706")):
        for text in (README, PAGES["papers.md"]):
            assert f"https://arxiv.org/abs/{address}" in text, paper
    for paper in ("dist-EF", "MixML"):
        assert README.index(f"[{paper}](") + 1 == README.index(paper)


def test_the_readmes_results_are_those_of_the_performance_page() -> None:
    def table(text: str) -> list[str]:
        lines = text[text.index("| method | training loss") :].splitlines()
        return [line for line in lines[: lines.index("")] if not line.startswith("|---")]

    shown, all_of_them = table(README), table(PAGES["performance.md"])
    assert shown[0] == all_of_them[0] and len(shown) == 1 + 5 and len(all_of_them) == 1 + 13
    assert [line for line in all_of_them if line in shown] == shown
    assert [line.split(" | ")[0].strip("| ") for line in shown[1:]] == [
        "full precision",
        "EF top-1 %",
        "SAEF top-1 %, Rotating(20)",
        "EF sign",
        "SAEF sign",
    ]


def test_the_readmes_speeds_are_those_of_the_performance_page() -> None:
    table = PAGES["performance.md"].partition("### A training step")[2].partition("### Overlap")[0]
    said = re.search(r"([\d.]+) of plain DDP's time\s+on loopback, ([\d.]+) on .*? and ([\d.]+) on", README)
    assert said and list(said.groups()) == re.findall(r"^\| (?:loopback|one 10?) ?.*?\| ([\d.]+) \|", table, re.M)


# -- all pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in LINK.findall(prose(TEXTS[name])):
        if re.match(r"https://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (CHECKOUT / name).parent / file if file else CHECKOUT / name
        assert path.is_file(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{name}: {target}"


@pytest.mark.parametrize("name", TEXTS)
def test_blocks_of_code_are_code(name: str) -> None:
    for language, block in FENCED.findall(TEXTS[name]):
        known = {"python", "diff", "json", "sh", "yaml"}
        assert language in known, f"{name}: a block without a known language: {language!r}"
        if language == "diff":  # with and without what is added
            compile("\n".join(line[2:] for line in block.splitlines()), name, "exec")
            compile("\n".join(line[2:] for line in block.splitlines() if line[:1] != "+"), name, "exec")
        elif language == "python":
            compile(textwrap.dedent(block), name, "exec")
        elif language == "json":
            json.loads(block)
        elif language == "yaml":
            assert all(yaml.safe_load_all(block))
        elif block.startswith("#!/bin/bash"):
            assert not subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True).stderr


@pytest.mark.parametrize("name", TEXTS)
def test_calls_name_arguments_that_exist(name: str) -> None:
    """Each call of one of our names in a block of Python, and in code within a line, can be made."""
    pieces = [block for language, block in FENCED.findall(TEXTS[name]) if language == "python"]
    for piece in [*pieces, *quoted(TEXTS[name])]:
        try:
            tree = ast.parse(textwrap.dedent(piece))
        except SyntaxError:  # `Rotating(p) does ...`, or another language
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("saef."):
                called = resolve(ast.unparse(node.func))
                if called is not None and not any(isinstance(a, ast.Constant) and a.value is ... for a in node.args):
                    keywords = {word.arg: None for word in node.keywords if word.arg}
                    inspect.signature(called).bind_partial(*node.args, **keywords)


@pytest.mark.parametrize("name", TEXTS)
def test_targets_of_make_exist(name: str) -> None:
    targets = {
        word
        for line in re.findall(r"^([\w ]+):(?!=)", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
        for word in line.split()
    }
    named = re.findall(r"\bmake ((?:[a-z][a-z0-9]* ?)+)", " ; ".join(quoted(TEXTS[name])))
    named += re.findall(r"^    make ((?:[a-z][a-z0-9]* ?)+)", TEXTS[name], re.MULTILINE)
    for words in named:
        assert {*words.split()} <= targets, f"{name}: make {words}"


def resolve(dotted: str) -> Any:
    """What a dotted name under `saef` stands for; None for what needs a framework that is not installed here."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("saef"):
                continue
            return None
        except ImportError:
            return None
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(dotted)


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "CHANGELOG.md"])
def test_dotted_names_exist(name: str) -> None:
    found = {
        match for text in quoted(TEXTS[name]) for match in re.findall(r"(?<![\w./-])saef(?:\.[A-Za-z_]\w*)+", text)
    }
    for dotted in found:
        resolve(dotted)


def files(text: str) -> Iterator[str]:
    """Paths of files and folders in a page's code, as far as they can be told from other words."""
    for word in quoted(text):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/|([\w.-]+/)*[\w-]*\.?[\w-]+\.(py|sh|md|cfg|toml|txt|yml|json)", word):
            yield word


# Examples of what somebody may add or has in their own folder.
NOT_HERE = {"core/rules/adamw.py", "ds_config.json", "saef/", "train.py"}


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "CHANGELOG.md"])
def test_files_exist(name: str) -> None:
    for file in files(TEXTS[name]):
        if file not in NOT_HERE:
            assert (CHECKOUT / file).exists(), f"{name}: {file}"


def test_the_architecture_page_names_every_source_file() -> None:
    named = {*files(PAGES["architecture.md"])}
    for folder in ("core", "hooks", "integrations"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            file = path.relative_to(CHECKOUT).as_posix()
            assert file in named or (path.name == "__init__.py" and f"{Path(file).parent.as_posix()}/" in named), file


def test_the_reference_lists_every_public_name() -> None:
    listed = re.findall(r"^::: ([\w.]+)", PAGES["api.md"], re.MULTILINE)
    assert len(listed) == len({*listed})
    public = {f"saef.{name}" for name in saef.__all__ if not name.startswith("_")}
    assert {name for name in listed if name.count(".") == 1} == public
    hooks = {name.split(".")[-1] for name in listed if name.startswith("saef.hooks.")}
    assert hooks == {*saef.hooks.__all__}


def test_what_was_tested_is_what_is_pinned() -> None:
    """Wherever a version stands: "Lightning 2.6.6", or in two cells of a table."""
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (CHECKOUT / "constraints.txt").read_text(), re.M))
    build = (CHECKOUT / "integrations" / "build_horovod.sh").read_text()
    pinned["horovod"] = re.search(r"^version=(\S+)$", build, re.M)[1]  # type: ignore[index]
    names = "torch|Lightning|transformers|Accelerate|Ray|DeepSpeed|Horovod|triton"
    found = [m for page in PAGES.values() for m in re.findall(rf"\b({names})(?: \| | )(\d+\.\d+\.\d+)\b", page)]
    assert len({name for name, _ in found}) == 8
    assert [(name, version) for name, version in found if pinned[name.lower()] != version] == []


def package() -> ConfigParser:
    config = ConfigParser()
    config.read(CHECKOUT / "setup.cfg")
    return config


def test_the_oldest_versions_are_those_that_setup_cfg_allows() -> None:
    options = package()["options"]
    allowed = {"Python": options["python_requires"].removeprefix(">=")}
    allowed |= dict(line.split(">=") for line in options["install_requires"].split())
    said = re.search(r"with the oldest, (.*?), and the newest", " ".join(PAGES["index.md"].split()))
    assert said is not None
    assert dict(part.split() for part in said[1].split(", ")) == allowed
    command = re.search(r"pip install \. (.*?) pytest", TEXTS["CONTRIBUTING.md"])
    assert command is not None
    pinned = dict(part.split("==") for part in command[1].split())
    assert {name: version.rpartition(".")[0] for name, version in pinned.items()} == {
        name: version for name, version in allowed.items() if name != "Python"
    }


def test_the_changelog_has_this_version() -> None:
    config = package()
    headings = re.findall(r"^## (.*)$", TEXTS["CHANGELOG.md"], re.MULTILINE)
    assert config["metadata"]["version"] in headings
    assert all(re.fullmatch(r"Unreleased|\d+\.\d+\.\d+", heading) for heading in headings)


# -- tables -----------------------------------------------------------------------------------------------------------


def test_the_keys_of_deepspeeds_json_and_their_defaults() -> None:
    section = PAGES["deepspeed.md"].partition("## Coming from OneBitAdam")[0]
    found = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    listed = {key: row for row in found for key in re.findall(r"`(\w+)`", row[0])}
    assert [key for key in listed if key in {*HYPER, *SETTINGS}] == [*HYPER, *SETTINGS]
    defaults = {name: p.default for name, p in inspect.signature(saef.SAEFState).parameters.items()} | HYPER
    for key in (*HYPER, *SETTINGS):
        shown = json.loads(listed[key][2].strip("`"))
        assert (saef.ScaledSign() if shown == {"type": "sign"} else shown) == defaults[key], key
    assert json.loads(listed["rule"][2].strip("`")) == RULE
    assert json.loads(listed["node_size"][2].strip("`")) == NODE_SIZE
    for name, kind in {**RULES, **COMPRESSORS, **AVERAGING}.items():
        (row,) = [row for row in found if f'`"{name}"`' in row[0]]
        shown = dict(re.findall(r"`(\w+)`(?: \(([^)]*)\))?", row[1]))
        values = {f.name: list(f.default) if isinstance(f.default, tuple) else f.default for f in fields(kind)}
        assert shown == {n: "" if value is MISSING else str(value) for n, value in values.items()}, name


def test_the_arguments_of_a_state_and_their_defaults() -> None:
    section = PAGES["options.md"].partition("## Arguments of SAEFState")[2].partition("## Compressors")[0]
    listed = re.findall(r"^\| `(\w+)` \| `([^|]*)` \|", section, re.MULTILINE)
    assert len(listed) == len(rows(section))
    parameters = inspect.signature(saef.SAEFState).parameters
    shown = {name: eval(text, vars(saef).copy()) for name, text in listed}
    assert shown == {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def test_the_compressors_and_their_fields() -> None:
    section = PAGES["options.md"].partition("## Compressors")[2].partition("## Presets")[0]
    listed = {row[0].strip("` "): row[1] for row in rows(section)}
    assert {*listed} == {kind.__name__ for kind in COMPRESSORS.values()}
    for kind in COMPRESSORS.values():
        shown = dict(re.findall(r"`(\w+)`(?: \(([^)]*)\))?", listed[kind.__name__]))
        assert shown == {f.name: "" if f.default is MISSING else str(f.default) for f in fields(kind)}, kind


def test_the_presets() -> None:
    section = PAGES["options.md"].partition("## Presets")[2].partition("\n## ")[0]
    assert {row[0].strip("` ") for row in rows(section)} == {*saef.hooks.__all__} - {"saef_hook", "register"}


@pytest.mark.slow
def test_the_mixing_times() -> None:
    """The columns n = 4, 8 and 32, rounded; at period 1, where a "p" stands for the factor p."""
    section = PAGES["averaging.md"].partition("## Which to choose")[0]
    found = {line.split("`")[1].split("(")[0]: line.split(" | ")[3:6] for line in section.splitlines() if "`" in line}
    protocols = {
        "AllReduce": saef.AllReduce(1),
        "Rotating": saef.Rotating(1),
        "Slack": saef.Slack(0.1),
        "Ring": saef.Ring(),
        "AsyncRing": saef.AsyncRing(),
    }
    for name, protocol in protocols.items():
        shown = [float(cell.strip(" p")) for cell in found[name]]
        times = [saef.mixing_time(protocol, n) for n in (4, 8, 32)]
        assert shown == [pytest.approx(time, rel=0.005) for time in times], name
    coupons = [n * sum(1 / k for k in range(1, n + 1)) for n in (4, 8, 32)]
    assert [float(cell) for cell in found["AsyncParameterServer"]] == [pytest.approx(c, rel=0.005) for c in coupons]


def test_the_averaging_page_repeats_the_results() -> None:
    """Bytes and accuracies in its table are those of the table of all results."""
    table = {
        cells[0].strip("| "): (cells[3], cells[2])
        for line in PAGES["performance.md"].splitlines()
        if line.startswith("| SAEF top-1 %, ") and len(cells := line.split(" | ")) == 5
    }
    section = PAGES["averaging.md"].partition("## Which to choose")[0]
    shown = {line.split("`")[1].split("(")[0]: line.split(" | ")[-1] for line in section.splitlines() if "`" in line}
    assert shown["None"].strip("| ") == ", ".join(table["SAEF top-1 %, p = inf"])
    for name, period, label in (
        ("AllReduce", 5, "AllReduce(5)"),
        ("AllReduce", 20, "p = 20"),
        ("Rotating", 5, "Rotating(5)"),
        ("Rotating", 20, "Rotating(20)"),
        ("Ring", 1, "Ring()"),
        ("Ring", 5, "Ring(5)"),
        ("AsyncRing", 1, "AsyncRing()"),
    ):
        assert f"p = {period}: {', '.join(table[f'SAEF top-1 %, {label}'])}" in shown[name], label
