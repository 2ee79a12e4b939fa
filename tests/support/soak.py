"""A long run under fire: random NaN gradients, random checkpoints, ranks killed at random moments.

    python tests/support/soak.py --steps 10000 --kills 20        prints a report; exit status 1 if anything was wrong

One process starts torchrun with `--ranks` workers and kills one of them (SIGKILL) again and again; torchrun
restarts all of them, and they go on from the last complete checkpoint. What must hold is checked all the time:

    x       bit-identical on all ranks, every 10 steps (`audit_every`)
    x~      within the bound of rounding of its recurrence x~ <- x~ - eta mean_k u_k, over every 50 attempts,
            restarts included
    resume  x~ loaded is x~ saved, bit for bit
    time    an attempt takes no longer than the process group's timeout, restarts included
    memory  resident set within 5 % of what it was after warm-up, for each process that lives long enough
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook

TIMEOUT_S = 60  # of the process group
WARM_UP = 200  # attempts of a process before its memory is expected to be flat
METHODS = {
    "sign": {"compressor": saef.ScaledSign(block=500), "exchange": "replicated", "averaging": saef.AllReduce(5)},
    "top-k": {"compressor": saef.TopK(0.05, block=500), "exchange": "sharded", "averaging": saef.Rotating(10)},
}


# ---- one rank -----------------------------------------------------------------------------------------------


class Job:
    """Training, with x~'s recurrence beside it."""

    def __init__(self, method: str) -> None:
        torch.manual_seed(0)
        tail = [nn.Dropout(0.1), nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, 1)]
        net = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), *tail)
        self.model = DDP(net, bucket_cap_mb=0.005)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.state = saef.SAEFState(self.model, self.optimizer, audit_every=10, **METHODS[method])
        self.model.register_comm_hook(self.state, saef_hook)
        torch.manual_seed(1 + dist.get_rank())
        self.z = self.state.x_tilde().double()  # x~ by its recurrence
        self.bound = 0.0  # how far rounding can have taken x~ from z, since z was set to it

    def attempt(self, i: int) -> bool:
        """One step with batch i, poisoned on one rank now and then; whether it was committed."""
        chance = random.Random(f"attempt {i}")
        rank, before = dist.get_rank(), self.state.steps
        gen = torch.Generator().manual_seed(100 * i + rank)
        x = torch.randn(8, 20, generator=gen)
        y = torch.sin(x.sum(1, keepdim=True)) + 0.1 * rank
        poison = chance.random() < 0.01 and chance.randrange(dist.get_world_size()) == rank
        self.optimizer.param_groups[0]["lr"] = lr = 0.02 * (1 + 0.5 * (i % 100 < 50))
        self.optimizer.zero_grad()
        loss = F.mse_loss(self.model(x), y)
        (loss * (float("nan") if poison else 1.0)).backward()
        self.optimizer.step()
        if self.state.steps == before:
            return False
        m = self.state.m.double()
        dist.all_reduce(m)
        self.z -= lr * m / dist.get_world_size()
        self._grow(lr)
        return True

    def _grow(self, lr: float) -> None:
        """A step rounds D_k, e_k, the server's mean (K sums), D and e, x, m_k and eta u once each, to half a unit in
        the last place of the largest of them; averaging K + 1 more. Together less than 30 roundings of 2^-24."""
        s = self.state
        sizes = torch.stack([v.abs().max() for v in (s.weights.x(), s.e, s.e_server, lr * s.m) if v.numel()]).max()
        dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
        self.bound += 30 * 2.0**-24 * float(sizes)

    def check(self) -> float:
        """Raise unless x~ is where it belongs; distance / bound. The recurrence starts again from there."""
        x_tilde = self.state.x_tilde().double()
        distance, bound = float((x_tilde - self.z).abs().max()), self.bound
        if distance > bound:
            raise AssertionError(f"x~ left its recurrence: {distance} > {bound} at step {self.state.steps}")
        self.z, self.bound = x_tilde, 0.0
        return distance / bound if bound else 0.0


def worker(folder: Path, method: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    rank, log = dist.get_rank(), folder / f"{os.getpid()}.jsonl"
    (folder / f"rank-{rank}.pid").write_text(str(os.getpid()))
    job = Job(method)
    saved = saef.load_checkpoint(folder / "checkpoints", job.state)
    i = 0
    if saved is not None:
        i, job.z, job.bound = saved["attempt"], saved["z"], saved["bound"]
        job.optimizer.load_state_dict(saved["optimizer"])
        if not torch.equal(job.state.x_tilde(), saved["x_tilde"]):
            raise AssertionError("x~ loaded is not x~ saved")
    born = i
    with log.open("a") as lines:
        while job.state.steps < steps:
            job.attempt(i)
            i += 1
            if rank == 0:
                (folder / "progress").write_text(str(job.state.steps))
            if random.Random(f"checkpoint {i}").random() < 1 / 40:
                extra = {"attempt": i, "z": job.z, "bound": job.bound, "x_tilde": job.state.x_tilde()}
                extra["optimizer"] = job.optimizer.state_dict()
                saef.save_checkpoint(folder / "checkpoints", job.state, extra)
            if i % 50 == 0:
                record = {"rank": rank, "age": i - born, "rss": resident_bytes(), "invariant": job.check()}
                record |= {"steps": job.state.steps, "skipped": job.state.skipped}
                lines.write(json.dumps(record) + "\n")
                lines.flush()
    result = {"x": checksum(job.state.weights.x()), "x_tilde": checksum(job.state.x_tilde())}
    result |= {"steps": job.state.steps, "skipped": job.state.skipped, "invariant": job.check()}
    (folder / f"result-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def checksum(v: Tensor) -> str:
    return saef.comm.agreement.checksum([v])  # type: ignore[attr-defined,no-any-return]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- the one that kills --------------------------------------------------------------------------------------


def run(folder: Path, method: str, steps: int, kills: int, ranks: int, seed: int) -> list[str]:
    """Supervise one run; what was wrong, nothing if it was fine."""
    chance, start = random.Random(seed), time.monotonic()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += ["--max-restarts", str(10 * kills + 10), "--monitor-interval", "0.1"]
    command += [__file__, "--worker", str(folder), "--method", method, "--steps", str(steps)]
    # The last third of the run is left in peace, so that some processes grow old.
    due = sorted(chance.randrange(1, max(2, 2 * steps // 3)) for _ in range(kills))
    # Without the second, restarted ranks find the addresses of the dead ones (pytorch/pytorch issue 135712).
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    killed, wrong = 0, []
    with (folder / "log").open("w") as log:
        torchrun = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        last, moved = -1, time.monotonic()
        while torchrun.poll() is None:
            time.sleep(0.01)
            steps_now = int((_read(folder / "progress") or "-1").strip() or -1)
            if steps_now != last:
                last, moved = steps_now, time.monotonic()
            elif time.monotonic() - moved > TIMEOUT_S + 60:
                wrong.append(f"no progress for {TIMEOUT_S + 60} s after step {last}")
                torchrun.kill()
            if killed < len(due) and last >= due[killed]:
                time.sleep(chance.random() * 0.05)
                if _kill(folder / f"rank-{chance.randrange(ranks)}.pid"):
                    killed += 1
                    (folder / "progress").write_text("-1")  # the next kill waits for the restarted ranks
        status = torchrun.returncode
    if status != 0:
        wrong.append(f"torchrun ended with {status}")
    if killed < kills:
        wrong.append(f"only {killed} of {kills} kills")
    wrong += report(folder, method, killed, ranks, time.monotonic() - start)
    return wrong


def report(folder: Path, method: str, killed: int, ranks: int, seconds: float) -> list[str]:
    """Print what happened; what was wrong."""
    wrong = [f"{path.name}: {path.read_text()}" for path in folder.glob("failure-*")]
    results = [json.loads(_read(folder / f"result-{r}.json") or "{}") for r in range(ranks)]
    if len({json.dumps(r.get("x")) for r in results}) > 1 or not results[0]:
        wrong.append(f"the ranks ended differently: {results}")
    growth, audits, invariant = [], 0, 0.0
    for path in folder.glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        audits += len(records)
        invariant = max([invariant] + [r["invariant"] for r in records])
        warm = [r for r in records if r["age"] >= WARM_UP]
        if len(warm) > 1:
            growth.append(max(r["rss"] for r in warm) / warm[0]["rss"] - 1)
    if growth and max(growth) > 0.05:
        wrong.append(f"memory grew by {100 * max(growth):.1f} %")
    print(
        f"soak {method}: {results[0].get('steps')} steps of {ranks} ranks in {seconds:.0f} s, {killed} SIGKILLs, "
        f"{results[0].get('skipped')} steps skipped, {audits} checks of x~: at most {invariant:.3f} of its bound; "
        f"memory after warm-up +{100 * max(growth, default=0.0):.1f} % at most ({len(growth)} processes); "
        f"{'OK' if not wrong else 'FAILED'}"
    )
    return wrong


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _kill(pid_file: Path) -> bool:
    try:
        os.kill(int(_read(pid_file) or 0) or -1, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    pid_file.unlink()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=METHODS, help="default: both, one after the other")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        try:
            worker(args.worker, args.method, args.steps)
        except Exception as error:
            # The survivors of a kill end like this, here or in a collective of DDP or of this script; others must not.
            if not any(word in str(error) for word in ("onnection", "exchange with the other ranks failed")):
                (args.worker / f"failure-{os.getpid()}").write_text(traceback.format_exc())
            raise
        return
    wrong = []
    for method in [args.method] if args.method else METHODS:
        with tempfile.TemporaryDirectory() as folder:
            wrong += run(Path(folder), method, args.steps, args.kills, args.ranks, args.seed)
            if wrong:
                print("\n".join(wrong), "\n", _read(Path(folder, "log"))[-5000:])
                sys.exit(1)


if __name__ == "__main__":
    main()
