"""The hot loops against one torch.clone of the same vector: float32, one CPU thread or a GPU, interleaved runs.

python benchmarks/kernels.py [--device cpu|cuda] [--numel 25000000] [--rounds 9] [--block 65536|layer]
"""

import argparse
import math
from collections.abc import Callable

import torch
from machine import describe, interleaved, table
from torch import Tensor

import saef
from saef.rules import AdamW
from saef.rules.rule import table as hyper_table
from saef.rules.sgd import PLAIN, SGD
from saef.wire.codec import Block, block_ranges, lay_out
from saef.wire.compressors import Code
from saef.wire.kernels import select
from saef.wire.kernels.table import Update, Worker


def blocks(numel: int, up: Code, down: Code) -> list[Block]:
    return [Block(up, down, start, start, start, n, 0) for start, n in block_ranges(numel, up.block_numel(numel))]


def compress_path(numel: int, compressor: Code, update: Update, worker: Worker) -> Callable[[], object]:
    """Update, correct, scale, select or pack; and the residual: what a worker does with a gradient."""
    layout = lay_out(blocks(numel, compressor, compressor), 4, reply=False, served=False)
    device = worker.g.device
    message = torch.zeros(layout.message_bytes, dtype=torch.uint8, device=device)
    blocks_table, kernels = layout.table.to(device), select(device)

    def run() -> None:
        kernels.compress(blocks_table, update, worker, message)
        kernels.commit(blocks_table, update, worker, message)

    return run


def decode_and_sum(numel: int, compressor: Code, workers: int, device: torch.device) -> Callable[[], object]:
    """mean_k C(D_k) of K messages, written out as floats."""
    parts = blocks(numel, compressor, saef.Identity())
    layout = lay_out(parts, 4, reply=False, served=False)
    out = lay_out(parts, 4, reply=True, served=False)
    codec = saef.Codec(compressor, [numel])
    messages = torch.stack([codec.encode([torch.randn(numel)]) for _ in range(workers)]).to(device)
    reply, none = messages.new_zeros(out.message_bytes), torch.empty(0, device=device)
    tables, kernels = [t.to(device) for t in (layout.table, out.table)], select(device)
    return lambda: kernels.serve(*tables, messages, none, reply)


def torch_sign_chain(g: Tensor, m: Tensor, e: Tensor) -> None:
    """The same as a chain of torch operations: momentum, D, scale, packed bits, residual."""
    m.mul_(0.9).add_(g)
    D = e.add(m, alpha=0.1)
    scale = D.abs().mean()
    positive = D >= 0
    padded = torch.nn.functional.pad(positive.to(torch.uint8), (0, -D.numel() % 8))
    padded.view(-1, 8).mul(1 << torch.arange(8, dtype=torch.uint8, device=g.device)).sum(1, dtype=torch.uint8)
    e.copy_(D).sub_(torch.where(positive, scale, -scale))


def torch_topk_chain(g: Tensor, m: Tensor, e: Tensor, ratio: float) -> None:
    m.mul_(0.9).add_(g)
    D = e.add(m, alpha=0.1)
    kept = D.abs().topk(math.ceil(ratio * D.numel()), sorted=False).indices
    D[kept].clone()
    e.copy_(D)[kept] = 0.0


def torch_sum_chain(bits: list[Tensor], numel: int) -> Tensor:
    """K packed messages to the mean of their signs, scaled."""
    device = bits[0].device
    total, shift = torch.zeros(numel, device=device), torch.arange(8, dtype=torch.uint8, device=device)
    for packed in bits:
        signs = ((packed.view(-1, 1) >> shift) & 1).view(-1)[:numel]
        total.add_(torch.where(signs.bool(), 0.25, -0.25))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block", default="65536", help='"layer" or a number of coordinates')
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n, block = args.numel, args.block if args.block == "layer" else int(args.block)
    device = args.device
    g, m, e, x = (torch.randn(n, device=device) for _ in range(4))
    hyper = torch.tensor([PLAIN._replace(lr=0.1, momentum=0.9)], dtype=torch.float32, device=device)
    update, worker = Update(SGD.kind, hyper, step_ahead=1.0, feedback=True), Worker(g, m[None], e, x)
    groups = AdamW().read(torch.optim.AdamW([g], lr=1e-3), step=100, workers=4)
    adamw = Update(AdamW.kind, hyper_table(groups, torch.float32, device), step_ahead=1.0, feedback=True)
    moments = worker._replace(m=torch.stack([m, m.square()]))
    sign, topk = saef.ScaledSign(block=block), saef.TopK(0.01, block=block)
    scratch = torch.empty_like(g)
    bits = [torch.randint(256, (-(-n // 8),), dtype=torch.uint8, device=device) for _ in range(4)]
    work = {
        "torch.clone": lambda: g.clone(),
        "copy into existing memory": lambda: scratch.copy_(g),
        "sign: update, correct, scale, pack, residual": compress_path(n, sign, update, worker),
        "top-1 %: update, correct, select, residual": compress_path(n, topk, update, worker),
        "AdamW, sign: the same": compress_path(n, sign, adamw, moments),
        "AdamW, top-1 %: the same": compress_path(n, topk, adamw, moments),
        "sign: decode and sum 4 messages": decode_and_sum(n, sign, 4, device),
        "top-1 %: decode and sum 4 messages": decode_and_sum(n, topk, 4, device),
        "torch operations: sign": lambda: torch_sign_chain(g, m, e),
        "torch operations: top-1 %": lambda: torch_topk_chain(g, m, e, 0.01),
        "torch operations: decode and sum 4 signs": lambda: torch_sum_chain(bits, n),
    }
    print(describe())
    gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if gpu else "1 thread"
    print(f"kernels   {n:,} float32, block {block}, {where}, {args.rounds} interleaved rounds, ratio to torch.clone\n")
    wait = {"barrier": torch.cuda.synchronize} if gpu else {}
    print(table(interleaved(work, args.rounds, **wait), "torch.clone"))


if __name__ == "__main__":
    main()
