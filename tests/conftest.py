"""What every test needs: the repository root on the path, and quiet, reproducible torch."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden numbers."""
    return ROOT / "tests" / "golden"
