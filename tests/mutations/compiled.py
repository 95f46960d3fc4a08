"""`python -m tests.mutations.compiled NAME ...`: the check of the compiled kernels, of CUDA sources and of "triton".

Exit status 1 where it complains.
"""

import sys

from ..kernels_check import cuda_kernels, triton_kernels


def main(names: set[str]) -> int:
    reports, sources = [], names - {"triton"}
    for backend, wanted in ((cuda_kernels, sources), (triton_kernels, names - sources)):
        if wanted and (reason := backend.why_unavailable()):
            raise RuntimeError(reason)
    if sources:
        reports += cuda_kernels.reports(reduced=False, sources=sources)
    if "triton" in names:
        reports += triton_kernels.reports(reduced=True)
    complaints = [complaint for report in reports for complaint in report.complaints()]
    print(*complaints, sep="\n")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(set(sys.argv[1:])))
