"""The script's command line with empty figures, for tests that start it many times."""

import sys

import pytest

from conftest import leave_out_figures, rnn

if __name__ == "__main__":
    leave_out_figures(pytest.MonkeyPatch())
    sys.exit(rnn.main())
