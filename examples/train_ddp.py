"""Train a small ResNet with PyTorch DDP, with or without step-ahead error feedback.

    torchrun --nproc_per_node 4 train_ddp.py --method saef-topk --ratio 0.01 --averaging allreduce --period 20
    torchrun --nproc_per_node 4 train_ddp.py --method full --data FOLDER --epochs 5 --out full.jsonl
    torchrun --nproc_per_node 4 --max-restarts 3 train_ddp.py --checkpoint FOLDER   # survives the death of a rank

Methods: full (plain DDP), ef-sign and ef-topk (error feedback), saef-sign and saef-topk (step ahead).
Only `build` knows about saef; the training loop in `train` is any DDP loop.
"""

import argparse
import json
import os
from argparse import Namespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import saef
from data import Dataset, load
from resnet import ResNet
from saef.hooks import saef_hook

METHODS = ("full", "ef-sign", "ef-topk", "saef-sign", "saef-topk")
AVERAGING = {"allreduce": saef.AllReduce, "rotating": saef.Rotating, "ring": saef.Ring, "async-ring": saef.AsyncRing}
HELP_FORMAT = argparse.RawDescriptionHelpFormatter
EVALUATION_IMAGES = 5000  # the training loss, and batch norm's statistics, are taken on the first this many


def block(text: str) -> str | int:
    return text if text == "layer" else int(text)


def parse(arguments: list[str] | None = None) -> Namespace:
    """Settings from a command line; `demo.py` and `reproduce.py` make theirs here too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HELP_FORMAT)
    add = parser.add_argument
    add("--method", choices=METHODS, default="saef-sign")
    add("--averaging", choices=("none", *AVERAGING), default="none", help="of the local errors")
    add("--period", type=int, default=20, help="steps between two averages of an error")
    add("--ratio", type=float, default=0.01, help="share of the coordinates that top-k sends")
    add("--block", type=block, default="layer", help='"layer" (one block a tensor) or a maximal block size')
    add("--lr", type=float, default=0.1)
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=5e-4)
    add("--nesterov", action="store_true")
    add("--epochs", type=int, default=10)
    add("--steps", type=int, help="stop after so many steps instead of --epochs")
    add("--eval-every", type=int, help="steps between evaluations (default: one epoch)")
    add("--batch", type=int, default=128, help="total over all ranks")
    add("--width", type=int, default=8, help="channels of the network's first stage")
    add("--blocks", type=int, default=1, help="residual blocks a stage: 1 is ResNet-8, 3 is ResNet-20")
    add("--seed", type=int, default=0)
    add("--data", default="digits", help='"digits" or a folder with Fashion-MNIST, MNIST or CIFAR files')
    add("--fm14", action="store_true", help="the Fashion-MNIST subset that reproduce.py trains on")
    add("--checkpoint", help="folder for checkpoints; goes on from the newest in it, on any number of ranks")
    add("--checkpoint-every", type=int, default=100, help="steps between two checkpoints")
    add("--tensorboard", help="folder for TensorBoard: loss, saef's counters and measurements")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda uses nccl, cpu uses gloo")
    add("--out", help="write one JSON record per evaluation to this file")
    args = parser.parse_args(arguments)
    if args.method == "full" and (args.checkpoint or args.tensorboard):
        parser.error("--checkpoint and --tensorboard show saef's state: choose another --method")
    return args


def build(
    args: Namespace, dataset: Dataset, device: torch.device
) -> tuple[DistributedDataParallel, torch.optim.SGD, saef.SAEFState | None]:
    """The DDP model, its optimizer, and saef's state (None for plain DDP)."""
    torch.manual_seed(args.seed)
    net = ResNet(dataset.channels, dataset.classes, args.width, args.blocks).to(device)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, nesterov=args.nesterov
    )
    if args.method == "full":
        return model, optimizer, None

    sign = args.method.endswith("sign")
    compressor = saef.ScaledSign(block=args.block) if sign else saef.TopK(args.ratio, block=args.block)
    ahead = 1.0 if args.method.startswith("saef") else 0.0  # 0: plain error feedback
    averaging = None if args.averaging == "none" else AVERAGING[args.averaging](period=args.period)

    # ---- these two lines switch saef on ----
    state = saef.SAEFState(model, optimizer, compressor=compressor, step_ahead=ahead, averaging=averaging)
    model.register_comm_hook(state, saef_hook)
    # ----------------------------------------
    return model, optimizer, state


def train(args: Namespace, dataset: Dataset, device: torch.device, label: str | None = None) -> list[dict]:
    """Train; return one record per evaluation (rank 0; the other ranks return none).

    The batches depend on (seed, step) alone: every rank draws the same permutation and takes its share.
    label: of the progress bar on rank 0; None: no bar.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = len(dataset.train) // args.batch
    if args.batch % world or not batches:
        n = len(dataset.train)
        raise ValueError(f"--batch {args.batch}: expected a multiple of {world} (ranks) up to {n} (images)")
    share = args.batch // world
    total = args.steps if args.steps is not None else args.epochs * batches
    every = args.eval_every or batches
    model, optimizer, state = build(args, dataset, device)
    first = resume(args.checkpoint, model, optimizer, state) if args.checkpoint else 0
    if first >= total and rank == 0:
        print(f"the newest checkpoint in {args.checkpoint} is from the end of training, step {first}")
    board = None
    if args.tensorboard and rank == 0:
        from torch.utils.tensorboard import SummaryWriter  # the package tensorboard

        board = SummaryWriter(args.tensorboard)
    records = []
    bar = tqdm(range(first, total), desc=label, unit="step", disable=rank > 0 or label is None)
    for step in bar:
        epoch, batch = divmod(step, batches)
        if batch == 0 or step == first:
            generator = torch.Generator().manual_seed(args.seed + 1000 * epoch)
            order = torch.randperm(len(dataset.train), generator=generator)
        start = batch * args.batch + rank * share
        images, labels = dataset.train.batch(order[start : start + share].to(device))

        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

        if args.checkpoint and (step + 1) % args.checkpoint_every == 0:
            save(args.checkpoint, model, optimizer, state, step + 1)
        if args.tensorboard and (step + 1) % 10 == 0:
            numbers = {"loss": loss.item()} | state.metrics() | state.diagnose()  # diagnose: on all ranks
            for name, value in numbers.items() if board else ():
                board.add_scalar(f"saef/{name}", value, step + 1)
        if (step + 1) % every == 0 or step + 1 == total:
            sent = bytes_sent(model, state, step + 1)
            if rank == 0:
                record = {"method": args.method, "epoch": (step + 1) / batches, "step": step + 1}
                records.append(record | evaluate(model.module, dataset) | sent)
                bar.set_postfix(loss=records[-1]["loss"], accuracy=records[-1]["accuracy"])
    if board:
        board.close()
    return records


def save(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: saef.SAEFState, step: int) -> None:
    """A checkpoint of all ranks: saef's state, and what else training needs to go on after `step` batches."""
    extra = {"step": step, "model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
    saef.save_checkpoint(folder, state, extra)


def resume(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: saef.SAEFState) -> int:
    """Load the newest checkpoint, if there is one; the number of batches seen by then."""
    extra = saef.load_checkpoint(folder, state)
    if extra is None:
        return 0
    model.module.load_state_dict(extra["model"])
    optimizer.load_state_dict(extra["optimizer"])
    return extra["step"]


def bytes_sent(model: nn.Module, state: saef.SAEFState | None, steps: int) -> dict:
    """What this rank has sent so far; for plain DDP what a ring all-reduce of its gradients sends."""
    if state is not None:
        metrics = state.metrics()
        keys = {"bytes": "bytes_sent", "bytes_per_step": "bytes_per_step", "ratio": "compression_ratio"}
        return {key: metrics[name] for key, name in keys.items()}
    world = dist.get_world_size()
    per_step = 2 * (world - 1) / world * sum(p.numel() * p.element_size() for p in model.parameters())
    return {"bytes": steps * per_step, "bytes_per_step": per_step, "ratio": 1.0}


@torch.no_grad()
def evaluate(net: nn.Module, dataset: Dataset) -> dict:
    """Loss on training images, accuracy in per cent on all test images, at the weights x."""
    count = min(EVALUATION_IMAGES, len(dataset.train))
    seen = [slice(i, min(i + 500, count)) for i in range(0, count, 500)]
    # Training took batch norm's statistics at x_half, and each rank on its own images: estimate them at x.
    update_bn((dataset.train.batch(part)[0] for part in seen), net)
    net.eval()
    loss = correct = 0.0
    for part in seen:
        images, labels = dataset.train.batch(part)
        loss += F.cross_entropy(net(images), labels, reduction="sum").item()
    for i in range(0, len(dataset.test), 500):
        images, labels = dataset.test.batch(slice(i, i + 500))
        correct += (net(images).argmax(1) == labels).sum().item()
    net.train()
    return {"loss": loss / count, "accuracy": 100 * correct / len(dataset.test)}


def report(records: list[dict], out: str | None) -> None:
    """Print the last record, and write all of them to the file `out`, one JSON object a line."""
    if records:
        print(json.dumps(records[-1]))
        if out:
            with open(out, "w") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)


def rendezvous() -> dict:
    """Arguments of init_process_group under torchrun: a key-value store that restarts do not share.

    Else restarted ranks find the addresses of the dead ones in it (pytorch/pytorch issue 135712). With several
    nodes set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead: each agent counts its own restarts.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env["GROUP_WORLD_SIZE"] != "1":
        return {}
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"restart-{env['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": store, "rank": int(env["RANK"]), "world_size": int(env["WORLD_SIZE"])}


def main() -> None:
    args = parse()
    if "RANK" not in os.environ:
        raise SystemExit("start this with torchrun: torchrun --nproc_per_node 4 train_ddp.py ...")
    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    enough = gpus >= int(os.environ["LOCAL_WORLD_SIZE"])  # nccl wants one GPU for each rank
    if args.device == "cuda" and not enough:
        raise SystemExit(f"--device cuda needs nccl and a GPU for each rank, found {gpus}: start fewer ranks")
    if enough and args.device != "cpu":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", **rendezvous())
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", **rendezvous())
    records = train(args, load(args.data, args.fm14).to(device), device, label=args.method)
    report(records, args.out)
    dist.barrier()  # a process that ends while gloo's threads let go of the last step's tensors may abort
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
