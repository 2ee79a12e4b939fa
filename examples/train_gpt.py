"""Train a small GPT on bytes with PyTorch DDP and AdamW, with or without step-ahead error feedback.

    torchrun --nproc_per_node 4 train_gpt.py --method saef
    torchrun --nproc_per_node 4 train_gpt.py --method adamw --data FILE --steps 1200 --lr 4e-3 --out adamw.jsonl
    torchrun --nproc_per_node 4 train_gpt.py --method saef --local-steps 16 --optimizer muon --lr 3.2e-2
    torchrun --nproc_per_node 4 train_gpt.py --method saef --fsdp --node-size 2

Methods: adamw (plain DDP, also of Muon); saef (1 bit a coordinate, full step ahead, noise-corrected v); paper (the step
ahead of the paper, without the server's error); plain-v (v of each worker's own gradient); ef (error feedback);
saef-topk (1 % of the coordinates); topk-single (3 % of them to the servers, and their mean back); dense (uncompressed,
for local steps). The text is what every machine has, the sources of Python's standard library, or a file, or the Python
sources in a folder; its last 5 % are held out.
"""

import argparse
import json
import math
import os
import sysconfig
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import saef
from saef.hooks import saef_hook
from train_ddp import HELP_FORMAT, bytes_sent, rendezvous, report, resume, save

SIGN = {"compressor": saef.ScaledSign()}
METHODS: dict[str, dict | None] = {  # settings of the state; None: plain DDP
    "adamw": None,
    "saef": SIGN,
    "paper": {**SIGN, "server_step_ahead": False},
    "plain-v": {**SIGN, "noise_correction": False},
    "ef": {**SIGN, "step_ahead": 0.0},
    "saef-topk": {"compressor": saef.TopK(0.01), "averaging": saef.Rotating(20)},
    "topk-single": {"compressor": saef.TopK(0.03), "server_compressor": None, "step_ahead": 0.25, "error_decay": 0.95},
    "dense": {"compressor": saef.Identity()},
}
BYTES = 256  # a token is a byte
SHARED = "cuda: also where ranks have to share a GPU, which NCCL refuses: by gloo, in step but not fast"


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """Learned positions; the embedding is the head, too."""

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.dim() > 1:  # what a residual stream sums up begins smaller
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if ".out." in name or ".down." in name else 0.02)

    def forward(self, text: Tensor, targets: Tensor) -> Tensor:
        """The mean loss over [B, T] tokens."""
        x = self.tokens(text) + self.places.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Together(torch.optim.Optimizer):
    """Several optimizers, each of its own parameters, as one: what SAEFState takes."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.share()

    def share(self) -> None:
        """The parts have the same state, and the groups that are theirs."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state, part.param_groups = self.state, [next(groups) for _ in part.param_groups]

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.share()

    def step(self) -> None:
        for part in self.parts:
            part.step()


def parse(arguments: list[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HELP_FORMAT)
    add = parser.add_argument
    add("--method", choices=METHODS, default="saef")
    add("--data", type=Path, help="a text, or a folder of Python sources (default: Python's standard library)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=SHARED)
    add("--steps", type=int, default=300)
    add("--lr", type=float, default=8e-3, help="the highest, after a warm-up over a tenth of the steps; then a cosine")
    add("--local-steps", type=int, default=1, help="of the optimizer between two exchanges")
    add("--adamw-lr", type=float, default=0.25, help="AdamW's rate beside Muon, as a multiple of --lr")
    add("--step-ahead", type=float, help="instead of the method's own")
    add(
        "--optimizer",
        choices=["adamw", "muon"],
        default="adamw",
        help="muon: of the blocks' matrices, adamw of the rest",
    )
    add("--weight-decay", type=float, default=0.1, help="of matrices")
    add("--betas", type=float, nargs=2, default=(0.9, 0.95))
    add("--clip", type=float, default=1.0, help="norm of the gradient; of each rank's own with saef")
    add("--block", type=int, default=65536, help="coordinates with a scale of their own, at most")
    add("--batch", type=int, default=32, help="total over all ranks")
    add("--context", type=int, default=64)
    add("--width", type=int, default=48)
    add("--layers", type=int, default=2)
    add("--heads", type=int, default=4)
    add("--eval-every", type=int, default=50)
    add("--seed", type=int, default=0)
    add("--node-size", type=int, help="so many ranks are one worker (with --fsdp by default those of this machine)")
    add("--fsdp", action="store_true", help="FSDP2 shards within the nodes, in place of DDP")
    add("--checkpoint", help="folder for checkpoints; goes on from the newest in it, on any number of ranks")
    add("--out", help="write one JSON record per evaluation to this file")
    args = parser.parse_args(arguments)
    if args.method == "adamw" and args.checkpoint:
        parser.error("--checkpoint saves saef's state: choose another --method")
    if args.fsdp and args.checkpoint:
        parser.error("--checkpoint is for DDP here: with --fsdp see docs/nodes.md")
    return args


def read(data: Path | None) -> Tensor:
    """The text as bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if data:
        files = sorted(data.rglob("*.py")) if data.is_dir() else [data]
    return torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def build(args: Namespace, device: torch.device) -> tuple:
    """The model under DDP or FSDP2, its optimizer, and saef's state (None without saef)."""
    torch.manual_seed(args.seed)
    net = GPT(args.width, args.layers, args.heads, args.context).to(device)
    mesh = saef.node_mesh(device, args.node_size) if args.fsdp or args.node_size else None
    if args.fsdp:
        for part in [*net.blocks, net]:  # without saef FSDP exchanges between the nodes, too
            fully_shard(part, mesh=mesh if METHODS[args.method] is None else mesh["shard"])
    model = net if args.fsdp else DistributedDataParallel(net)
    matrices, vectors = ([p for p in net.parameters() if (p.dim() > 1) == yes] for yes in (True, False))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if args.optimizer == "muon":
        inner = [p for p in net.blocks.parameters() if p.dim() > 1]
        known = {id(p) for p in inner}
        groups = [{**group, "params": [p for p in group["params"] if id(p) not in known]} for group in groups]
        muon = torch.optim.Muon(inner, args.lr, args.weight_decay)
        optimizer = Together(muon, torch.optim.AdamW(groups, args.lr * args.adamw_lr, tuple(args.betas)))
    else:
        optimizer = torch.optim.AdamW(groups, args.lr, tuple(args.betas))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    settings = METHODS[args.method]
    if settings is None:
        return model, optimizer, None
    settings = {**settings, "local_steps": args.local_steps}
    if args.step_ahead is not None:
        settings["step_ahead"] = args.step_ahead
    if hasattr(settings["compressor"], "block"):
        settings["compressor"] = replace(settings["compressor"], block=args.block)
    state = saef.SAEFState(model, optimizer, max_grad_norm=args.clip, mesh=mesh, **settings)
    if not args.fsdp:
        model.register_comm_hook(state, saef_hook)
    return model, optimizer, state


def cut(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Pieces of the text, and the bytes that follow each of theirs."""
    pieces = text[starts[:, None] + torch.arange(context + 1)].long()
    return pieces[:, :-1], pieces[:, 1:]


def rate(args: Namespace, step: int) -> float:
    """What the learning rate is multiplied by: a warm-up over a tenth of the steps, then a cosine down to a tenth."""
    warm = max(1, args.steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, args.steps - warm))


def train(args: Namespace, device: torch.device) -> list[dict]:
    """Train; one record per evaluation. The batches depend on (seed, step) alone, and each rank takes its share."""
    rank, world = dist.get_rank(), dist.get_world_size()
    text = read(args.data)
    held_out = len(text) * 95 // 100
    model, optimizer, state = build(args, device)
    first = resume(args.checkpoint, model, optimizer, state) if args.checkpoint else 0
    records, began = [], time.perf_counter()
    for step in range(first, args.steps):
        generator = torch.Generator().manual_seed(1_000_003 * args.seed + step)
        starts = torch.randint(held_out - args.context - 1, (args.batch,), generator=generator)[rank::world]
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate(args, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(*(part.to(device) for part in cut(text, starts, args.context)))
        loss.backward()
        if state is None:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            tokens = (step + 1 - first) * args.batch * args.context / (time.perf_counter() - began)
            record = {
                "method": args.method,
                "step": step + 1,
                "loss": evaluate(args, getattr(model, "module", model), text[held_out:], device),
            }
            record |= {"training_loss": loss.item(), "tokens_per_second": tokens, **bytes_sent(model, state, step + 1)}
            records.append(record)
            if rank == 0:
                print(json.dumps(record), flush=True)
            if args.checkpoint:
                save(args.checkpoint, model, optimizer, state, step + 1)
    return records


@torch.no_grad()
def evaluate(args: Namespace, net: nn.Module, text: Tensor, device: torch.device) -> float:
    """The loss at x on text that is not trained on."""
    starts = torch.linspace(0, len(text) - args.context - 1, 512).long()
    parts = [cut(text, part, args.context) for part in starts.split(64)]
    return sum(net(x.to(device), y.to(device)).item() for x, y in parts) / len(parts)


def main() -> None:
    args = parse()
    if "RANK" not in os.environ:
        raise SystemExit("start this with torchrun: torchrun --nproc_per_node 4 train_gpt.py ...")
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    nccl = dist.is_nccl_available() and gpus >= int(os.environ["LOCAL_WORLD_SIZE"])  # a GPU for each rank
    if args.device == "cuda" and not gpus:
        raise SystemExit("--device cuda: there is no GPU here")
    device = torch.device("cpu")
    if args.device == "cuda" or (args.device == "auto" and nccl):
        device = torch.device("cuda", local % gpus)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if nccl and device.type == "cuda" else "gloo", **rendezvous())
    records = train(args, device)
    if dist.get_rank() == 0 and args.out:
        report(records, args.out)
    dist.barrier()  # a process that ends while gloo's threads let go of the last step's tensors may abort
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
