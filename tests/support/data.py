"""Where the real data is, and the colours of the pictures that tests make."""

import os
from pathlib import Path

from tests.support.processes import ROOT

DATA = Path(os.environ.get("LDM_TEST_DATA", ROOT.parent / "shared" / "data"))
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 210)}
