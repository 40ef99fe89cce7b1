"""Runs the `sret` command as `python -m sret.cli`, which is how torchrun starts it."""

import sys

from sret.cli.main import main

sys.exit(main())
