"""The script's command line with empty figures, for tests that start it many times."""

import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytorch_rnn_models as rnn  # noqa: E402

if __name__ == "__main__":
    for name in [name for name in dir(rnn) if name.endswith("_figure")]:
        setattr(rnn, name, lambda *_: Figure(layout="constrained"))
    sys.exit(rnn.main())
