"""`python -m sret.cli`, as torchrun starts it."""

import sys

from sret.cli.main import main

sys.exit(main())
