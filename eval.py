"""Evaluation of finished runs: figures from their files, accuracy from their checkpoints; nothing is trained.

python eval.py --run FOLDER                          tables, figures, and the last checkpoint tested again
python eval.py --run FOLDER --recorded               tables and figures of what the run wrote, in seconds
python eval.py --run FOLDER --report                 its page, FOLDER/report.html, written again
python eval.py --run FOLDER FOLDER ...               several seeds: mean ± std of those that are finished
python eval.py --compare FOLDER FOLDER ... --latex   runs that differ in more than their seed, in a table
python eval.py --run FOLDER ... --test               test accuracy of runs measured on validation images
python eval.py --checkpoint FOLDER/checkpoints/task_04   the model as that task left it
python eval.py --run FOLDER --analyse cka grassmann probes   what its representations did, task after task
python eval.py --run FOLDER --analyse cka grassmann probes units samples   a run on grids, at its end
python eval.py --run FOLDER --predict photos/ --top 3    classes of any images, with calibrated scores
python eval.py --run FOLDER --export onnx            also timm, torchscript: a model without this program

FOLDER is a run's, such as logs/sema/mnist_5k/0/2/sema_growth_demo_1993_vit_small_patch14_reg4_dinov2.
"""

# What needs PyTorch is imported inside functions, so that --help and usage errors are answered at once.

import argparse
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from utils.command_line import (
    at_least_one,
    chosen_command,
    given_image,
    given_path,
    parse_or_advise,
    refused_options,
)
from utils.console import attach_console, prepare_console
from utils.errors import AGAIN, UserError, exit_code
from utils.stop import abrupt_interrupts
from utils.training.late_compiler import import_networks

TAKES = {  # command -> options that it takes besides its own; the first one given decides
    "predict": ("run", "checkpoint", "out", "top"),
    "export": ("run", "checkpoint", "out"),
    "analyse": ("run", "images-per-class"),
    "recorded": ("run",),
    "report": ("run",),
    "compare": ("baseline", "latex", "markdown", "out"),
    "test": ("run",),
    "checkpoint": (),
    "run": (),
}
ONE_RUN = ("predict", "export", "analyse", "recorded", "report")  # commands that look at one run


# ----------------------------------------------------------------------------------------------------------
# Arguments


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments; exits with a usage error where they do not go together."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        usage="%(prog)s (--run | --checkpoint | --compare) FOLDER ... [options]",
        description="Tables and figures of a run; its model rebuilt from a checkpoint and tested.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__,
    )
    add = parser.add_argument
    add(
        "--run",
        type=given_path,
        nargs="+",
        action="extend",
        metavar="FOLDER",
        help="a run folder: redraw its figures and test its last checkpoint; "
        "several: their mean and deviation",
    )
    add("--checkpoint", type=given_path, metavar="FOLDER", help="one checkpoint of a run: test it")
    add(
        "--compare",
        type=given_path,
        nargs="+",
        action="extend",
        metavar="FOLDER",
        help="run folders, or folders that hold some: runs that differ in more than their seed, in a table",
    )
    add(
        "--baseline",
        metavar="NAME",
        help="with --compare: the group, or a run of it, that others differ from",
    )
    add("--latex", action="store_true", help="with --compare: print a booktabs table and comments")
    add("--markdown", action="store_true", help="with --compare: print a Markdown table")
    add("--recorded", action="store_true", help="with --run: only what the run recorded, no test")
    add("--report", action="store_true", help="with --run: only draw its figures and write report.html again")
    add(
        "--test",
        action="store_true",
        help="with --run: test images, where the run held out others (validation_share); test_result.json",
    )
    add(
        "--analyse",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="with --run: rebuild the network after every task; cka, grassmann, probes go to "
        "FOLDER/analysis; of a run with a gate also gate, of one on grids units, samples",
    )
    add(
        "--images-per-class",
        type=int,
        metavar="N",
        help="with --analyse: test images of each class at most (default: 20)",
    )
    add(
        "--predict",
        type=given_image,
        nargs="+",
        action="extend",
        metavar="PATH",
        help="with --run: classes of these images",
    )
    add("--top", type=at_least_one, metavar="N", help="with --predict: classes per image (default: 1)")
    add("--export", choices=("timm", "onnx", "torchscript"), help="with --run: write the model in this form")
    add(
        "--out",
        type=given_path,
        metavar="PATH",
        help="with --predict: a .csv file for the predictions; with --export: a new folder (default: "
        "FOLDER/export/FORM); with --compare: a folder for the report (default: one in logs/comparisons)",
    )
    options = parse_or_advise(parser, arguments, way_out)
    if fault := usage_fault(options):
        parser.error(fault)
    return options


def usage_fault(options: argparse.Namespace) -> str:
    """A sentence about options that do not go together; empty where they do."""
    command, runs, images = chosen_command(options, TAKES), options.run or [], options.images_per_class
    if not (runs or options.checkpoint or options.compare):
        return "one of --run FOLDER, --checkpoint FOLDER and --compare FOLDER ... is needed"
    if options.latex and options.markdown:
        return "--latex and --markdown: one of them"
    if command in ONE_RUN and len(runs) + bool(options.checkpoint) != 1:
        return f"--{command} looks at one --run FOLDER"
    if images is not None and images < 2:
        return f"--images-per-class {images}: at least 2, half of them test the probes"
    return refused_options(options, TAKES, "--run")


def way_out(name: str, values: list[str]) -> str:
    """Advice for an argument that does not exist, with the folder to test where it is known."""
    folder = next((shlex.quote(value) for value in values if Path(value).is_dir()), "FOLDER")
    return (
        f"a run is tested with python eval.py --run {folder}, a task's model with python eval.py "
        f"--checkpoint {folder}/checkpoints/task_00; what it is made with is in its config.json"
    )


# ----------------------------------------------------------------------------------------------------------
# Answers


def answer(options: argparse.Namespace) -> Iterable[str]:
    """The output of the chosen command, as lines of text."""
    command, folder = chosen_command(options, TAKES), next(iter(run_folders(options)), None)
    if command == "predict":
        from models.saved.prediction import show_predictions

        return show_predictions(folder, options.checkpoint, options.predict, options.top or 1, options.out)
    if command == "export":
        from models.saved.export import export_run

        return export_run(folder, options.checkpoint, options.export, options.out)
    from models.saved import inspection  # which imports what draws figures

    match command:
        case "analyse":
            return inspection.analyse_run(folder, options.analyse, options.images_per_class)
        case "report":
            return inspection.draw_again(folder)
        case "compare":
            form = "latex" if options.latex else "markdown" if options.markdown else "terminal"
            return inspection.show_comparison(options.compare, options.baseline, form, options.out)
        case "test":
            return inspection.show_test(options.run)
        case "checkpoint":
            return inspection.show_checkpoint(options.checkpoint)
    if len(options.run) > 1:
        return inspection.show_seeds(options.run)
    return inspection.show_run(folder, test=not options.recorded)


def run_folders(options: argparse.Namespace) -> list[Path]:
    """The run folders that --run or --checkpoint names. UserError: the checkpoint lies in no run folder."""
    from models.saved.files import run_folder_of
    from utils.runs.folder import CONFIG

    if not options.checkpoint:
        return options.run or []
    folder = run_folder_of(options.checkpoint)
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{options.checkpoint} is no checkpoint in a run folder, such as FOLDER/checkpoints/task_00; a "
            "run is tested with --run FOLDER"
        )
    return [folder]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 a mistake to mend."""
    prepare_console()

    def show() -> None:
        options = parse(arguments)
        attach_console(goes_on=False)
        with abrupt_interrupts():
            from models.saved.files import read_config

            for folder in run_folders(options):
                read_config(folder)  # before PyTorch is imported, so that a mistyped path is answered at once
            for folder in options.compare or []:
                if folder.is_file():
                    raise UserError(
                        f"{folder} is a file: give folders, those of runs or folders that hold some"
                    )
                if not folder.is_dir():
                    raise UserError(f"{folder} holds no run: there is no such folder; give those of runs")
            import_networks()
            from utils.training.device import keep_freed_memory

            keep_freed_memory()
        for line in answer(options):
            print(line)

    return exit_code(show, go_on=AGAIN)


if __name__ == "__main__":
    sys.exit(main())
