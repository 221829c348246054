"""`python -m cmr_fast` is the command `cmr-fast`."""

import sys

from cmr_fast.cli import main

sys.exit(main())
