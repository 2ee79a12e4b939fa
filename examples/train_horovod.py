"""Train a small ResNet with Horovod, with step-ahead error feedback or Horovod's own compression.

    horovodrun -np 4 python train_horovod.py --compression saef-sign
    horovodrun -np 4 python train_horovod.py --compression saef-topk --ratio 0.01 --steps 200 --out records.jsonl
    horovodrun -np 4 python train_horovod.py --compression fp16
    horovodrun -np 4 python train_horovod.py --checkpoint FOLDER   # goes on from the newest in it, with any -np

Only `compression_of` knows about saef; the loop in `train` is any Horovod loop. Set
HOROVOD_STALL_SHUTDOWN_TIME_SECONDS, or a rank that hangs lets all others wait for ever.
"""

import argparse
from argparse import Namespace
from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import saef
from data import Dataset, load
from resnet import ResNet
from saef.integrations.horovod import SAEFCompression
from train_ddp import evaluate, report

COMPRESSIONS = ("none", "fp16", "saef-sign", "saef-topk")
HELP_FORMAT = argparse.RawDescriptionHelpFormatter


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HELP_FORMAT)
    add = parser.add_argument
    add("--compression", choices=COMPRESSIONS, default="saef-sign")
    add("--ratio", type=float, default=0.01, help="share of the coordinates that top-k sends")
    add("--period", type=int, help="average the errors, each coordinate once in so many steps")
    add("--lr", type=float, default=0.1)
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=128, help="total over all ranks")
    add("--width", type=int, default=8, help="channels of the network's first stage")
    add("--seed", type=int, default=0)
    add("--data", default="digits", help='"digits" or a folder with Fashion-MNIST, MNIST or CIFAR files')
    add("--checkpoint", help="folder for checkpoints")
    add("--checkpoint-every", type=int, default=50, help="steps between two checkpoints")
    add("--out", help="write one JSON record per epoch to this file")
    args = parser.parse_args()
    if args.checkpoint and not args.compression.startswith("saef"):
        parser.error("--checkpoint shows saef's state: choose a saef --compression")
    return args


def compression_of(args: Namespace, net: nn.Module, optimizer: torch.optim.SGD) -> Any:
    """What goes to DistributedOptimizer(compression=...)."""
    if not args.compression.startswith("saef"):
        return hvd.Compression.fp16 if args.compression == "fp16" else hvd.Compression.none
    compressor = saef.ScaledSign() if args.compression == "saef-sign" else saef.TopK(args.ratio)
    averaging = None if args.period is None else saef.Rotating(args.period)
    return SAEFCompression(net, optimizer, compressor=compressor, averaging=averaging)


def train(args: Namespace, dataset: Dataset) -> list[dict]:
    """One record per epoch (rank 0; the other ranks return none)."""
    rank, world = hvd.rank(), hvd.size()
    batches, share = len(dataset.train) // args.batch, args.batch // world
    if args.batch % world:
        raise ValueError(f"--batch {args.batch}: expected a multiple of {world} (ranks)")
    torch.manual_seed(args.seed)
    net = ResNet(dataset.channels, dataset.classes, args.width, blocks=1)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    compression = compression_of(args, net, optimizer)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=net.named_parameters(), compression=compression)
    hvd.broadcast_parameters(net.state_dict(), root_rank=0)
    state = compression.state if isinstance(compression, SAEFCompression) else None
    first = 0
    if args.checkpoint and (extra := saef.load_checkpoint(args.checkpoint, state)):
        net.load_state_dict(extra["model"])  # for the buffers
        first = extra["step"]
    records = []
    for step in tqdm(range(first, args.steps), unit="step", disable=rank > 0):
        epoch, number = divmod(step, batches)
        order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(args.seed + 1000 * epoch))
        start = number * args.batch + rank * share
        images, labels = dataset.train.batch(order[start : start + share])

        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()

        if args.checkpoint and (step + 1) % args.checkpoint_every == 0:
            saef.save_checkpoint(args.checkpoint, state, {"step": step + 1, "model": net.state_dict()})
        if ((step + 1) % batches == 0 or step + 1 == args.steps) and rank == 0:
            size = {"none": 4, "fp16": 2}.get(args.compression, 0)  # bytes a coordinate
            per_step = 2 * (world - 1) / world * size * sum(p.numel() for p in net.parameters())
            sent = {"bytes_per_step": state.metrics()["bytes_per_step"] if state is not None else per_step}
            records.append({"compression": args.compression, "step": step + 1} | evaluate(net, dataset) | sent)
    return records


def main() -> None:
    args = parse()
    hvd.init()
    torch.set_num_threads(1)
    report(train(args, load(args.data)), args.out)
    hvd.shutdown()


if __name__ == "__main__":
    main()
