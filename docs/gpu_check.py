"""Check on one GPU, in at most ten minutes: how fast a step is, and that all device paths run.

    python docs/gpu_check.py
    python docs/gpu_check.py --set device=cuda:1

Benchmarks print the share of the GPU's matrix-product rate that a training step at batch 128 in bf16 reaches
("step of task 0, share"; goal: 50 %), and the time of batches: an image of "batches of new views" should take
fewer milliseconds than its step. Then small runs go through every device path: stored and new views, caches,
autocast, fused AdamW, accumulated gradients, closed-form heads, gates and grids. Nothing is left behind.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main

DEVICE = ["device=cuda", "precision=bf16"]
LARGE = ["batch_size=128", "eval_batch_size=256"]
BENCHMARKS = {  # file -> changes
    "exps/evidence/nested_lora_cifar_dinov2s.json": LARGE,
    "exps/evidence/sdlora_cifar_dinov2s.json": LARGE,
    "exps/nested_lora_cifar.json": LARGE,
}
SMALL = [
    "dataset=synthetic", "init_cls=2", "increment=2", "max_tasks=2", "max_train_per_class=16",
    "backbone_type=test_vit", "weights=random", "image_size=32", "batch_size=8",
]  # fmt: skip
BLOCKS = ["adapt_start_layer=4", "adapt_end_layer=5"]  # of the small network
RUNS = (
    ("exps/smoke.json", ["cache_views=2", "max_tasks=2"]),
    ("exps/smoke.json", ["cache_gb=0", "optimizer=adam", "grad_accumulation=2", "expansion=always"]),
    ("exps/baselines/ranpac_cifar.json", [*SMALL, *BLOCKS, "first_session=true", "ranpac_dim=50"]),
    ("exps/sdlora_c100.json", [*SMALL, "lora_rank=2", "init_epoch=2", "epochs=2", "gumbel_gate=layer"]),
    ("exps/shared_subspace_small.json", ["epochs=2", "steps_per_epoch=5", "few_shot_tasks=1"]),
)


def check(
    settings: Sequence[str],
    benchmarks: Mapping[str, Sequence[str]] = BENCHMARKS,
    runs: Sequence[tuple[str, Sequence[str]]] = RUNS,
    repeats: int = 5,
) -> int:
    """Run benchmarks, then runs; the exit code of the first command that fails, or 0.

    Args:
        settings: texts `key=value`, for every command.
    """
    started = time.monotonic()
    commands = [["--benchmark", f"--repeats={repeats}", *options_of(*item)] for item in benchmarks.items()]
    commands += [["--overwrite", *options_of(*item)] for item in runs]
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        for command in commands:
            words = [*command, *(f"--set={setting}" for setting in settings)]
            print(f"\n[{time.monotonic() - started:.0f} s] python main.py {' '.join(words)}", flush=True)
            if code := main.main(words):
                return code
    print(f"\nEverything ran, in {time.monotonic() - started:.0f} s")
    return 0


def options_of(file: str, changes: Sequence[str]) -> list[str]:
    return ["--config", file, *(f"--set={change}" for change in changes)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in every command")
    sys.exit(check([*DEVICE, *parser.parse_args().set]))
