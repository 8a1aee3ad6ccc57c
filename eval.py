"""Look at a run again: figures from its files, accuracy from its checkpoints, nothing trained.

python eval.py --run FOLDER                          tables, figures, and the last checkpoint tested again
python eval.py --run FOLDER --recorded               tables and figures of what the run wrote, in seconds
python eval.py --run FOLDER FOLDER ...               several seeds: mean ± std of those that are finished
python eval.py --checkpoint FOLDER/checkpoints/task_04   the model as that task left it
python eval.py --run FOLDER --analyse cka grassmann probes   what its representations did, task after task
python eval.py --run FOLDER --analyse cka grassmann probes units samples   the same of a run on grids, at its end

FOLDER is a run's, such as logs/sema/mnist_5k/0/2/quickstart_1993_vit_small_patch14_reg4_dinov2.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.command_line import given_path, parse_or_advise
from utils.console import attach_console, prepare_console, progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from models.shared_subspace.analysis import GridMaterial
    from trainer import Learner, Parts
    from utils.analysis.representations import AnalysisInputs
    from utils.analysis.results import AnalysisResult
    from utils.config.schema import RunConfig

IMAGES_PER_CLASS = 20  # that an analysis looks at unless told


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
        help="a run folder: redraw its figures and test its last checkpoint; several: their mean and deviation",
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
        help="with --run: rebuild the network after every task; cka, grassmann, probes go to FOLDER/analysis; of a run "
        "on grids also units, samples",
    )
    parser.add_argument(
        "--images-per-class",
        type=int,
        metavar="N",
        help=f"with --analyse: test images of each class at most (default: {IMAGES_PER_CLASS})",
    )
    options = parse_or_advise(parser, arguments, way_out)
    if not options.run and not options.checkpoint:
        parser.error("one of --run FOLDER and --checkpoint FOLDER is needed")
    if options.recorded and options.checkpoint:
        parser.error("--recorded goes with --run")
    check_analysis_options(parser, options)
    return options


def way_out(name: str, values: list[str]) -> str:
    """What to write in place of an argument that there is not: the folder to test, where it is known."""
    folder = next((shlex.quote(value) for value in values if Path(value).is_dir()), "FOLDER")
    forms = "python eval.py --run FOLDER, a task's model with python eval.py --checkpoint FOLDER/checkpoints/task_00"
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
    from utils.errors import AGAIN, exit_code
    from utils.training.device import keep_freed_memory

    attach_console(goes_on=False)
    keep_freed_memory()
    return exit_code(lambda: show(options), go_on=AGAIN)


def show(options: argparse.Namespace) -> None:
    """What the command line asks for."""
    if options.analyse:
        analyse_run(options.run[0], options.analyse, options.images_per_class)
    elif options.run and len(options.run) > 1:
        show_seeds(options.run)
    elif options.run:
        show_run(options.run[0], test=not options.recorded)
    else:
        report_checkpoint(options.checkpoint)


def show_run(folder: Path, test: bool) -> None:
    """Recorded accuracy and figures of a run folder, then its last checkpoint tested."""
    from models import LEARNERS
    from trainer import CHECKPOINTS, read_config
    from utils.errors import UserError
    from utils.runs.checkpoint import latest_checkpoint
    from utils.runs.figures import draw_figures
    from utils.runs.folder import FolderInUse, FolderLock
    from utils.runs.run_log import read_accuracy_csv

    config = read_config(folder)  # refuses what is no run folder
    if (folder / "accuracy.csv").is_file():
        print("recorded accuracy (%), row: after task, column: on task")
        for t, row in enumerate(read_accuracy_csv(folder)):
            print(f"task {t:>3}  " + " ".join(f"{value:6.2f}" for value in row))
        print()
    lock = FolderLock(folder)
    try:
        with lock:
            for figure in draw_figures(folder, LEARNERS[config.model_name].figures):
                print(f"drew {figure}")
    except FolderInUse:
        print(f"drew no figures: {folder} is being written by {lock.holder}")
    if test:
        checkpoint = latest_checkpoint(folder / CHECKPOINTS)
        if checkpoint is None:
            raise UserError(
                f"{folder} has no checkpoint to test yet: let the run finish a task, or use --recorded"
            )
        print()
        report_checkpoint(checkpoint)


def show_seeds(folders: list[Path]) -> None:
    """Mean ± std over finished runs of one experiment with different seeds.

    Raises:
        UserError: no run is finished, or the runs differ in more than their seed.
    """
    from trainer import check_one_experiment, read_result
    from utils.errors import UserError
    from utils.runs.metrics import seeds_table

    finished = [folder for folder in folders if (folder / "result.json").is_file()]
    for folder in sorted(set(folders) - set(finished)):
        print(f"left out, no result.json: {folder}")
    if not finished:
        raise UserError("none of the folders holds a finished run (a result.json)")
    for note in check_one_experiment(finished):
        print(f"note: {note}")
    print(seeds_table([read_result(folder) for folder in finished]))


def analyse_run(folder: Path, names: list[str], images_per_class: int | None) -> None:
    """Run the named analyses on the networks that a finished run left, print and write what they find."""
    from trainer import read_config
    from utils.analysis.results import ANALYSIS, write_results
    from utils.errors import UserError
    from utils.runs.folder import FolderLock

    analyses, gather = analyses_of(read_config(folder))
    unknown = [name for name in names if name not in analyses]
    if unknown:
        raise UserError(
            f"--analyse {' '.join(unknown)}: no such analysis of this run; allowed: {', '.join(analyses)}"
        )
    checkpoints = task_checkpoints(folder)
    material = gather(folder, checkpoints, images_per_class)
    found = {name: analyses[name](material) for name in dict.fromkeys(names)}
    for findings in found.values():
        print(f"\n{findings.text}")
    print()
    with FolderLock(folder):
        for path in write_results(folder / ANALYSIS, found):
            print(f"wrote {path}")


def analyses_of(
    config: RunConfig,
) -> tuple[Mapping[str, Callable[[Any], AnalysisResult]], Callable[..., Any]]:
    """The analyses of a run by name, and what gathers their material from its folder and checkpoints."""
    from models.shared_subspace import analysis as grid_analysis
    from models.vit.config import ClassIncrementalConfig
    from utils.analysis import representations as analysis

    if isinstance(config, ClassIncrementalConfig):
        return analysis.ANALYSES, class_incremental_material
    return grid_analysis.ANALYSES, material_of_grids


def task_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint at the end of every task of a finished run.

    Raises:
        UserError: the run is unfinished, or a checkpoint is not there.
    """
    from models.vit.config import ClassIncrementalConfig
    from trainer import CHECKPOINTS, read_config
    from utils.errors import UserError
    from utils.runs.checkpoint import checkpoint_name
    from utils.runs.run_log import read_metrics

    config = read_config(folder)
    if not (folder / "result.json").is_file():
        raise UserError(
            f"{folder} is unfinished and cannot be analysed yet: go on with python main.py --resume "
            f"{shlex.quote(str(folder))}"
        )
    tasks = [event["task"] for event in read_metrics(folder) if event["event"] == "task"]
    if not tasks:
        raise UserError(
            f"{folder} has no task in its metrics.jsonl: the file is damaged, run the experiment again"
        )
    paths = [folder / CHECKPOINTS / checkpoint_name(task) for task in tasks]
    missing = [path.name for path in paths if not path.is_dir()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        kept, again = "all are needed", f"python main.py --config {shlex.quote(str(folder / 'config.json'))}"
        if isinstance(config, ClassIncrementalConfig):
            kept = kept if config.checkpoints == "all" else 'its config says checkpoints = "last"'
            again += " --set checkpoints=all"
        raise UserError(
            f"{folder} has no checkpoint of {', '.join(missing[:3])}{more} ({kept}): an analysis rebuilds the network "
            f"after every task; run it again with {again}"
        )
    return paths


def material_of_grids(folder: Path, checkpoints: list[Path], images_per_class: int | None) -> GridMaterial:
    """What there is to analyse of the network in the last checkpoint of a run on grids.

    Raises:
        UserError: the checkpoint is damaged or foreign, or images are to be chosen where there are none.
    """
    from utils.errors import UserError

    if images_per_class is not None:
        raise UserError(
            "--images-per-class: a run on grids has no images, its analyses draw new grids; leave it out"
        )
    return saved_learner(checkpoints[-1])[0].material()


def class_incremental_material(
    folder: Path, checkpoints: list[Path], images_per_class: int | None
) -> AnalysisInputs:
    """Class tokens of the same test images, and what branches write to, of the network in every checkpoint.

    Raises:
        UserError: a checkpoint is damaged or foreign, there are too few test images, the method has no blocks, or what
            they give is not finite.
    """
    import torch

    from trainer import assemble, load_run_checkpoint, read_config, read_result
    from utils.analysis.representations import AnalysisInputs, chosen_images
    from utils.runs.figures import describe
    from utils.training.device import require_finite

    config = read_config(folder)
    parts = assemble(config, config.seed[0])
    images = chosen_images(parts.data, parts.seed, images_per_class or IMAGES_PER_CLASS)
    batches = [images[i : i + config.eval_batch_size] for i in range(0, len(images), config.eval_batch_size)]
    tokens, spaces = [], []
    with progress(total=len(checkpoints) * len(batches), desc="Class tokens", unit="batch") as bar:
        for checkpoint in checkpoints:
            fresh = replace(parts, backbone=copy.deepcopy(parts.backbone))
            learner = rebuilt(checkpoint, load_run_checkpoint(checkpoint), fresh)
            found = []
            for batch in batches:
                views = parts.data.views(batch, "test", "test", None, learner.device)
                what = f"the class tokens of {checkpoint.name}"
                found.append(require_finite(learner.class_tokens(views).cpu(), what, config.precision))
                bar.update()
            tokens.append(torch.cat(found, dim=1))
            spaces.append(learner.branch_spaces())
    about = describe(config.model_dump(), read_result(folder))
    labels = parts.data.targets(images, "test")
    return AnalysisInputs(
        torch.stack(tokens), labels, spaces, parts.seed, f"{about} · {len(images)} test images"
    )


def rebuilt(checkpoint: Path, saved: tuple[dict[str, Tensor], dict[str, Any]], parts: Parts) -> Learner:
    """The learner that was saved, strictly; its network takes the parts' backbone for its own."""
    from trainer import check_config, check_identity, fitting, make_learner

    tensors, state = saved
    check_config(checkpoint, state, parts)
    check_identity(checkpoint, state, parts)
    learner = make_learner(parts, log=None)
    with fitting(checkpoint):
        learner.load_state(state["learner"], tensors)
    return learner


def saved_learner(checkpoint: Path) -> tuple[Learner, Parts]:
    """The learner that a checkpoint holds, and what its run is made from."""
    from trainer import assemble, load_run_checkpoint, read_config

    saved = load_run_checkpoint(checkpoint)
    config = read_config(checkpoint.parent.parent)
    parts = assemble(config, config.seed[0])
    return rebuilt(checkpoint, saved, parts), parts


def report_checkpoint(checkpoint: Path) -> None:
    """Rebuild the model a checkpoint holds, strictly, test it, and print how it did."""
    learner, parts = saved_learner(checkpoint)
    print(f"{checkpoint}: {learner.Scores.describe(learner.Scores.measure(learner), parts)}")


if __name__ == "__main__":
    sys.exit(main())
