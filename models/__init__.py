"""The learning methods: one file each, and the one dict that names them. A new method is one file and one line here."""

from models.base import Learner
from models.sema import SEMA

LEARNERS: dict[str, type[Learner]] = {
    "sema": SEMA,
}
SCHEMAS = {name: learner.Config for name, learner in LEARNERS.items()}
