"""Errors in the algorithm in Python: which rows and keys meet, and what is kept of it."""

from .mutation import Mutation

_SAME = ("test_algorithm.py::test_the_same_over_the_compiled_primitives",)
_CHUNKS = ("test_algorithm.py::test_the_same_in_chunks_of_rows",)
_WAITS = ("test_triton_sync.py::test_every_option",)
_TRITON = ("test_algorithm.py::test_the_same_over_triton_primitives",)
_FAR = ("test_triton.py::test_logits_far_above_the_range_of_exp",)

MUTATIONS = (
    Mutation(
        "extra negatives weigh 1", "algorithm.py", "        extra_rows[Row.WEIGHT].copy_(1 / total)\n", "",
        _SAME, _TRITON,
    ),
    Mutation(
        "columns are not mirrored", "algorithm.py", "prim.mirror_columns(saved.columns, mirrored)",
        "mirrored.copy_(saved.columns)", _SAME, _TRITON,
    ),
    Mutation(
        "a device value is read on the host", "algorithm.py", "weight.copy_(counts / total)",
        "weight.copy_(counts / total.item())", _WAITS, _TRITON,
    ),
    Mutation(
        "attention of earlier blocks is not rescaled", "infonce.py",
        "out.mul_(rescale.view(self.groups, -1, 1))", "pass", _SAME, _FAR,
    ),
    Mutation(
        "later blocks overwrite", "infonce.py", "weights, keys.keys, number > 0 or first > 0)",
        "weights, keys.keys, number > 0)", _SAME, _FAR,
    ),
    Mutation(
        "own key of the first chunk in every chunk", "infonce.py", "return chunk.begin - first if", "return -first if",
        _CHUNKS, _TRITON,
    ),
    Mutation(
        "kept logits are taken for raw ones", "infonce.py", "own, kept is None, self.tau", "own, True, self.tau", _SAME,
        ("test_triton.py::test_pred_and_target_have_strides_of_their_own[all]",),
    ),
    Mutation(
        "rows chosen by a list", "infonce.py", "own_rows[row].copy_(sums.view(-1))",
        "own_rows[[int(row)]] = sums.view(1, -1)", _WAITS, _TRITON,
    ),
)  # fmt: skip
