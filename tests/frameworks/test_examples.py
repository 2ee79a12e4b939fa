"""The examples as a user starts them: each once in interpreters of its own, else in forked ones."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import EXAMPLES, readme_script
from support.forked import python


def run(*command: str, cwd: Path, fresh: bool = False) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable if fresh else python(), *command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readmes_script_can_be_copied_and_run(tmp_path: Path) -> None:
    """Under its own name, by its own command; all ranks train, one reports."""
    script = readme_script()
    name, command = re.match(r"# (\S+), started by: torchrun (.*)\n", script).groups()  # type: ignore[union-attr]
    assert 20 <= len(script.splitlines()) <= 30 and "--nproc_per_node=2" in command and command.endswith(f" {name}")
    (tmp_path / name).write_text(script)
    said = run("-m", "torch.distributed.run", *command.split(), cwd=tmp_path).splitlines()
    losses = [float(re.fullmatch(r"step \d+: loss ([\d.]+) at x_half", line)[1]) for line in said[:-1]]  # type: ignore[index]
    assert len(losses) == 6 and losses[0] > 2 > 0.5 > losses[-1]  # log(10) is guessing
    assert said[-1].startswith("<SAEFState: SAEF, ScaledSign(block=65536) both ways; 2 ranks, replicated; 19,210 param")


@pytest.mark.parametrize(
    ("flags", "ratio"),
    [
        (["--method", "full"], 1.0),
        (["--method", "saef-sign", "--nesterov"], 10.0),
        (["--method", "saef-topk", "--averaging", "rotating", "--period", "5", "--ratio", "0.05"], 1.5),
    ],
    ids=lambda v: v[1] if isinstance(v, list) else "",
)
def test_train_ddp_runs_under_torchrun(tmp_path: Path, flags: list[str], ratio: float) -> None:
    out = tmp_path / "records.jsonl"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(EXAMPLES / "train_ddp.py")]
    run(*command, *flags, "--steps", "22", "--out", str(out), cwd=tmp_path, fresh="--nesterov" in flags)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["step"] for r in records] == [11, 22]
    assert records[1]["loss"] < records[0]["loss"] < 2.3  # log(10): better than guessing, and falling
    assert records[1]["ratio"] >= ratio


@pytest.mark.parametrize("method", ["adamw", "saef", "saef-topk"])
def test_train_gpt_runs_under_torchrun_and_resumes(tmp_path: Path, method: str) -> None:
    """On a text of its own; with saef then from the checkpoint at step 20, on one rank."""
    (tmp_path / "text").write_text("to be, or not to be: that is the question. " * 200)
    flags = ["--method", method, "--data", "text", "--batch", "8", "--context", "16", "--eval-every", "10"]
    files = ["--out", "records.jsonl", *([] if method == "adamw" else ["--checkpoint", "saved"])]
    found = []
    for ranks, steps in (("2", "20"), ("1", "30"))[: 1 if method == "adamw" else 2]:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
        run(*command, str(EXAMPLES / "train_gpt.py"), *flags, *files, "--steps", steps, cwd=tmp_path)
        found.append([json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()])
    assert [r["step"] for r in found[0]] == [10, 20]
    assert found[0][1]["loss"] < found[0][0]["loss"] < 5.6  # log(256) is guessing
    assert (found[0][1]["ratio"] == 1) == (method == "adamw") and found[0][1]["tokens_per_second"] > 0
    if method != "adamw":
        assert [r["step"] for r in found[1]] == [30] and found[1][0]["loss"] < found[0][1]["loss"]


@pytest.mark.parametrize("more", [("--fsdp",), ()], ids=["fsdp", "ddp"])
def test_train_gpt_runs_on_nodes_of_two_ranks(tmp_path: Path, more: tuple[str, ...]) -> None:
    (tmp_path / "text").write_text("to be, or not to be: that is the question. " * 200)
    flags = ["--data", "text", "--batch", "8", "--context", "16", "--eval-every", "10", "--steps", "20"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4", str(EXAMPLES / "train_gpt.py")]
    said = run(*command, *flags, "--node-size", "2", *more, cwd=tmp_path)
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert found[1]["loss"] < found[0]["loss"] < 5.6 and found[1]["ratio"] > 10


def test_lm_prints_a_table_and_saves_a_picture(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("to be, or not to be: that is the question. " * 200)
    flags = ["--methods", "adamw", "saef", "--steps", "12", "--seeds", "2", "--data", "text", "--picture", "lm.png"]
    flags += ["--batch", "8"]
    said = run(str(EXAMPLES / "lm.py"), *flags, cwd=tmp_path, fresh=True)
    assert re.search(r"^AdamW +\d\.\d{3} \+- \d\.\d{3} .* 1\.0x$", said, re.MULTILINE)
    assert re.search(r"^SAEF-AdamW, sign +\d\.\d{3} \+-", said, re.MULTILINE)
    assert re.search(r"^SAEF-AdamW, sign is [+-]\d\.\d{3} from AdamW, at most 0.03: (yes|NO)$", said, re.MULTILINE)
    assert (tmp_path / "lm.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_gets_counters_and_measurements(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(EXAMPLES / "train_ddp.py")]
    run(*command, "--method", "saef-topk", "--steps", "20", "--tensorboard", str(tmp_path / "board"), cwd=tmp_path)
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    tags = board.Tags()["scalars"]
    for name in ("loss", "steps_skipped", "bytes_per_step", "mean_gradient_mismatch", "stationary_distance"):
        assert f"saef/{name}" in tags
    assert sum(tag.startswith("saef/delta/") for tag in tags) > 10
    assert [(e.step, e.value) for e in board.Scalars("saef/steps")] == [(10, 10.0), (20, 20.0)]
    assert all(0 <= e.value <= 1 for tag in tags if tag.startswith("saef/delta/") for e in board.Scalars(tag))


def test_demo_prints_a_table_and_saves_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    out = run(str(EXAMPLES / "demo.py"), "--epochs", "1", "--picture", str(picture), cwd=tmp_path, fresh=True)
    for method in ("full precision", "EF sign", "SAEF sign", "EF top-1 %", "SAEF top-1 %"):
        assert any(line.startswith(method) for line in out.splitlines())
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_mixing_draws_both_figures(tmp_path: Path) -> None:
    flags = ["--epochs", "1", "--seeds", "3", "--workers", "8", "--live", "3", "--out", "figures"]
    said = run(str(EXAMPLES / "mixing.py"), *flags, cwd=tmp_path, fresh=True)
    for figure in ("figure2", "figure3"):
        assert (tmp_path / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "figures" / "figure3.csv").open() as file:
        rows = {(r["protocol"], r["workers"], r["how"]): float(r["mean"]) for r in csv.DictReader(file)}
    assert rows["Ring", "8", "operators"] == 32 and rows["Local step (m = 2)", "8", "operators"] == 16
    for (protocol, workers, how), mean in rows.items():
        assert how == "operators" or rows[protocol, workers, "operators"] == mean  # the same seeds
    assert {workers for _, workers, how in rows if how == "live"} == {"2", "3"}
    with (tmp_path / "figures" / "figure2.csv").open() as file:
        curves = list(csv.DictReader(file))
    assert {(r["method"], r["t_mix"]) for r in curves} == {
        *((method, t_mix) for method in ("reduced frequency", "slack") for t_mix in ("8", "80", "800", "8000")),
        ("ring", "32"),
        ("async ring", "32"),
        ("async parameter server", "22"),
    }
    apart = {r["t_mix"]: float(r["distance"]) for r in curves if r["method"] == "slack"}
    assert apart["8"] < apart["80"] < apart["800"]
    assert "8,000" in said and all(float(r["loss"]) < 2.4 for r in curves)  # log(10) is guessing


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_train_deepspeed_runs_under_both_launchers(tmp_path: Path, launcher: str) -> None:
    """bf16 and top-1 % as ds_config.json says; then from the checkpoint at step 10, on other ranks."""
    words = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"],
        "deepspeed": [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators"],
    }[launcher]
    script = [str(EXAMPLES / "train_deepspeed.py"), "--deepspeed_config", str(EXAMPLES / "ds_config.json")]
    files = ["--checkpoint", "saved", "--checkpoint-every", "10", "--out", "records.jsonl"]
    found = []
    for ranks, steps in (("2", "22"), ("1", "33")):
        run(
            *words,
            ranks,
            *script,
            *files,
            "--steps",
            steps,
            cwd=tmp_path,
            fresh=launcher == "torchrun" and ranks == "1",
        )
        found.append([json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()])
    assert [[r["step"] for r in records] for records in found] == [[11, 22], [22, 33]]
    assert found[1][-1]["loss"] < 1.5 < found[0][0]["loss"]
    assert found[0][-1]["ratio"] > 7  # to bf16; 2 * 19,074 parameters send 38 kB plain
    saved = {p.name for p in (tmp_path / "saved").iterdir()}
    assert saved == {"latest", "global_step10", "global_step20", "global_step30"}
    assert (tmp_path / "saved" / "global_step20" / "saef").is_dir()


def test_train_horovod_runs_and_resumes_on_other_ranks(tmp_path: Path) -> None:
    """fp16, then sign; then from the checkpoint at step 20 with one rank more."""
    pytest.importorskip("horovod", reason="needs Horovod: `make horovod` builds it")
    found = []
    for ranks, flags in (
        ("2", ["--compression", "fp16", "--steps", "11"]),
        ("2", ["--compression", "saef-sign", "--steps", "22", "--checkpoint", "saved", "--checkpoint-every", "10"]),
        ("4", ["--compression", "saef-sign", "--steps", "33", "--checkpoint", "saved"]),
    ):
        fresh = ranks == "2" and "saef-sign" in flags
        launcher = [str(Path(sys.executable).parent / "horovodrun"), "--gloo", "-np", ranks]
        words = [sys.executable if fresh else python(), str(EXAMPLES / "train_horovod.py"), *flags]
        run(*launcher, *words, "--out", str(tmp_path / "out"), cwd=tmp_path, fresh=fresh)
        found.append([json.loads(line) for line in (tmp_path / "out").read_text().splitlines()])
    assert [[r["step"] for r in records] for records in found] == [[11], [11, 22], [22, 33]]
    assert found[2][-1]["loss"] < 0.8 * found[1][0]["loss"] < 0.8 * 2.3  # log(10): better than guessing, and falling
    assert found[1][-1]["bytes_per_step"] < found[0][0]["bytes_per_step"] / 5
