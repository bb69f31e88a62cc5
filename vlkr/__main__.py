import sys

from vlkr.cli import main

sys.exit(main())
