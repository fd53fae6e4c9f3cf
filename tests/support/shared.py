"""Real data and the released trainer's figures, which are not part of the repository; tests of them are skipped
without.

$AMOPO_SHARED_DATA names the folder of the data; without it, `../shared/data` beside the checkout.
"""

import os
from pathlib import Path

SHARED_DATA = Path(os.environ.get("AMOPO_SHARED_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
GOLDEN = SHARED_DATA.parent / "golden" / "reference_amopo.json"
