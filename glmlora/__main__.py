"""`python -m glmlora` is the command `glmlora`."""

import sys

from glmlora.cli import main

sys.exit(main())
