"""Numbers behind exps/RESULTS.md, kept run by run in exps/evidence/results/, and tables made from them.

python -m docs.results                                       every table, as it stands in the documents
python -m docs.results answer                                the one of exps/RESULTS.md
python -m docs.results grocery --against "nested mean"       one, with differences from another cell
python -m docs.results --keep logs/sweeps/grocery            adds a sweep's finished runs to its file
"""

import argparse
import math
import sys
from pathlib import Path

import pandas as pd

from models.saved.files import read_config
from utils.errors import UserError, exit_code
from utils.files import read_json
from utils.metric_catalogue import CLASS_INCREMENTAL, by_key
from utils.reports.renderings import markdown_table
from utils.reports.stats import mean_over_seeds, paired_difference
from utils.reports.tables import Entry, Table
from utils.runs.folder import MANIFEST, RESULT, SWEEP, folder_of
from utils.runs.metrics import numbers_of

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "exps/evidence/results"
BASELINES = {  # what tables compare with
    **dict.fromkeys(("full_cifar", "blocks_cifar", "grocery"), "RanPAC"),
    "ablation_cifar": "SEMA, 32 hidden units",
    "schedule_cifar": "matched adapter, 10 epochs",
}
ANSWER = {  # the table of exps/RESULTS.md: data -> sweeps with its runs, columns
    "500 images": (("full_cifar",), ("final", "difference", "forgetting")),
    "100 images": (("blocks_cifar", "ablation_cifar"), ("difference",)),
    "Grocery": (("grocery",), ("final", "difference", "forgetting")),
}
NAMES = {  # of cells that are the same method under another name -> name in Grocery's sweep
    "matched adapter, blocks 9-11": "matched adapter",
    "carried, blocks 9-11": "carried",
    "nested mean, blocks 9-11": "nested mean",
    "joint, blocks 9-11": "joint, RanPAC head",
    "SEMA, 32 hidden units": "SEMA",
    "Nested LoRA, 16 + 16": "Nested LoRA",
}
SPECS = by_key(CLASS_INCREMENTAL)
METRICS = ("final", "average", "forgetting", "plasticity")
PARAMETERS = ("trained", "stored")


def row_of(folder: Path) -> dict[str, object]:
    """Numbers of a finished run, in percent, points and minutes, with evaluated images, precision, commit."""
    numbers, manifest = numbers_of(read_json(folder / RESULT)), read_json(folder / MANIFEST)
    held_out, session = "validation_final" in numbers, manifest["sessions"][-1]
    metrics = {key: numbers.get(f"validation_{key}" if held_out else key) for key in METRICS}
    return {
        "seed": manifest["seed"],
        **{key: value if value is None else round(value, 4) for key, value in metrics.items()},
        "expansions": numbers.get("expansions"),
        **{key: numbers[f"parameters_{key}"] for key in PARAMETERS},
        "minutes": round(numbers["seconds"] / 60, 1),
        "images": "held-out" if held_out else "test",
        "precision": session["precision"],
        "commit": (session["commit"] or "")[:7],  # "" outside a git checkout
    }


def keep(sweep: Path) -> Path:
    """Add the finished runs of a sweep's folder to the file of its name, in place of the same cell and seed.

    Runs of cells that the sweep no longer has stay out, and runs beside its own: repeated by hand, replaced.
    UserError: it is no sweep's folder, holds no finished run, or one of another version.
    """
    cells = {cell["config"]["prefix"]: cell["name"] for cell in read_json(sweep / SWEEP)["cells"]}
    folders = sorted(path.parent for path in (sweep / "runs").rglob(RESULT))
    configs = {folder: read_config(folder) for folder in folders}
    rows = [
        {"cell": cells[config.prefix], **row_of(folder)}
        for folder, config in configs.items()
        if config.prefix in cells and folder.name == folder_of(config, config.seed).name
    ]
    if not rows:
        raise UserError(f"{sweep} holds no finished run to keep: run the sweep first")
    path = KEPT / f"{sweep.name}.csv"
    earlier = [pd.read_csv(path)] if path.is_file() else []
    runs = pd.concat([*earlier, pd.DataFrame(rows)]).drop_duplicates(["cell", "seed"], keep="last")
    order = {name: place for place, name in enumerate(cells.values())}
    runs = runs.sort_values("seed").sort_values("cell", key=lambda names: names.map(order), kind="stable")
    path.parent.mkdir(exist_ok=True)
    runs.to_csv(path, index=False, lineterminator="\n")
    return path


def table(sweep: str, against: str) -> str:
    """Markdown table of a sweep's kept runs, best cell first: means ± std, paired differences, intervals."""
    runs = pd.read_csv(KEPT / f"{sweep}.csv").set_index(["cell", "seed"])
    held_out = "validation " if "held-out" in set(runs["images"]) else ""
    names = [SPECS[key].name for key in METRICS]
    head = ["cell", "n", held_out + names[0], *names[1:], f"A_N against {against}"]
    head += [f"forgetting against {against}", "trained (k)", "stored (k)", "minutes"]
    rows = []
    for cell in runs["final"].groupby(level="cell").mean().sort_values(ascending=False).index:
        own = runs.loc[cell]
        metrics = METRICS if own["forgetting"].any() else METRICS[:1]  # all that one task has
        estimates = {key: mean_over_seeds(own[key].tolist()) for key in metrics}
        means = [SPECS[key].text(found.mean, found.std) for key, found in estimates.items()]
        means += [""] * (len(METRICS) - len(means))
        differences = [difference(runs, cell, against, key) for key in ("final", "forgetting")]
        costs = [SPECS[f"parameters_{key}"].text(own[key].mean()) for key in PARAMETERS]
        costs.append(f"{own['minutes'].mean():.1f}")
        rows.append([*map(Entry, [cell, str(len(own)), *means]), *differences, *map(Entry, costs)])
    return markdown_table(Table("", head, rows))


def answer() -> str:
    """Markdown table of the methods of Grocery's sweep on all data, best first; empty where not run."""
    data = {
        name: pd.concat(pd.read_csv(KEPT / f"{sweep}.csv") for sweep in sweeps)
        .replace({"cell": NAMES})
        .set_index(["cell", "seed"])
        for name, (sweeps, _) in ANSWER.items()
    }
    titles = {"final": "A_N", "difference": "against RanPAC", "forgetting": "forgetting"}
    columns = [(name, column) for name, (_, columns) in ANSWER.items() for column in columns]
    cells = data["Grocery"]["final"].groupby(level="cell").mean().sort_values(ascending=False).index
    rows = []
    for cell in cells:
        row = [Entry(cell)]
        for name, column in columns:
            runs = data[name]
            if cell not in runs.index:
                row.append(Entry(""))
            elif column == "difference":
                row.append(difference(runs, cell, "RanPAC", "final"))
            else:
                found = mean_over_seeds(runs.loc[cell, column].dropna().tolist())
                row.append(Entry(SPECS[column].text(found.mean, found.std)))
        rows.append(row)
    head = ["method", *(f"{titles[column]}, {name}" for name, column in columns)]
    return markdown_table(Table("", head, rows))


def difference(runs: pd.DataFrame, cell: str, against: str, metric: str) -> Entry:
    """Mean difference of two cells over seeds that both ran in the same precision, with its interval.

    Strong where the interval excludes zero.
    """
    if cell == against:
        return Entry("")
    sides = {"ours": runs.loc[cell], "theirs": runs.loc[against]}
    pairs = pd.concat(sides, axis=1, join="inner").swaplevel(axis=1)  # metric -> side
    alike = pairs["precision", "ours"] == pairs["precision", "theirs"]
    found = paired_difference(pairs.loc[alike, metric].astype(float).dropna())
    if not found.n:
        return Entry("")
    text = SPECS[metric].difference_text(found.mean)
    if math.isnan(found.low):
        return Entry(text)
    interval = SPECS[metric].difference_text(found.low, found.high)
    return Entry(f"{text} ({interval})", strong=found.low > 0 or found.high < 0)


def main() -> None:
    """Keep the finished runs of a sweep, or print tables."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    tables = [*BASELINES, "answer"]
    parser.add_argument("sweep", nargs="?", choices=tables, help="the sweep whose table is printed")
    parser.add_argument("--against", metavar="CELL", help="the cell that the others are compared with")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="a sweep's folder: keep its finished runs"
    )
    options = parser.parse_args()
    if options.keep:
        print(keep(options.keep))
        return
    if options.against and options.sweep not in BASELINES:
        parser.error(f"--against needs one sweep: {', '.join(BASELINES)}")
    if options.against:
        cells = pd.read_csv(KEPT / f"{options.sweep}.csv")["cell"].unique()
        if options.against not in cells:
            parser.error(f"{options.sweep} has no cell {options.against!r}; allowed: {', '.join(cells)}")
    for name in [options.sweep] if options.sweep else tables:
        text = answer() if name == "answer" else table(name, options.against or BASELINES[name])
        print(f"{name}\n\n{text}\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
