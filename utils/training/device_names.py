"""Names of devices as a config may say them; what is there on this machine, `device.py` finds out.

check_device_name("cuda:1")     # UserError for "cudda"
"""

import re

from utils.errors import UserError

LISTED = re.compile("-1|[0-9]{1,4}")
NAME = re.compile(f"auto|cpu|mps|cuda(:[0-9]{{1,4}})?|{LISTED.pattern}", re.IGNORECASE)
DEVICES = 'allowed: "auto", "cpu", "mps", "cuda", "cuda:N", or a published list such as ["0"] or ["-1"]'


def may_be_absent(spec: str | int | list[str | int]) -> bool:
    """Whether a device was asked for that not every machine has; published lists fall back to the CPU."""
    return str(spec).lower().startswith(("cuda", "mps"))


def check_device_name(spec: str | int | list[str | int]) -> None:
    """Raises UserError for what no device is called, wherever the run is to be."""
    known = LISTED if isinstance(spec, list) else NAME
    names = [str(item) for item in (spec if isinstance(spec, list) else [spec])]
    if not names or not all(map(known.fullmatch, names)):
        raise UserError(f"device = {spec!r} is unknown; {DEVICES}")
