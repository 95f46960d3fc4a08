"""Errors in the CUDA kernels."""

from .mutation import Mutation

_MERGED = "  }\n  __syncthreads();\n  if (threadIdx.x < kSums) {"

MUTATIONS = (
    Mutation("a factor lost", "row_stats.cu", "distance[0] / 2", "distance[0]"),
    Mutation("all threads of a team write the row", "row_stats.cu", "is_row && threadIdx.x == 0;", "is_row;"),
    Mutation("no barrier before warps are summed", "term_sums.cu", _MERGED, "  }\n  if (threadIdx.x < kSums) {"),
    Mutation(
        "barrier inside a branch", "term_sums.cu", _MERGED,
        "  }\n  if (threadIdx.x < kSums) {\n    __syncthreads();",
    ),
    Mutation("shuffle with half a mask", "term_sums.cu", "__shfl_xor_sync(0xffffffffu", "__shfl_xor_sync(0xffffu"),
    Mutation(
        "shared array too short", "term_sums.cu",
        "AMN_SHARED(double, of_block, kSums)", "AMN_SHARED(double, of_block, 3)",
    ),
    Mutation(
        "no barrier between threads of a column", "softmax_cols.cu",
        "sums.positives;\n  __syncthreads();", "sums.positives;",
    ),
    Mutation("one row too many", "softmax_cols.cu", "i < logits.rows ? column", "i <= logits.rows ? column"),
    Mutation("one column too many", "mirror.cu", "if (k >= columns.cols) return;", "if (k > columns.cols) return;"),
    Mutation("one row too many is mirrored", "mirror.cu", "if (i >= count) return;", "if (i > count) return;"),
    Mutation(
        "the first part is not merged", "col_stats.cu", "int64_t part = 0; part <", "int64_t part = 1; part <", times=2,
    ),
    Mutation("the positive is added", "row_dots.cu", "share - tk.x[e] * take", "share + tk.x[e] * take"),
    Mutation("d is taken without the target", "row_combine.cu", "x.b * (pk.x[e] - tk.x[e])", "x.b * pk.x[e]"),
    Mutation(
        "running maximum of earlier blocks dropped", "softmax_rows.cu",
        "{writes ? static_cast<Real>(at(rows, kMax, i)) : kLowest}", "{kLowest}",
    ),
    Mutation("directions are not halved", "softmax_general.cu", "direction = form.both ? 0.5 : 1", "direction = 1"),
    Mutation("own key not left out", "logits.cuh", "j == own_key || ", ""),
    Mutation("masked keys are kept", "logits.cuh", "norms.x[e] < 0 || ", ""),
    Mutation(
        "the end of a row is not masked", "pack.cuh", "if (k + e * blockDim.x >= cols) continue;", "", times=2,
    ),
    Mutation(
        "no barrier before slots are used again", "team.cuh", "__syncthreads();  // the slots are used again", "",
    ),
    Mutation("a spike is not cut", "balance.cu", "x < limit ? x : limit", "x"),
    # What no value shows.
    Mutation(
        "loads of 32 bits", "pack.cuh", "const uint4 quad = *reinterpret_cast<const uint4*>(from + q * 16);",
        "const auto* at = reinterpret_cast<const uint32_t*>(from + q * 16);\n"
        "      const uint4 quad = make_uint4(at[0], at[1], at[2], at[3]);",
        compiled=("row_stats.cu",),
    ),
    Mutation(
        "an array that is not in registers", "row_combine.cu", "#pragma unroll\n        for (int e = 0; e < L::kPack",
        "#pragma unroll 1\n        for (int e = 0; e < L::kPack", compiled=("row_combine.cu",),
    ),
    Mutation(
        "registers for a quarter of the blocks", "row_dots.cu", "__launch_bounds__(kTeamLimit, L::kBlocks)",
        "__launch_bounds__(kTeamLimit, 4)", compiled=("row_dots.cu",),
    ),
)  # fmt: skip
