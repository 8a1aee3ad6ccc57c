"""Look at a run again: figures from its files, accuracy from its checkpoints, nothing trained.

python eval.py --run FOLDER                          tables, figures, and the last checkpoint tested again
python eval.py --run FOLDER --recorded               tables and figures of what the run wrote, in seconds
python eval.py --run FOLDER FOLDER ...               several seeds: mean ± std of those that are finished
python eval.py --checkpoint FOLDER/checkpoints/task_04   the model as that task left it

FOLDER is a run's, such as logs/sema/mnist_5k/0/2/quickstart_1993_vit_small_patch14_reg4_dinov2.
"""

import argparse
import sys
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description="Tables and figures of a run; its model rebuilt from a checkpoint and tested.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--run",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="a run folder: redraw its figures and test its last checkpoint; several: their mean and deviation",
    )
    what.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="one checkpoint of a run: test it")
    parser.add_argument("--recorded", action="store_true", help="with --run: only what the run recorded, no test")
    options = parser.parse_args(arguments)
    if options.recorded and options.checkpoint:
        parser.error("--recorded goes with --run")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Show what the command line asks for; the exit code: 0 done, 2 a mistake to mend."""
    options = parse(arguments)
    from utils.errors import exit_code
    from utils.run_log import attach_console
    from utils.toolkit import keep_freed_memory

    attach_console()
    keep_freed_memory()
    return exit_code(lambda: show(options))


def show(options: argparse.Namespace) -> None:
    """What the command line asks for."""
    if options.run and len(options.run) > 1:
        show_seeds(options.run)
    elif options.run:
        show_run(options.run[0], test=not options.recorded)
    else:
        report_checkpoint(options.checkpoint)


def show_run(folder: Path, test: bool) -> None:
    """Recorded accuracy and figures of a run folder, then its last checkpoint tested."""
    from trainer import CHECKPOINTS, read_config
    from utils.checkpoint import latest_checkpoint
    from utils.errors import UserError
    from utils.plots import draw_figures
    from utils.run_log import read_accuracy_csv

    read_config(folder)  # refuses what is no run folder
    for figure in draw_figures(folder):
        print(f"drew {figure}")
    if (folder / "accuracy.csv").is_file():
        print("\nrecorded accuracy (%), row: after task, column: on task")
        for t, row in enumerate(read_accuracy_csv(folder)):
            print(f"task {t:>3}  " + " ".join(f"{value:6.2f}" for value in row))
    if test:
        checkpoint = latest_checkpoint(folder / CHECKPOINTS)
        if checkpoint is None:
            raise UserError(f"{folder} has no checkpoint to test yet: let the run finish a task, or use --recorded")
        print()
        report_checkpoint(checkpoint)


def show_seeds(folders: list[Path]) -> None:
    """Mean ± std over finished runs of one experiment with different seeds."""
    from trainer import read_result
    from utils.errors import UserError
    from utils.metrics import seeds_table

    finished = [folder for folder in folders if (folder / "result.json").is_file()]
    for folder in sorted(set(folders) - set(finished)):
        print(f"left out, no result.json: {folder}")
    if not finished:
        raise UserError("none of the folders holds a finished run (a result.json)")
    print(seeds_table([read_result(folder) for folder in finished]))


def report_checkpoint(checkpoint: Path) -> None:
    """Rebuild the model a checkpoint holds, strictly, and print its accuracy on every task it has seen."""
    from trainer import Evaluator, assemble, check_identity, make_learner, read_config
    from utils.checkpoint import load_checkpoint

    tensors, state = load_checkpoint(checkpoint)
    config = read_config(checkpoint.parent.parent)
    parts = assemble(config, config.seed[0])
    check_identity(checkpoint, state, parts)
    learner = make_learner(parts, log=None)
    learner.load_state(state["learner"], tensors)
    correct, total = Evaluator(learner, parts.data)(learner.task)

    print(f"{checkpoint}: accuracy (%) on the test images of each task seen, class-incremental")
    for task, (right, images) in enumerate(zip(correct, total, strict=True)):
        classes = parts.data.task_classes(task)
        share = f"{100 * right / images:6.2f}  ({right} of {images})"
        print(f"task {task:>3}  classes {classes.start:>3}-{classes.stop - 1:<3}  {share}")
    print(f"total {'':>19}{100 * sum(correct) / sum(total):6.2f}  ({sum(correct)} of {sum(total)})")


if __name__ == "__main__":
    sys.exit(main())
