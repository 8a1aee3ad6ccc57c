"""Command that lists and empties the cache: stored activations, and records of checked image files.

python -m utils.cache                     lists what is in cache/
python -m utils.cache --clear             removes it; the next run computes again what it needs
python -m utils.cache --root FOLDER       another cache_root
"""

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path

from utils.cache.file_memo import IMAGES, memo_files
from utils.cache.groups import ABOUT, MARKER, UNFINISHED, groups_in, last_use, remove_group
from utils.command_line import given_path
from utils.console import prepare_console
from utils.errors import AGAIN, UserError, exit_code
from utils.wording import counted


def listing(root: Path) -> list[str]:
    """Lines that say what a cache holds, the group used last first."""
    groups, records = groups_in(root), sum(memo_files(root / IMAGES).values())
    if not groups and not records:
        return [f"nothing is in {root}"]
    width = max(map(len, ["group", IMAGES, *groups]))
    lines = [f"{'group':{width}}  {'MB':>10}  files  {'last used':16}  about"]
    for group in sorted(groups, key=lambda name: -last_use(root / name)):
        files, about = groups[group], ""
        with suppress(FileNotFoundError):
            about = (root / group / ABOUT).read_text(encoding="utf-8", errors="replace")
        size, count = sum(files.values()) / 1e6, len(files.keys() - {ABOUT})
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(last_use(root / group)))
        lines.append(
            f"{group:{width}}  {size:10.1f}  {count:5}  {used}  {' '.join(about.split())[:70]}".rstrip()
        )
    if records:
        lines.append(f"{IMAGES:{width}}  {records / 1e6:10.1f}  records of checked image files")
    total = records + sum(sum(files.values()) for files in groups.values())
    return [*lines, f"total: {total / 1e6:.1f} MB in {counted(len(groups), 'group')}"]


def clear(root: Path) -> list[str]:
    """Remove all that a cache holds; says what that freed.

    Raises UserError: it is another folder, or groups of it cannot be removed.
    """
    records = memo_files(root / IMAGES)
    ours = (root / MARKER).is_file() or bool(records)
    if root.exists() and not ours and (not root.is_dir() or any(root.iterdir())):
        raise UserError(
            f"{root} is not a cache, it holds no file {MARKER}: give a cache's folder; nothing was removed"
        )
    groups, unfinished = groups_in(root), root / UNFINISHED  # which a killed process has left
    loose = records | ({unfinished: unfinished.stat().st_size} if unfinished.is_file() else {})
    if not groups and not loose:
        return [f"nothing is in {root}"]
    freed = sum(remove_group(root / group) for group in groups) + sum(loose.values())
    for path in loose:
        path.unlink(missing_ok=True)
    if left := groups_in(root).keys() & groups.keys():
        raise UserError(
            f"{root} still has {counted(len(left), 'group')}, such as {min(left)}: files cannot be removed, "
            f"or a run writes them; change their permissions, or wait for its end, then {AGAIN}"
        )
    return [f"{counted(len(groups) + bool(records), 'group')} removed from {root}: {freed} bytes freed"]


def main(arguments: list[str] | None = None) -> int:
    """List or empty a cache; the exit code: 0 done, 2 a mistake to mend."""
    prepare_console()
    parser = argparse.ArgumentParser("python -m utils.cache", description="List or empty a cache.")
    folder = {"type": given_path, "default": Path("cache"), "metavar": "FOLDER"}
    parser.add_argument("--root", **folder, help="default: %(default)s")
    parser.add_argument("--clear", action="store_true", help="remove everything that the cache holds")
    options = parser.parse_args(arguments)
    work = clear if options.clear else listing
    return exit_code(lambda: print(*work(options.root), sep="\n"), go_on=AGAIN)


if __name__ == "__main__":
    sys.exit(main())
