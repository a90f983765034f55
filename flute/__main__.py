"""`python -m flute`: the command line, as `flute`."""

import sys

from flute.cli import main

sys.exit(main())
