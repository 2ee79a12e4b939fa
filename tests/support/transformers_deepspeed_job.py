"""Hugging Face's Trainer over a DeepSpeed JSON with "auto" for all it can fill in: one rank of two, by torchrun.

Compares what it trains with DDP's own loop, resumes from its checkpoint, and notes in FOLDER/rank-RANK.json what is to
be looked at.
"""

import json
import logging
import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import saef
import saef.integrations.deepspeed
from support import CHECKOUT, trainers
from support.trainers import STEPS, record
from support.transformers_ranks import make

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes two minutes; it is not used here
deepspeed.utils.logger.setLevel(logging.ERROR)
# That of docs/deepspeed.md, and a scheduler.
(BLOCK,) = re.findall(
    r'```json\n({[^`]*"gradient_clipping": "auto"[^`]*)```', (CHECKOUT / "docs/deepspeed.md").read_text()
)
AUTO: dict[str, Any] = {
    **json.loads(BLOCK),
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
}
WORDS: dict[str, Any] = {"adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.01, "max_grad_norm": 0.5}


def by_hand(epoch: list[Any], lrs: list[float]) -> dict[str, Any]:
    """The same by DDP and saef_hook, at the learning rates of the run."""

    def adamw(net: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters(), lr=lrs[0], betas=(0.9, 0.95), eps=1e-6, weight_decay=0.01)

    class Given:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.rest = optimizer, iter(lrs[1:])

        def step(self) -> None:
            if (lr := next(self.rest, None)) is not None:
                self.optimizer.param_groups[0]["lr"] = lr

    settings = {"compressor": saef.ScaledSign(), "max_grad_norm": 0.5}
    return trainers.train_by_hand(adamw, [epoch], settings, Given, every_step=1)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    noted: dict[str, Any] = {"said": []}
    handler = logging.Handler()
    handler.emit = lambda r: noted["said"].append(r.getMessage())  # type: ignore[method-assign]
    logging.getLogger("saef").addHandler(handler)
    saving = {"save_strategy": "steps", "save_steps": 4, **WORDS}

    def run(**words: Any) -> Any:
        _, t = make(None, folder / "checkpoints", dropout=0.0, deepspeed=deepcopy(AUTO), **words)
        return t

    t = run(**saving)
    lrs: list[float] = []
    step = saef.step.engine.Engine.before_step

    def before_step(engine: Any, optimizer: Any, args: Any, kwargs: Any) -> Any:
        lrs.append(float(optimizer.param_groups[0]["lr"]))
        return step(engine, optimizer, args, kwargs)

    saef.step.engine.Engine.before_step = before_step  # type: ignore[method-assign]
    t.train()
    saef.step.engine.Engine.before_step = step  # type: ignore[method-assign]
    engine = t.model_wrapped
    state, group = engine.optimizer.saef, engine.optimizer.param_groups[0]
    noted["type"], noted["steps"], noted["clip"] = type(engine).__name__, state.steps, state.settings.max_grad_norm
    noted["group"] = {name: group[name] for name in ("betas", "eps", "weight_decay")}
    noted["lrs"], noted["log"] = lrs, [r for r in t.state.log_history if "loss" in r]
    straight = record(state)
    expected = by_hand(t.had, lrs)
    noted["as by hand"] = {n: bool(torch.equal(straight[n], expected[n])) for n in ("x", "e", "m", "e_server")}
    again = run(**saving)
    again.train(resume_from_checkpoint=str(folder / "checkpoints" / "checkpoint-4"))
    resumed = record(again.model_wrapped.optimizer.saef)
    noted["resumed"] = {n: bool(torch.as_tensor(straight[n] == resumed[n]).all()) for n in straight}
    assert state.steps == STEPS == len(lrs)
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(noted))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
