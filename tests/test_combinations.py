"""The compiled op over combinations of options."""

import pytest
from combinations import check, label, sample

COUNT = 400


@pytest.mark.parametrize("case", sample(COUNT), ids=label)
def test_combination(case):
    check(case, "cpu")
