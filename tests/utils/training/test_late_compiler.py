"""A run imports neither PyTorch's compiler nor scipy, and both are there when something needs them."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, TINY, command

SCRIPT = """
import sys
import main

assert main.main(sys.argv[1:]) == 0
print("LOADED", *({"torch._dynamo", "sympy", "scipy"} & sys.modules.keys()))

import torch
from torchvision.ops import roi_align
from utils.training.late_compiler import late

def trained(optimizer):
    weights = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    steps = optimizer([weights], lr=0.1, weight_decay=0.1)
    for step in range(4):
        steps.zero_grad()
        weights.pow(3).sum().backward()
        steps.step()
        steps.load_state_dict(steps.state_dict())
    return weights

for own in (torch.optim.SGD, torch.optim.AdamW):
    assert torch.equal(trained(late(own)), trained(own))
assert roi_align(torch.ones(1, 1, 8, 8), torch.tensor([[0, 0.0, 0, 4, 4]]), 2).eq(1).all()
assert torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2)).eq(1).all()
assert torch._dynamo.utils.__spec__ and torch.compiler.disable.__module__ == "torch.compiler"
print("WORKS")
"""


def test_a_run_imports_no_compiler_and_what_needs_it_gets_it(tmp_path: Path) -> None:
    """In a process of its own; optimizers step to the bit as PyTorch's own."""
    tiny = TINY | {"max_tasks": 2, "func_epoch": 1, "rd_epoch": 1, "max_train_per_class": 4}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *command("smoke.json", tmp_path, **tiny)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "LOADED" in lines and lines[-1] == "WORKS"  # nothing after LOADED
