"""Answers of the command line before anything runs: quick, from any folder, with the command that works."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import main
from tests.conftest import ROOT
from utils.metric_catalogue import CLASS_INCREMENTAL

HEAVY = {"torch", "timm", "torchvision", "pandas", "matplotlib", "scipy", "tensorboard"}
SCRIPT = (
    f"HEAVY = {HEAVY!r}"
    + """
import json, os, sys, tempfile

sys.path.insert(0, sys.argv[1])
import eval, main, models
import utils.cache.__main__ as cache

for command, arguments in json.loads(sys.argv[2]):
    with tempfile.TemporaryFile("w+") as printed:
        if os.fork() == 0:
            answer = os.dup(1)
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            sys.argv = ["main.py", *arguments]
            try:
                code = {"main": main, "eval": eval, "cache": cache}[command].main(arguments)
            except SystemExit as ended:
                code = ended.code
            sys.stdout.flush()
            printed.seek(0)
            loaded = sorted(HEAVY & sys.modules.keys())
            os.write(answer, (json.dumps([code, loaded, printed.read()]) + "\\n").encode())
            os._exit(0)
        os.wait()
"""
)
ASKED = [  # command, arguments, exit code, words of the answer
    ("main", ["--help"], 0, "--method"),
    ("main", ["exps/smok.json"], 2, "did you mean"),
    ("main", ["exps/quickstart.json", "--set", "nested_lora_rnk=4"], 2, "nested_lora_rank"),
    ("main", ["exps/sweeps/smoke.json", "--set", "batch_size=0"], 2, "too small"),
    ("main", ["--method", "ranpac", "--dataset", "cifar224", "--set", "ranpac_dim=0"], 2, "too small"),
    ("main", ["exps/sdlora_c100.json", "--set", "lora_rank=0"], 2, "too small"),
    ("main", ["exps/shared_subspace.json", "--set", "width=0"], 2, "too small"),
    ("main", ["--resume", "logs/nonsense"], 2, "no config.json"),
    ("main", ["--list", "methods"], 0, "simplecil"),
    ("main", ["--list", "datasets"], 0, "mnist_5k"),
    ("main", ["--list", "backbones"], 0, "vit_base_patch16_224"),
    ("main", ["--list", "keys", "--method", "sdlora"], 0, "lora_rank"),
    ("eval", ["--help"], 0, "--checkpoint"),
    ("eval", ["--run", "logs/nonsense"], 2, "no config.json"),
    ("eval", ["--compare", "logs/a", "logs/b"], 2, "no such folder"),
    ("cache", ["--root", "nowhere"], 0, "nothing"),
]


def test_answers_import_nothing_heavy_and_need_no_folder(tmp_path: Path) -> None:
    """Asked from another folder: files of the project are found there, and nothing is written.

    Each is asked in a fork of its own of a process that has imported the command lines alone.
    """
    command = [sys.executable, "-c", SCRIPT, str(ROOT), json.dumps([line[:2] for line in ASKED])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (_, arguments, code, words), (ended, loaded, printed) in zip(ASKED, answers, strict=True):
        assert (ended, loaded) == (code, []), (arguments, printed)
        assert words in printed and "Traceback" not in printed, arguments
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["pydantic", "torch.types"])
def test_ctrl_c_at_the_start_is_quiet(module: str, tmp_path: Path) -> None:
    """While the config's modules are imported, and while PyTorch is."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "main.py"), "exps/smoke.json"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background it is ignored
    )
    assert any(line.split("|")[-1].strip() == module for line in process.stdout)  # imported just now
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in printed and list(tmp_path.iterdir()) == []


def test_a_file_says_itself_what_it_is(tmp_path: Path) -> None:
    config, sweep = Path("exps/smoke.json"), Path("exps/sweeps/smoke.json")
    assert main.parse([str(config)]).config == config and main.parse([str(sweep)]).sweep == sweep
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"base": str(ROOT / config), "rd_dim": 4}))
    assert main.parse([str(own), "--set", "rd_dim=8"]).config == own


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--config exps/sweeps/smoke.json", "--sweep exps/sweeps/smoke.json"),
        ("--sweep exps/smoke.json", "--config exps/smoke.json"),
        ("exps/smoke.json --method sema", "give one"),
        ("--dataset cifar224", "--set dataset=cifar224"),
        ("--method ranpack --dataset cifar224", 'did you mean "ranpac"?'),
        ("--method ranpac --dataset domainnet", "cifar224, imageneta"),
        ("--method ranpac", "cifar224, imageneta"),
        ("--method shared_subspace --dataset vtab", "leave --dataset out"),
        ("exps/sema_cifar.json --set model_name=ranpac", "python main.py exps/baselines/ranpac_cifar.json"),
        ("exps/sdlora_c100.json --set model_name=joint --set dataset=vtab", "exps/baselines/joint_vtab.json"),
        ("exps/sweeps/nesting.json --set model_name=ranpac", "--only CELL"),
        ("exps/sema_cifar.json --set model_name=ranpack", 'did you mean "ranpac"?'),
    ],
)
def test_what_cannot_be_run_is_answered_with_what_can(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(arguments.split()) == 2
    told = capsys.readouterr().err
    assert words in told and len(told.splitlines()) <= 2


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ("sema --dataset cifar224", "sema_cifar"),
        ("sema --dataset CIFAR-100", "sema_cifar"),
        ("sema --dataset imagenetr", "sema_inr_10task"),
        ("sema --dataset vtab", "published/sema_vtab"),
        ("finetune --dataset cifar224", "baselines/finetune_cifar"),
        ("sdlora --dataset imagenetr", "published/sdlora_inr"),
        ("shared_subspace", "shared_subspace"),
    ],
)
def test_method_and_data_set_stand_for_the_shipped_file(arguments: str, path: str) -> None:
    assert main.parse(["--method", *arguments.split()]).config == Path(f"exps/{path}.json")


def test_lists_can_be_of_one_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--list", "metrics", "--method", "ranpac"]) == 0
    shown = capsys.readouterr().out
    assert all(spec.key in shown and spec.meaning in shown for spec in CLASS_INCREMENTAL)
    assert "unseen_iou" not in shown and "lower is better" in shown and "peak_memory_mb" in shown
    assert main.main(["--list", "configs", "--method", "joint"]) == 0
    own = capsys.readouterr().out.splitlines()
    assert own and all("joint" in line for line in own)
