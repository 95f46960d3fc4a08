"""Errors in the C++ of the CPU op: row kernels, primitives and the algorithm."""

from .mutation import Mutation

_INFONCE = "test_seq_loss.py::test_error_rule_over_shapes[65-768-infonce]"
_COMBINATIONS = ("test_combinations.py",)
_BLOCKS = ("test_seq_loss.py::test_chunk_bytes_change_nothing",)
_CHUNKS = ("test_options.py::test_both_directions_keep_what_fits",)
_GRAPH = ("test_seq_loss_graph.py",)

MUTATIONS = (
    Mutation(
        "a factor lost", "cpu/rows.inl", "one_minus_cos = square / 2;", "one_minus_cos = square;",
        ("test_seq_loss.py::test_error_rule_over_shapes[65-768-cosine]",),
    ),
    Mutation(
        "the end of a row is left out", "cpu/access.inl", "  if (i < end) f(i, First<T>{end - i});\n", "",
        ("test_seq_loss.py::test_error_rule_over_shapes[2-7-mse]",),
    ),
    Mutation(
        "underflow of exp is not 0", "cpu/vectors.inl", "x < -87.f ? Floats{} : y", "y",
        ("test_seq_loss_edges.py::test_gradient_of_far_keys_is_zero_not_nan",),
    ),
    Mutation(
        "ties are rounded up", "cpu/convert.inl", "bits + 0x7fff + ((bits >> 16) & 1)", "bits + 0x8000",
        ("test_seq_loss_dtypes.py::test_every_number_is_converted_as_pytorch_does[baseline]",),
    ),
    Mutation(
        "a NaN is rounded as a number", "cpu/convert.inl", "(x == x ? rounded : Integers{} + 0x7fc00000)", "rounded",
        ("test_seq_loss_dtypes.py::test_every_number_is_converted_as_pytorch_does[baseline]",),
    ),
    Mutation(
        "the copy for the products is of the other row", "cpu/rows.inl", "access.store(t_copy + k, tk);",
        "access.store(t_copy + k, pk);",
        ("test_seq_loss_dtypes.py::test_as_the_same_numbers_in_float32_and_rounded_once",),
    ),
    Mutation(
        "a masked row is not zeroed in the copy", "cpu/rows.inl",
        "if (t_copy != nullptr) std::memset(t_copy, 0, pred.cols * sizeof(T));", "",
        ("test_combinations.py",),
    ),
    Mutation(
        "own key not left out", "cpu/softmax.inl",
        "if (own_key >= 0 && own_key < keys) s[own_key] = kLowest;", "", (_INFONCE,),
    ),
    Mutation(
        "masked keys are kept", "cpu/softmax.inl", "where_negative(norm, Vector<T>{} + kLowest, x)", "x",
        _COMBINATIONS,
    ),
    Mutation(
        "running maximum of earlier blocks dropped", "cpu/softmax.inl",
        "std::max(rows.at(kMax, i), largest(s, keys))", "largest(s, keys)",
        ("test_seq_loss_edges.py::test_later_blocks_far_below_the_first",), times=2,
    ),
    Mutation(
        "running sum of earlier blocks not rescaled", "cpu/softmax.inl", "others * shrink + total",
        "others + total", ("test_seq_loss.py::test_ever_larger_similarities[1]",),
    ),
    Mutation(
        "only the last 256 keys are summed", "cpu/softmax.inl",
        "total += sum<T>(lanes);", "total = sum<T>(lanes);",
        ("test_seq_loss.py::test_error_rule_over_shapes[257-64-infonce]",),
    ),
    Mutation(
        "a norm is forgotten", "cpu/rows.inl", "c = infonce * inv_pred;", "c = infonce;", (_INFONCE,),
    ),
    Mutation(
        "blocks of rows merge without their means", "cpu/columns.inl", "products[q][j] + product[q] * both",
        "products[q][j]", _COMBINATIONS,
    ),
    Mutation(
        "a thread begins where another one does", "cpu/tensors.h", "f(group, begin - first, last - first);",
        "f(group, 0, last - first);", _BLOCKS,
    ),
    Mutation(
        "sums of all threads but the last are lost", "cpu/term_sums.cpp",
        "for (const Sums& block : partial) sums += block;", "for (const Sums& block : partial) sums = block;",
        ("test_seq_loss.py::test_metrics",),
    ),
    Mutation(
        "a spike is not cut", "cpu/balance.cpp", "std::min(x, limit)", "x",
        ("test_weighting.py::test_spike_is_winsorised_after_ten_updates_and_not_before[compiled]",),
    ),
    Mutation(
        "the norm of this batch is not looked at", "cpu/balance.cpp", "current > known ? current : known", "known",
        ("test_weighting.py::test_spike_of_a_term_does_not_exceed_its_share[compiled]",),
    ),
    Mutation(
        "own key of the first block in every block", "infonce.h", "chunk.begin - begin);", "chunk.begin);", _BLOCKS,
    ),
    Mutation(
        "later blocks overwrite", "infonce.h", "multiply(out, weights, keys, !first);",
        "multiply(out, weights, keys, false);", _BLOCKS,
    ),
    Mutation(
        "earlier blocks are not rescaled", "infonce.h", "if (!first) out.mul_(", "if (false) out.mul_(",
        ("test_seq_loss.py::test_ever_larger_similarities[1]",),
    ),
    Mutation(
        "extra negatives weigh as if no row were masked", "seq_loss.cpp",
        "if (mask.defined()) extra_rows.select(0, kWeight)", "if (false) extra_rows.select(0, kWeight)",
        _COMBINATIONS,
    ),
    Mutation(
        "kept similarities are taken for raw ones", "infonce.h",
        "kept[number].second, /*raw=*/false", "kept[number].second, /*raw=*/true", _CHUNKS,
    ),
    Mutation(
        "a chunk overwrites what is kept", "infonce.h",
        "std::min(chunk.begin / plan.rows, plan.slots - 1)", "int64_t{0}", _CHUNKS,
    ),
    Mutation(
        "keys attend to rows that are not divided by their norm", "infonce.h",
        "in_place ? queries : queries * inv_pred", "queries", _CHUNKS,
    ),
    Mutation(
        "keys alone compute pred's attention too", "seq_loss.cpp",
        "needs & (kNeedsPred | kNeedsTemperature) ? n : 0", "n", _GRAPH,
    ),
    Mutation(
        "both gradients in one half", "seq_loss.cpp",
        "at::from_blob(o.data_ptr()", "at::from_blob(attention.data_ptr()", _GRAPH,
    ),
    Mutation(
        "a small gradient in place of a large attention", "seq_loss.cpp",
        "in_place && o.size(0) == attention.size(0)", "in_place && !halves", _GRAPH,
    ),
)  # fmt: skip
