"""Errors in the Triton kernels and in how they are launched."""

from .mutation import Mutation

_TEST = "test_triton.py::test_"
_MASKED = (f"{_TEST}masked_rows_are_neither_queries_nor_keys",)
_ALL, _STEP = ((f"{_TEST}pred_and_target_have_strides_of_their_own[{negatives}]",) for negatives in ("all", "step"))
_FAR = (f"{_TEST}logits_far_above_the_range_of_exp",)
_SMALL = ("test_triton_small_groups.py::test_error_rule[far-(63, 7)-torch.bfloat16]",)

_COUNTS = "counts = inside & (get(rows, rows_stride, WEIGHT, i, inside) != 0)"
_RUNNING = "higher = tl.maximum(top, tl.max(s, axis={}))"

MUTATIONS = (
    Mutation(
        "the end of a row is not masked", "scalars.py", "inside = mask[:, None] & (k < dim)[None, :]",
        "inside = mask[:, None] & (k < dim + 16)[None, :]", ttsem=_ALL,
    ),
    Mutation("masked rows are read", "row_stats.py", _COUNTS, "counts = inside", ttsem=_MASKED),
    Mutation("masked rows send a gradient", "row_combine.py", _COUNTS, "counts = inside", ttsem=_MASKED),
    Mutation(
        "masked keys are kept", "softmax.py", "((j < keys) & ~(key_norm < 0))[None, :]", "(j < keys)[None, :]",
        ttsem=_MASKED,
    ),
    Mutation(
        "the end of the keys is not masked on a store", "softmax.py",
        "tl.store(out, weight, mask=inside[:, None] & (j < keys)[None, :])",
        "tl.store(out, weight, mask=inside[:, None])", ttsem=_ALL, times=2,
    ),
    Mutation(
        "one row too many", "softmax_cols.py", "there = (row < size)[:, None]", "there = (row < size + 1)[:, None]",
        ttsem=_MASKED,
    ),
    Mutation(
        "strides of group and row exchanged", "scalars.py",
        "(i // size, i % size, group_stride, row_stride)", "(i // size, i % size, row_stride, group_stride)",
        ttsem=_STEP,
    ),
    Mutation(
        "strides of pred and target exchanged", "primitives.py",
        "*(*strides(pred), *strides(target), rows.stride(0), key_scale",
        "*(*strides(target), *strides(pred), rows.stride(0), key_scale",
        ttsem=_STEP,
    ),
    Mutation(
        "strides of attention and gradient exchanged", "primitives.py",
        "*(*(strides(attention) if has_attention else (0, 0)), *strides(grad), rows.stride(0)),",
        "*(*strides(grad), *(strides(attention) if has_attention else (0, 0)), rows.stride(0)),", ttsem=_STEP,
    ),
    Mutation(
        "running maximum along a row dropped", "softmax.py", "top = tl.maximum(top, tl.max(s, axis=1))",
        "top = tl.maximum(top, 0.0)", ttsem=_FAR,
    ),
    Mutation(
        "earlier blocks are not rescaled", "softmax.py", "tl.exp(before - now))\n    others",
        "1.0)\n    others", ttsem=_FAR,
    ),
    Mutation(
        "running maximum of the general softmax dropped", "softmax.py", _RUNNING.format(1),
        "higher = tl.maximum(top, 0.0)", ttsem=_FAR,
    ),
    Mutation(
        "running maximum of the columns dropped", "softmax_cols.py", _RUNNING.format(0),
        "higher = tl.maximum(top, 0.0)", ttsem=_FAR,
    ),
    Mutation(
        "own key not left out", "softmax.py", "[None, :] & (j[None, :] != own[:, None])\n", "[None, :]\n", ttsem=_ALL,
    ),
    Mutation(
        "two programs write one sum", "term_sums.py", "slot * blocks + tl.program_id(0),", "slot * blocks,",
        ttsem=(f"{_TEST}rows_of_more_than_one_block_of_sums",),
    ),
    Mutation(
        "a spike is not cut", "balance.py", "(tl.minimum(current, limit) - average)", "(current - average)",
        ttsem=(f"{_TEST}balance[gradient]",),
    ),
    Mutation(
        "own key not left out of a small group", "group_kernels.py", "(r[:, None] != r[None, :])",
        "(r[:, None] >= 0)", ttsem=_SMALL,
    ),
    Mutation(
        "offsets of 32 bits", "scalars.py", "r.to(tl.int64) * row_stride", "r * row_stride",
        ttsem=(f"{_TEST}offsets_have_64_bits",),
    ),
    Mutation(
        "a row that sends nothing has no gradient from columns", "group_kernels.py", "counts if BOTH else sending",
        "sending", ttsem=("test_triton_small_groups.py::test_a_row_that_sends_nothing_is_a_negative_of_the_columns",),
    ),
    # What no value shows.
    Mutation(
        "a tile that does not fit the registers", "small_groups.py", "64: Tile(64, 8, 1)", "64: Tile(256, 4, 2)",
        ttsem=_SMALL, compiled=("triton",),
    ),
    Mutation(
        "strides are not known to be aligned", "scalars.py", '"scale_group", "ids_group"',
        '"pred_row", "target_row", "logits_row", "scale_group", "ids_group"', ttsem=_ALL, compiled=("triton",),
    ),
    Mutation(
        "products without tensor cores", "group_kernels.py", "pred.dtype.element_ty if pred.dtype == target.dtype",
        "tl.float32 if pred.dtype == target.dtype", ttsem=_SMALL, compiled=("triton",),
    ),
    Mutation(
        "a row on a quarter of the warps", "launching.py", "elements=1024, warps=4)", "elements=1024, warps=1)",
        ttsem=_ALL, compiled=("triton",),
    ),
)  # fmt: skip
