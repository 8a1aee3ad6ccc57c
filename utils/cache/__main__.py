"""What the cache holds, and emptying it: stored activations and decoded images.

python -m utils.cache                     lists what is in cache/
python -m utils.cache --clear             removes it; the next run computes again what it needs
python -m utils.cache --root FOLDER       another cache_root
"""

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path

from utils.cache.decoded_images import IMAGES, decoded_in, remove_decoded
from utils.cache.file_memo import DATABASE, memo_bytes, remove_memo
from utils.cache.tensor_cache import ABOUT, MARKER, groups_in, last_use, remove_group
from utils.command_line import given_path
from utils.console import prepare_console
from utils.errors import AGAIN, UserError, exit_code


def listing(root: Path) -> list[str]:
    """Lines that say what a cache holds, the group used last first, then decoded images."""
    groups, decoded, memo = groups_in(root), decoded_in(root / IMAGES), memo_bytes(root / IMAGES)
    if not groups and not decoded and not memo:
        return [f"nothing is in {root}"]
    width = max([len("group"), *map(len, groups), *(len(f"{IMAGES}/{store.name}") for store in decoded)])
    lines = [f"{'group':{width}}  {'MB':>10}  chunks  {'last used':16}  about"]
    for group in sorted(groups, key=lambda name: -last_use(root / name)):
        files = groups[group]
        chunks = sum(name.endswith(".npy") for name in files)
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(last_use(root / group)))
        about = ""
        with suppress(FileNotFoundError):
            about = " ".join((root / group / ABOUT).read_text(encoding="utf-8", errors="replace").split())[
                :70
            ]
        lines.append(
            f"{group:{width}}  {sum(files.values()) / 1e6:10.1f}  {chunks:6}  {used}  {about}".rstrip()
        )
    lines += [
        f"{f'{IMAGES}/{store.name}':{width}}  {size / 1e6:10.1f}  decoded images"
        for store, size in decoded.items()
    ]
    if memo:
        lines.append(f"{f'{IMAGES}/{DATABASE}':{width}}  {memo / 1e6:10.1f}  hashes of image files")
    total = sum(sum(files.values()) for files in groups.values()) + sum(decoded.values()) + memo
    return [*lines, f"total: {total / 1e6:.1f} MB in {len(groups) + len(decoded)} groups"]


def clear(root: Path) -> list[str]:
    """Remove all that a cache holds; says what that freed. Raises UserError where `root` is another folder."""
    decoded = decoded_in(root / IMAGES)
    memo = memo_bytes(root / IMAGES)
    ours = (root / MARKER).is_file() or bool(decoded) or bool(memo)
    if root.exists() and not ours and (not root.is_dir() or any(root.iterdir())):
        raise UserError(
            f"{root} is not a cache, it holds no file {MARKER}: give a cache's folder; nothing was removed"
        )
    groups = groups_in(root)
    freed = (
        sum(remove_group(root / group) for group in groups)
        + sum(decoded.values())
        + remove_memo(root / IMAGES)
    )
    for store in decoded:
        remove_decoded(store)
    removed = len(groups) + len(decoded) + bool(memo)
    return (
        [f"{removed} groups removed from {root}: {freed} bytes freed"]
        if removed
        else [f"nothing is in {root}"]
    )


def main(arguments: list[str] | None = None) -> int:
    """List or empty a cache; the exit code: 0 done, 2 a mistake to mend."""
    prepare_console()
    parser = argparse.ArgumentParser(
        prog="python -m utils.cache", description="What a cache holds; empty it."
    )
    parser.add_argument(
        "--root", type=given_path, default=Path("cache"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--clear", action="store_true", help="remove everything that the cache holds")
    options = parser.parse_args(arguments)
    work = clear if options.clear else listing
    return exit_code(lambda: print("\n".join(work(options.root))), go_on=AGAIN)


if __name__ == "__main__":
    sys.exit(main())
