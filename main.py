"""The command line.

python main.py                                                   the quickstart: exps/quickstart.json
python main.py --config exps/nested_lora_cifar.json              any other experiment
python main.py --config X.json --set nested_lora_rank=8 --set seed=[1,2,3]
python main.py --resume logs/sema/mnist_5k/0/2/quickstart_1993_vit_small_patch14_reg4_dinov2
torchrun --nproc_per_node=2 main.py --config X.json              several devices, one log
"""

import argparse
import logging
import os
import sys
from pathlib import Path

DEFAULT = "exps/quickstart.json"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description="Class-incremental learning with adapters on two time scales.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__,
    )
    parser.add_argument("--config", metavar="FILE", help=f"JSON experiment to run (default: {DEFAULT})")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change one key; may be repeated",
    )
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="continue the run in this folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run folder of the same name")
    options = parser.parse_args(arguments)
    if options.resume and (options.config or options.overrides or options.overwrite):
        parser.error("--resume continues a run exactly as it was: it takes no --config, --set or --overwrite")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; the exit code: 0 done, 2 a mistake to mend, 130 stopped and saved."""
    options = parse(arguments)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, if it did
    if not first:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    # Imported after parsing, so that --help and usage errors answer at once.
    from models import SCHEMAS
    from models.base import Interrupted
    from trainer import joined_world, read_config, resume, train
    from utils.config import load_config
    from utils.errors import UserError
    from utils.run_log import attach_console
    from utils.toolkit import keep_freed_memory

    if first:
        attach_console()
    else:
        logging.getLogger("nested_lora").addHandler(logging.NullHandler())  # the first process says it
    keep_freed_memory()
    together = False
    try:
        if options.resume:
            config, notes = read_config(options.resume), []
        else:
            loaded = load_config(options.config or DEFAULT, options.overrides, SCHEMAS)
            config, notes = loaded.config, loaded.notes
        with joined_world(config) as world:
            together = True
            if options.resume:
                resume(options.resume, world)
            else:
                train(config, overwrite=options.overwrite, notes=notes, world=world)
    except UserError as error:
        if first or together:  # a mistake that all processes meet is told once
            print(error, file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
