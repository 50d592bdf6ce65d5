"""Teacher in, Arch-Net out: `python train.py task=... teacher=... quant=... hardware=...`.

The same as `archnet train`. Every key is in ``conf/``; `--cfg job` prints what a command composes
to, `-m` sweeps.
"""

import sys

from archnet.commands.train import start


def main() -> int:
    """Run what the command line says; the exit code."""
    return start(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
