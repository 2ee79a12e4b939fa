"""What mypy, and so an IDE, says of a user's code."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from support import CHECKOUT, readme_script

# A comment is the start of the error that mypy must find in its line; it must find no other.
SNIPPET = """\
import torch
from torch import nn

import saef

model = nn.Linear(2, 2)
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler()
mode: str = "outer"

state = saef.SAEFState(model, sgd)
saef.SAEFState(model, sgd, compressor=saef.TopK(0.01, block="layer"), server_compressor="same", exchange="sharded")
saef.SAEFState(model, sgd, server_compressor=None, exchange="replicated", weight_decay_mode="outer", audit_every=9)
saef.SAEFState(model, sgd, server_compressor=saef.Identity(), averaging=saef.Ring(), step_ahead=0, exchange="auto")
saef.SAEFState(model, sgd, compresor=saef.TopK())  # Unexpected keyword argument "compresor" for "SAEFState"
saef.SAEFState(model, sgd, exchange="shraded")  # Argument "exchange" to "SAEFState" has incompatible type
saef.SAEFState(model, sgd, weight_decay_mode="inner")  # Argument "weight_decay_mode" to "SAEFState" has incompatible
saef.SAEFState(model, sgd, weight_decay_mode=mode)  # Argument "weight_decay_mode" to "SAEFState" has incompatible
saef.SAEFState(model, sgd, server_compressor="sane")  # Argument "server_compressor" to "SAEFState" has incompatible
saef.SAEFState(model, sgd, compressor="sign")  # Argument "compressor" to "SAEFState" has incompatible type
saef.SAEFState(model, sgd, averaging=20)  # Argument "averaging" to "SAEFState" has incompatible type
saef.SAEFState(model, sgd, saef.TopK())  # Too many positional arguments for "SAEFState"
saef.SAEFSate(model, sgd)  # Module has no attribute "SAEFSate"
saef.hoks.ef(model, sgd)  # Module has no attribute "hoks"
saef.hooks.fe(model, sgd)  # Module has no attribute "fe"
saef.integrations.openmpi  # Module has no attribute "openmpi"
saef.ScaledSign(block="tensor")  # Argument "block" to "ScaledSign" has incompatible type
saef.TopK(ration=0.1)  # Unexpected keyword argument "ration" for "TopK"
if state.strategy == "shraded":  # Non-overlapping equality check
    pass
state.engine.transport.mean(torch.ones(1), "averaging")
state.engine.transport.mean(torch.ones(1), "avreaging")  # Argument 2 to "mean" of "Transport" has incompatible type

saef.hooks.ef(model, sgd, compressor=saef.TopK(), weight_decay_mode="outer", grad_scaler=scaler, exchange="sharded")
saef.hooks.dist_ef_block_sgd(model, sgd, averaging=saef.AllReduce(20))
saef.hooks.signum_majority_vote(model, sgd, compressor=saef.MajorityVote("layer"), max_consecutive_skips=None)
saef.hooks.ef(model, sgd, compresor=saef.TopK())  # Unexpected keyword argument "compresor" for "ef"
saef.hooks.ef(model, sgd, step_ahead=0.5)  # Unexpected keyword argument "step_ahead" for "ef"
saef.hooks.ef(model, sgd, exchange="shraded")  # Argument "exchange" to "ef" has incompatible type
saef.hooks.dist_ef_block_sgdm(model, sgd, weight_decay_mode="outer")  # Unexpected keyword argument "weight_decay_mode"
saef.hooks.signsgd_majority_vote(model, sgd, audit=9)  # Unexpected keyword argument "audit" for "signsgd_majority_vote"
saef.hooks.signsgd_majority_vote(model, sgd, exchange="atuo")  # Argument "exchange" to "signsgd_majority_vote" has

saef.integrations.horovod.SAEFCompression(model, sgd, compressor=saef.TopK(), exchange="auto", grad_scaler=scaler)
saef.integrations.horovod.SAEFCompression(model, sgd, step_ahead=0.5, weight_decay_mode="coupled")
saef.integrations.horovod.SAEFCompression(model, sgd, compresor=1)  # Unexpected keyword argument "compresor" for
saef.integrations.horovod.SAEFCompression(model, sgd, process_group=None)  # Unexpected keyword argument "process_group"
saef.integrations.horovod.SAEFCompression(model, sgd, exchange="shraded")  # Argument "exchange" to "SAEFCompression"

saef.integrations.deepspeed.SAEF(model.parameters(), lr=0.1, nesterov=True, momentum=0.9, exchange="sharded")
saef.integrations.deepspeed.SAEF(model.parameters(), compressor={"type": "topk"}, server_compressor="same")
saef.integrations.deepspeed.SAEF(model.parameters(), compresor={"type": "topk"})  # Unexpected keyword argument
saef.integrations.deepspeed.SAEF(model.parameters(), momentun=0.9)  # Unexpected keyword argument "momentun" for "SAEF"
saef.integrations.deepspeed.SAEF(model.parameters(), exchange="shraded")  # Argument "exchange" to "SAEF" has
saef.integrations.deepspeed.SAEF(model.parameters(), grad_scaler=None)  # Unexpected keyword argument "grad_scaler"
"""


# What else is installed here is as if it were not: two thirds of mypy's work would be to read Transformers.
CONFIG = """\
[mypy]
strict = True
hide_error_context = True
pretty = False
[mypy-accelerate.*,lightning.*,numba.*,transformers.*,triton.*]
follow_imports = skip
ignore_missing_imports = True
"""


@pytest.mark.slow
def test_wrong_names_and_words_are_errors_and_right_ones_are_not(tmp_path: Path) -> None:
    """All in one run, since mypy takes some seconds to start."""
    if not find_spec("mypy"):
        pytest.skip("needs mypy")
    (tmp_path / "snippet.py").write_text(SNIPPET)
    (tmp_path / "train.py").write_text(readme_script().replace(".backward()", ".backward()  # type: ignore"))  # torch's
    (tmp_path / "mypy.ini").write_text(CONFIG)
    words = ["--config-file", "mypy.ini", "--cache-dir", str(CHECKOUT / ".cache" / "mypy-user")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words, "snippet.py", "train.py"], cwd=tmp_path, capture_output=True, text=True
    )
    found = dict(re.findall(r"^snippet\.py:(\d+): error: (.*)$", done.stdout, re.MULTILINE))
    lines = dict(enumerate(SNIPPET.splitlines(), 1))
    expected = {str(n): line.partition("  # ")[2] for n, line in lines.items() if "  # " in line}
    assert "train.py:" not in done.stdout, done.stdout
    assert found.keys() == expected.keys(), done.stdout + done.stderr
    for n, start in expected.items():
        assert found[n].startswith(start), (n, found[n])
    assert len(expected) > 20
