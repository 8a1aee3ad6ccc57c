"""What a sweep's fork server imports first: the networks, and the code's hash and commit as they are now."""

from utils.training.late_compiler import import_networks

import_networks()

from utils.runs.manifest import code_sha256, commit  # noqa: E402  it imports timm, too

code_sha256()
commit()
