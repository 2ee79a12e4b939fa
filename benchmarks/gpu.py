"""The kernels on a GPU against its copy bandwidth, and what a step costs a GPT: launches, waits, share of its time.

    python benchmarks/gpu.py [--numel 124000000] [--blocks 65536,2048,layer] [--only kernels|step] [--json FILE]

Kernels are timed as replays of a CUDA graph, so that no launch from Python counts. Bytes are those that must be moved:
each vector once for each time that a kernel reads or writes it, and the messages.
"""

import argparse
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from machine import describe
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import saef
from saef.hooks import saef_hook
from saef.rules.adamw import AdamW
from saef.rules.sgd import PLAIN, SGD
from saef.wire.codec import Block, block_ranges, lay_out
from saef.wire.compressors import Code
from saef.wire.kernels import select
from saef.wire.kernels.table import Update, Worker

CUDA = torch.device("cuda")


def microseconds(run: Callable[[], object], rounds: int = 15) -> float:
    """The median time of one run, of replays of its graph, three a turn."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / 3)
    return median(times)


RULES = {
    "SGD": (SGD.kind, PLAIN._replace(lr=0.1, momentum=0.9)),
    "AdamW": (AdamW.kind, AdamW().read(torch.optim.AdamW([torch.zeros(1)], lr=0.1), 7, 4)[0]),
}


def kernels(n: int, code: Code, rule: str, workers: int = 4) -> dict[str, tuple[Callable[[], object], float]]:
    """Name: (what runs, bytes it must move) for each kernel, n coordinates in float32."""
    parts = [Block(code, code, s, s, s, m, 0) for s, m in block_ranges(n, code.block_numel(n))]
    layout = lay_out(parts, 4, reply=False, served=False)
    table, size = layout.table.to(CUDA), layout.message_bytes
    kind, columns = RULES[rule]
    kept = 2 if kind == AdamW.kind else 1
    g, e, x, half, *m = (torch.randn(n, device=CUDA) for _ in range(4 + kept))
    hyper = torch.tensor([columns], dtype=torch.float32, device=CUDA)
    update, worker = Update(kind, hyper, 0.0, True), Worker(g, torch.stack(m).abs_(), e, x)
    backend, once = select(CUDA), torch.ones(1, device=CUDA)
    message, reply = torch.zeros(2, size, dtype=torch.uint8, device=CUDA)
    backend.compress(table, update, worker, message)
    messages = message.repeat(workers, 1)
    error = torch.randn(n, device=CUDA)
    backend.serve(table, table, messages, error, reply)
    share = 1.0 if isinstance(code, saef.ScaledSign) else code.scalars(n) / n  # of x that is written
    v = 4.0 * n
    return {
        "compress": (lambda: backend.compress(table, update, worker, message), (2 + kept) * v + size),
        "commit": (lambda: backend.commit(table, update, worker, message), (3 + 2 * kept) * v + size),
        f"serve {workers} messages": (lambda: backend.serve(table, table, messages, error, reply), v + 5 * size),
        "settle": (lambda: backend.settle(table, table, messages, error, reply), 2 * v + 5 * size),
        "subtract from x": (lambda: backend.subtract(table, once, reply, x), 2 * v * share + size),
        "step ahead": (lambda: backend.step_ahead(table, table, x, e, half, 1.0), 3 * v),
    }


def yardsticks(n: int) -> tuple[float, float]:
    """Microseconds of a copy, and of the selection alone by torch."""
    a, b = torch.randn(2, n, device=CUDA)
    return microseconds(lambda: b.copy_(a)), microseconds(lambda: a.abs().topk(max(1, n // 100), sorted=False), 3)


def measure_kernels(n: int, blocks: list[str]) -> list[dict[str, Any]]:
    """Prints and returns a row for each kernel."""
    copy, topk = yardsticks(n)
    bandwidth = 8.0 * n / copy  # bytes a microsecond
    rows = [{"what": "copy", "us": copy, "copies": 1.0, "of_bandwidth": 1.0}]
    rows.append({"what": "torch.topk of the magnitudes, 1 %", "us": topk, "copies": topk / copy})
    codes = [
        (f"sign, {rule}", saef.ScaledSign(block=int(s) if s != "layer" else s)) for s in blocks[:1] for rule in RULES
    ]
    codes += [("top-1 %, SGD", saef.TopK(0.01, block=int(s) if s != "layer" else s)) for s in blocks]
    codes += [("top-1 %, AdamW", codes[-1][1])]
    for name, code in codes:
        rule = name.split(", ")[1]
        found = {what: (microseconds(run), size) for what, (run, size) in kernels(n, code, rule).items()}
        for what, (us, size) in found.items():
            label = f"{name}, block {code.block}: {what}"
            rows.append({"what": label, "us": us, "copies": us / copy, "of_bandwidth": size / us / bandwidth})
        both = found["compress"][0] + found["commit"][0]
        rows.append({"what": f"{name}, block {code.block}: compress and commit", "us": both, "copies": both / copy})
        torch.cuda.empty_cache()
    print(f"\n{n:,} float32; a copy moves {bandwidth / 1e6:.2f} TB/s, read and written")
    print(f"{'':52}{'us':>9}{'copies':>8}{'of bandwidth':>14}")
    for row in rows:
        share = f"{row['of_bandwidth']:14.2f}" if "of_bandwidth" in row else ""
        print(f"{row['what']:52}{row['us']:9.1f}{row['copies']:8.2f}{share}", flush=True)
    return [{"numel": n, "bandwidth_TB_s": bandwidth / 1e6, **row} for row in rows]


# ---- a step of a GPT -------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """GPT-2's shape: 12 layers of width 768 have 124 M parameters, the head tied to the embedding."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int = 50257, time: int = 1024) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(time, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        logits = F.linear(self.norm(self.layers(x)), self.tokens.weight)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def step_of(
    layers: int, width: int, heads: int, batch: int, kind: type[torch.optim.Optimizer], code: Code | None
) -> dict[str, Any]:
    """One rank trains in bf16 autocast: median ms a step, launches and waits a step; `code` None: plain DDP."""
    torch.manual_seed(0)
    with CUDA:
        net = GPT(layers, width, heads)
    model = DDP(net, gradient_as_bucket_view=True)
    optimizer = kind(net.parameters(), lr=1e-4, **({"momentum": 0.9} if kind is torch.optim.SGD else {"fused": True}))
    state = None
    if code is not None:
        state = saef.SAEFState(model, optimizer, compressor=code)
        model.register_comm_hook(state, saef_hook)
    tokens = torch.randint(50257, (batch, 1024), device=CUDA)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens)
        loss.backward()
        optimizer.step()

    for _ in range(4):
        step()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    counts = {event.key: event.count for event in profile.key_averages()}
    if state is not None:
        state.detach()
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "tensors": len(list(net.parameters())),
        "ms": median(times),
        "launches": sum(n for key, n in counts.items() if "aunchKernel" in key),
        "waits": sum(counts.get(f"cuda{what}Synchronize", 0) for what in ("Stream", "Event")),
    }


def measure_steps(big: bool) -> list[dict[str, Any]]:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    shapes = [(12, 768, 12, 16)] + ([(20, 1920, 15, 8)] if big else [])
    ways = {"plain DDP": None, "SAEF sign": saef.ScaledSign(), "SAEF top-1 %": saef.TopK(0.01)}
    rows: list[dict[str, Any]] = []
    for shape, kind in product(shapes, (torch.optim.SGD, torch.optim.AdamW)):
        plain = 0.0
        for name, code in ways.items():
            row = {"what": name, "optimizer": kind.__name__, "batch": shape[3], **step_of(*shape, kind, code)}
            plain = plain or row["ms"]
            row["share"] = 1 - plain / row["ms"]
            rows.append(row)
            print(
                f"{row['parameters'] / 1e6:5.0f} M parameters in {row['tensors']} tensors, {shape[3]} x 1024 tokens, "
                f"{kind.__name__:5}, {name:12}: {row['ms']:6.1f} ms a step, {row['launches']} launches, "
                f"{row['waits']} waits; "
                f"{100 * row['share']:.1f} % of it more than plain DDP",
                flush=True,
            )
            torch.cuda.empty_cache()
    dist.destroy_process_group()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=124_000_000)
    parser.add_argument("--blocks", default="65536,4096,2048,1024,layer")
    parser.add_argument("--only", choices=["kernels", "step"])
    parser.add_argument("--big", action="store_true", help="a step of a model of 1 B parameters, too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(describe())
    print(f"device    {torch.cuda.get_device_name()}")
    found: dict[str, Any] = {"machine": describe(), "device": torch.cuda.get_device_name()}
    if args.only != "step":
        found["kernels"] = measure_kernels(args.numel, args.blocks.split(","))
    if args.only != "kernels":
        found["steps"] = measure_steps(args.big)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
