"""Look at a run again: figures from its files, accuracy from its checkpoints, nothing trained.

python eval.py --run FOLDER                          tables, figures, and the last checkpoint tested again
python eval.py --run FOLDER --recorded               tables and figures of what the run wrote, in seconds
python eval.py --run FOLDER FOLDER ...               several seeds: mean ± std of those that are finished
python eval.py --checkpoint FOLDER/checkpoints/task_04   the model as that task left it
python eval.py --run FOLDER --analyse cka grassmann probes   what its representations did, task after task
python eval.py --run FOLDER --analyse cka grassmann probes units samples   a run on grids, at its end

FOLDER is a run's, such as logs/sema/mnist_5k/0/2/quickstart_1993_vit_small_patch14_reg4_dinov2.
"""

import argparse
import shlex
import sys
from pathlib import Path

from utils.command_line import given_path, parse_or_advise
from utils.console import attach_console, prepare_console


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description="Tables and figures of a run; its model rebuilt from a checkpoint and tested.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--run",
        type=given_path,
        nargs="+",
        metavar="FOLDER",
        help="a run folder: redraw its figures and test its last checkpoint; "
        "several: their mean and deviation",
    )
    what.add_argument(
        "--checkpoint", type=given_path, metavar="FOLDER", help="one checkpoint of a run: test it"
    )
    parser.add_argument(
        "--recorded", action="store_true", help="with --run: only what the run recorded, no test"
    )
    parser.add_argument(
        "--analyse",
        nargs="+",
        metavar="NAME",
        help="with --run: rebuild the network after every task; cka, grassmann, probes go to "
        "FOLDER/analysis; of a run on grids also units, samples",
    )
    parser.add_argument(
        "--images-per-class",
        type=int,
        metavar="N",
        help="with --analyse: test images of each class at most (default: 20)",
    )
    options = parse_or_advise(parser, arguments, way_out)
    if not options.run and not options.checkpoint:
        parser.error("one of --run FOLDER and --checkpoint FOLDER is needed")
    if options.recorded and options.checkpoint:
        parser.error("--recorded goes with --run")
    check_analysis_options(parser, options)
    return options


def way_out(name: str, values: list[str]) -> str:
    """Advice for an argument that does not exist, with the folder to test where it is known."""
    folder = next((shlex.quote(value) for value in values if Path(value).is_dir()), "FOLDER")
    forms = (
        "python eval.py --run FOLDER, "
        "a task's model with python eval.py --checkpoint FOLDER/checkpoints/task_00"
    )
    return (
        f"a run is tested with {forms.replace('FOLDER', folder)}; what it is made with is in its config.json"
    )


def check_analysis_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with a usage error where the options around `--analyse` do not go together."""
    if not options.analyse and options.images_per_class is not None:
        parser.error("--images-per-class goes with --analyse")
    if options.analyse and (options.checkpoint or options.recorded or len(options.run) > 1):
        parser.error("--analyse looks at one --run: it takes no --checkpoint, --recorded or further folder")
    if options.images_per_class is not None and options.images_per_class < 2:
        parser.error(
            f"--images-per-class {options.images_per_class}: at least 2, half of them test the probes"
        )


def main(arguments: list[str] | None = None) -> int:
    """Show what the command line asks for; the exit code: 0 done, 2 a mistake to mend."""
    prepare_console()
    options = parse(arguments)
    # Imported after parsing, so that --help and usage errors answer at once.
    from models.inspection import analyse_run, show_checkpoint, show_run, show_seeds
    from utils.errors import AGAIN, exit_code
    from utils.training.device import keep_freed_memory

    attach_console(goes_on=False)
    keep_freed_memory()

    def show() -> None:
        if options.analyse:
            lines = analyse_run(options.run[0], options.analyse, options.images_per_class)
        elif options.run and len(options.run) > 1:
            lines = show_seeds(options.run)
        elif options.run:
            lines = show_run(options.run[0], test=not options.recorded)
        else:
            lines = show_checkpoint(options.checkpoint)
        for line in lines:
            print(line)

    return exit_code(show, go_on=AGAIN)


if __name__ == "__main__":
    sys.exit(main())
