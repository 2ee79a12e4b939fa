"""SAEF-AdamW among many workers without ranks: the GPT of `examples/train_gpt.py`, all workers as one batch.

python benchmarks/lm_workers.py --workers 64 --form sharded [--lr 8e-3] [--seed 0]

Sign both ways, a scale for each block of `saef.ScaledSign()`; every worker clips its own gradient. Forms of x_half:
adamw: full precision; ef: x; none: x - e_k; replicated: x - e_k - e; sharded: x - e_k - K e where the worker serves.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

import saef
from saef.wire.plan import partition

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import train_gpt

B1, B2, EPS = 0.9, 0.95, 1e-8


def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """Attention in operations that vmap knows."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


def served(numels: list[int], workers: int) -> Tensor:
    """[K, d]: 1 where the worker serves."""
    blocks = partition(numels, [0] * len(numels), saef.ScaledSign(), saef.ScaledSign(), workers)
    mask = torch.zeros(workers, sum(numels))
    for k in range(workers):
        for b in blocks.served_by(k):
            mask[k, b.state : b.state + b.numel] = 1.0
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--form", choices=("adamw", "ef", "none", "replicated", "sharded"), default="replicated")
    parser.add_argument("--plain-v", action="store_true", help="v of each worker's own gradient")
    parser.add_argument("--lr", default="8e-3")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--data", help="a text (default: the sources of Python's standard library)")
    parser.add_argument("--batch", type=int, default=32, help="total over the workers, at least one each")
    given = parser.parse_args()
    K, form = given.workers, given.form
    batch = str(max(given.batch, K))
    args = train_gpt.parse(
        ["--lr", given.lr, "--seed", given.seed, "--batch", batch, *(["--data", given.data] if given.data else [])]
    )
    train_gpt.F.scaled_dot_product_attention = attend
    text = train_gpt.read(args.data)
    held_out = len(text) * 95 // 100
    torch.manual_seed(args.seed)
    net = train_gpt.GPT(args.width, args.layers, args.heads, args.context)
    named = {name: p.detach() for name, p in net.named_parameters()}
    numels = [p.numel() for p in named.values()]
    decay = torch.cat([torch.full((p.numel(),), args.weight_decay if p.dim() > 1 else 0.0) for p in named.values()])

    def parts(v: Tensor) -> dict[str, Tensor]:
        return {n: part.view_as(p) for (n, p), part in zip(named.items(), v.split(numels), strict=True)}

    def C(D: Tensor) -> Tensor:
        """Scaled sign of each tensor, all of which are below 65536 entries."""
        every = D.split(numels, -1)
        return torch.cat([torch.where(v >= 0, 1.0, -1.0) * v.abs().mean(-1, keepdim=True) for v in every], -1)

    gradients = vmap(grad(lambda v, a, b: functional_call(net, parts(v), (a, b))))
    ahead = {"none": 0.0, "replicated": 1.0, "sharded": K * served(numels, K)}.get(form, 0.0)
    full, noise = form == "adamw", 1 if given.plain_v or form == "adamw" else K
    x = torch.cat([p.reshape(-1) for p in named.values()])
    e, server = torch.zeros(K, len(x)), torch.zeros_like(x)
    m, v = (torch.zeros(1 if full else K, len(x)) for _ in range(2))
    for t in range(args.steps):
        generator = torch.Generator().manual_seed(1_000_003 * args.seed + t)
        starts = torch.randint(held_out - args.context - 1, (args.batch,), generator=generator)
        batches = [train_gpt.cut(text, starts[k::K], args.context) for k in range(K)]
        half = x.expand(K, -1) if form in ("adamw", "ef") else x - e - ahead * server
        g = gradients(half, *(torch.stack(part) for part in zip(*batches, strict=True)))
        g = g.mean(0, keepdim=True) if full else g
        g = g * (args.clip / (g.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
        p = m / (1 - B1**t) if t else g
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * (g / noise + (1 - 1 / noise) * p)
        u = m / (1 - B1 ** (t + 1)) / ((v / (1 - B2 ** (t + 1))).clamp(min=0).sqrt() + EPS)
        eta = args.lr * train_gpt.rate(args, t)
        if full:
            x = x - eta * decay * x - eta * u[0]
            continue
        D = e + eta * u.clamp(-1, 1)
        sent = C(D)
        e, D = D - sent, server + sent.mean(0)
        server, x = D - C(D), x - C(D) - eta * decay * x
    net.load_state_dict(parts(x))
    loss = train_gpt.evaluate(args, net, text[held_out:], torch.device("cpu"))
    v = "plain" if given.plain_v else "corrected"
    print(f"{K} workers, {form}, {v} v, lr {args.lr}, seed {args.seed}: held-out loss {loss:.4f}")


if __name__ == "__main__":
    main()
