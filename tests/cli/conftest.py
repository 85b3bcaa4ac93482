import os
import tempfile
from pathlib import Path

import pytest

NOBODY = 65534


@pytest.fixture
def unprivileged():
    """A folder that this process may neither read nor write while the test runs, with a config.json in it that it may not read."""
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text("{}")
    (folder / "config.json").chmod(0)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.setresuid(NOBODY, NOBODY, 0)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("permissions")
        yield folder
    finally:
        if root:
            os.setresuid(0, 0, 0)
        folder.chmod(0o755)
        (folder / "config.json").unlink()
        folder.rmdir()
