"""Numbers behind exps/RESULTS.md: kept run by run in exps/evidence/results/, and the tables made from them.

python -m docs.results                                    every table, as the documents hold them
python -m docs.results full_cifar --against RanPAC           one, with differences from another cell
python -m docs.results --keep logs/sweeps/full_cifar         adds a sweep's finished runs to its file
"""

import argparse
import math
from pathlib import Path

import pandas as pd

from utils.files import read_json
from utils.reports.stats import Estimate, mean_over_seeds, paired_difference
from utils.runs.folder import CONFIG, RESULT

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "exps/evidence/results"
BASELINES = {"grocery": "RanPAC"}  # sweep -> cell that its table compares with
METRICS = {"final": "A_N", "average": "average", "forgetting": "forgetting", "plasticity": "plasticity"}
PARAMETERS = ("trained", "stored")


def row_of(folder: Path) -> dict[str, object]:
    """Numbers of a finished run, in percent, points and minutes, and what it ran on."""
    result, manifest = read_json(folder / RESULT), read_json(folder / "manifest.json")
    held_out = "validation_final" in result["metrics"]
    metrics = {key: result["metrics"].get(f"validation_{key}" if held_out else key) for key in METRICS}
    session = manifest["sessions"][-1]
    return {
        "seed": manifest["seed"],
        **{key: value if value is None else round(value, 4) for key, value in metrics.items()},
        "expansions": result["metrics"].get("expansions"),
        **{key: result["parameters"].get(key) for key in PARAMETERS},
        "minutes": round(result["cost"]["seconds"] / 60, 1),
        "images": "held-out" if held_out else "test",
        "precision": session["precision"],
        "commit": session["commit"][:7],
    }


def keep(sweep: Path) -> Path:
    """Add the finished runs in a sweep's folder to the file of its name; they replace kept ones like them."""
    cells = {cell["config"]["prefix"]: cell["name"] for cell in read_json(sweep / "sweep.json")["cells"]}
    folders = sorted(path.parent for path in (sweep / "runs").rglob(RESULT))
    rows = [{"cell": cells[read_json(folder / CONFIG)["prefix"]], **row_of(folder)} for folder in folders]
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
    head = ["cell", "n", f"{held_out}A_N", *list(METRICS.values())[1:], f"A_N against {against}"]
    head += [f"forgetting against {against}", "trained (k)", "stored (k)", "minutes"]
    rows = []
    for cell in runs["final"].groupby(level="cell").mean().sort_values(ascending=False).index:
        own = runs.loc[cell]
        metrics = METRICS if own["forgetting"].any() else ["final"]  # of one task there is nothing else
        means = [shown(mean_over_seeds(own[key].dropna().tolist())) for key in metrics]
        means += [""] * (len(METRICS) - len(means))
        differences = [difference(runs, cell, against, key) for key in ("final", "forgetting")]
        parameters = [f"{own[key].mean() / 1000:,.1f}" for key in PARAMETERS]
        rows.append([cell, len(own), *means, *differences, *parameters, f"{own['minutes'].mean():.1f}"])
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def difference(runs: pd.DataFrame, cell: str, against: str, metric: str) -> str:
    """Mean difference of two cells over the seeds that both have in one precision, with its interval.

    Bold where the interval excludes zero.
    """
    if cell == against:
        return ""
    pairs = runs.loc[cell].join(runs.loc[against], lsuffix=" ours", rsuffix=" theirs", how="inner")
    pairs = pairs[pairs["precision ours"] == pairs["precision theirs"]]
    sides = {side: pairs[f"{metric} {side}"] for side in ("ours", "theirs")}
    found = paired_difference(pd.DataFrame(sides).dropna())
    if math.isnan(found.low):
        return "" if found.n == 0 else f"{found.mean:+.2f}"
    text = f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def shown(values: Estimate) -> str:
    """Mean ± std, the mean alone of one seed, nothing without one."""
    if not values.n:
        return ""
    return f"{values.mean:.2f}" + (f" ± {values.std:.2f}" if values.n > 1 else "")


def main() -> None:
    """Keep runs, or print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", nargs="?", choices=BASELINES, help="the sweep whose table is printed")
    parser.add_argument("--against", metavar="CELL", help="the cell that the others are compared with")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="of a sweep, whose finished runs are kept"
    )
    options = parser.parse_args()
    if options.keep:
        print(keep(options.keep))
        return
    for sweep in [options.sweep] if options.sweep else BASELINES:
        print(f"{sweep}\n\n{table(sweep, options.against or BASELINES[sweep])}\n")


if __name__ == "__main__":
    main()
