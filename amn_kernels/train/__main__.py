"""`python -m amn_kernels.train ...` is `amn-kernels train ...`, for torchrun."""

import sys

from amn_kernels.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
