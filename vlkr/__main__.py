import sys

from vlkr.cli import run

sys.exit(run())
