"""One rank of the jobs that `test_elastic.py` starts with torchrun and disturbs.

Every rank notes in FOLDER/rank-PID.jsonl how it began, where it is, how it failed, and how it ended.
"""

import argparse
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.comm.agreement import checksum
from saef.hooks import saef_hook
from support.training import batch, make_net


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--kill", default="", help="RANK:STEP: this rank kills itself there, in its first life")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between steps")
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--store", help="file where the ranks meet, instead of at torchrun's")
    args = parser.parse_args(words)
    if args.kill:  # torchrun must not end the survivors before they have said what they saw
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    place = {"init_method": f"file://{args.store}"} if args.store else {}
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=30), **place)
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def note(**what: Any) -> None:
        record = {"time": time.time(), "pid": os.getpid(), "rank": rank, "world": world, **what}
        with (args.folder / f"rank-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    model = DDP(make_net(torch.float32), bucket_cap_mb=0.0005)
    H = args.local_steps
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if H > 1:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    settings: dict[str, Any] = {"averaging": saef.Rotating(7), "exchange": "sharded", "audit_every": 4}
    state = saef.SAEFState(model, optimizer, compressor=saef.TopK(0.2), local_steps=H, **settings)
    model.register_comm_hook(state, saef_hook)
    extra = saef.load_checkpoint(args.folder / "checkpoints", state)
    x_tilde = state.x_tilde()
    moved = float((x_tilde - extra["x_tilde"]).abs().max()) if extra else 0.0
    first = extra["taken"] if extra else 0
    note(resumed=extra and first, x_tilde_moved=moved)
    began = time.monotonic()
    try:
        for t in range(first, args.steps):
            if first_life and args.kill == f"{rank}:{t}":
                os.kill(os.getpid(), signal.SIGKILL)
            began = time.monotonic()
            optimizer.zero_grad()
            x, y = batch(rank, t, torch.float32)
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            taken = state.steps * H + state.local_step
            if taken % 10 == 0:
                extra = {"x_tilde": state.x_tilde(), "taken": taken}
                saef.save_checkpoint(args.folder / "checkpoints", state, extra)
                note(step=taken)
            time.sleep(args.pause)
    except Exception as error:
        note(error=str(error), waited=time.monotonic() - began)
        raise
    note(end=checksum([state.weights.x(), state.e, state.m, state.e_server]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
