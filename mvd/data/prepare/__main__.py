"""`python -m mvd.data.prepare`; see mvd.data.prepare.prepare."""

import sys

from mvd.data.prepare.prepare import main

if __name__ == "__main__":  # worker processes import this module too
    sys.exit(main())
