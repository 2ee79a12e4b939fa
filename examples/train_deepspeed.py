"""Train a small ResNet with DeepSpeed and step-ahead error feedback, which ds_config.json asks for.

    deepspeed train_deepspeed.py --deepspeed_config ds_config.json
    torchrun --nproc_per_node 4 train_deepspeed.py --deepspeed_config ds_config.json --steps 200 --out records.jsonl
    torchrun --nproc_per_node 4 train_deepspeed.py --deepspeed_config ds_config.json --checkpoint FOLDER

The one line about saef is the import that makes DeepSpeed know "type": "SAEF"; the loop in `train` is any DeepSpeed
loop. Without GPUs, tell the launcher how many ranks to start: deepspeed --num_accelerators 2 train_deepspeed.py ...
In the config, "buffer_dtype" is for batch norm, which wants its running statistics in the dtype of its weights.
"""

import argparse
import copy
import os
from argparse import Namespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import saef.integrations.deepspeed  # noqa: F401 - registers the optimizer
from data import Dataset, load
from resnet import ResNet
from train_ddp import evaluate, report

HELP_FORMAT = argparse.RawDescriptionHelpFormatter


def parse() -> Namespace:
    """Settings from the command line; those of the optimizer are in the file that --deepspeed_config names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HELP_FORMAT)
    add = parser.add_argument
    add("--steps", type=int, default=200)
    add("--width", type=int, default=8, help="channels of the network's first stage")
    add("--seed", type=int, default=0)
    add("--data", default="digits", help='"digits" or a folder with Fashion-MNIST, MNIST or CIFAR files')
    add("--checkpoint", help="folder for checkpoints; goes on from the newest in it, on any number of ranks")
    add("--checkpoint-every", type=int, default=50, help="steps between two checkpoints")
    add("--out", help="write one JSON record per epoch to this file")
    add("--local_rank", type=int, default=-1, help="given by the deepspeed launcher")
    parser = deepspeed.add_config_arguments(parser)
    return parser.parse_args()


def train(args: Namespace, engine: Any, dataset: Dataset) -> list[dict]:
    """DeepSpeed's usual loop; one record per epoch (rank 0; the other ranks return none)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share, parts = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    batch = share * parts * world
    batches = len(dataset.train) // batch
    records = []
    for step in tqdm(range(engine.global_steps, args.steps), unit="step", disable=rank > 0):
        epoch, number = divmod(step, batches)
        order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(args.seed + 1000 * epoch))
        for part in range(parts):
            start = number * batch + (part * world + rank) * share
            images, labels = dataset.train.batch(order[start : start + share].to(engine.device))
            loss = F.cross_entropy(engine(images), labels)
            engine.backward(loss)
            engine.step()

        if args.checkpoint and (step + 1) % args.checkpoint_every == 0:
            engine.save_checkpoint(args.checkpoint)
        if (step + 1) % batches == 0 or step + 1 == args.steps:
            if rank == 0:
                metrics = engine.optimizer.saef.metrics()
                sent = {"bytes_per_step": metrics["bytes_per_step"], "ratio": metrics["compression_ratio"]}
                net = copy.deepcopy(engine.module).float()  # batch norm is estimated anew, in float32
                records.append({"step": step + 1} | evaluate(net, dataset) | sent)
            dist.barrier()
    return records


def main() -> None:
    args = parse()
    if not args.deepspeed_config:
        raise SystemExit("name the config: --deepspeed_config ds_config.json")
    if "RANK" not in os.environ:
        raise SystemExit("start this with deepspeed or torchrun: see --help")
    if not torch.cuda.is_available():
        # On CPU DeepSpeed would first compile an all-reduce of its own, for two minutes; nothing here goes through it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dataset = load(args.data)
    torch.manual_seed(args.seed)
    net = ResNet(dataset.channels, dataset.classes, args.width, blocks=1)
    engine, *_ = deepspeed.initialize(args=args, model=net, model_parameters=net.parameters())
    if args.checkpoint:
        engine.load_checkpoint(args.checkpoint)
    records = train(args, engine, dataset.to(engine.device))
    report(records, args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
