"""The primitives of csrc/cuda on the CPU: `amn_kernels.primitives.Primitives` over the launchers of launchers.h."""

import ctypes
from ctypes import c_bool, c_double, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from amn_kernels.options import DEFAULT_CHUNK_BYTES
from amn_kernels.primitives import COLUMN_SUMS, COLUMNS, Attention, InfonceForm, Pairs, Row, Temperature, TermList

from .trace import Argument, Library

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_ANY_DTYPE = 4
_MAX_TERMS = 5
_SCALED = 3  # kScaled of enum Attention in csrc/types.h: weights of 16 bits


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("dtype", c_int32),
        *((name, c_int64) for name in ("groups", "rows", "cols", "group_stride", "row_stride")),
    )


class _Scalars(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("stride", c_int64))


class _Temperature(ctypes.Structure):
    _fields_ = (("number", c_double), ("learned", c_void_p), ("dtype", c_int32))


class _Form(ctypes.Structure):
    _fields_ = (("both", c_bool), ("positives_by_id", c_bool))


class _TermList(ctypes.Structure):
    _fields_ = (("size", c_int64), ("term", c_int64 * _MAX_TERMS), ("differentiable", c_bool * _MAX_TERMS))


class _Incoming(ctypes.Structure):
    _fields_ = (("grad_loss", c_void_p), ("weights", c_void_p), ("grad_values", c_void_p), ("terms", _TermList))


class _Pairs(ctypes.Structure):
    _fields_ = (
        ("row_ids", c_void_p),
        ("key_ids", c_void_p),
        ("id_keys", c_int64),
        ("id_stride", c_int64),
        ("guide", _Matrix),
        ("margin", c_double),
    )


class _BalanceState(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("mean", "updates", "calls", "skipped", "lambdas", "most"))


class _BalanceOptions(ctypes.Structure):
    _fields_ = (
        ("anchor", c_int64),
        ("decay", c_double),
        ("update_every", c_int64),
        ("by_value", c_bool),
        ("update", c_bool),
    )


def _matrix(x: Tensor | None) -> Argument:
    """[M, cols], [G, M, cols], or a vector as one row; None, or one without elements, for no matrix."""
    if x is None or x.numel() == 0:
        return Argument(_Matrix(None, _ANY_DTYPE, 1, 0, 0, 0, 0))
    grouped = x[None, None] if x.dim() == 1 else x[None] if x.dim() == 2 else x
    assert grouped.shape[-1] == 1 or grouped.stride(-1) == 1
    group_stride = grouped.stride(0) if x.dim() == 3 else 0
    return Argument(_Matrix(x.data_ptr(), _DTYPES[x.dtype], *grouped.shape, group_stride, grouped.stride(1)), (x,))


def is_matrix(argument: Argument) -> bool:
    """Whether it is one along rows, [N, D] or [N, K]: no vector, and not the few numbers of each column."""
    x = argument.value
    return isinstance(x, _Matrix) and x.groups * x.rows > COLUMNS and x.cols > 1


def _by_group(x: Tensor) -> Argument:
    """A vector [M], or one per group [G, M], as matrices of one row."""
    return _matrix(x if x.dim() == 1 else x.unsqueeze(1))


def _pointer(x: Tensor | None) -> Argument:
    return Argument(c_void_p(None)) if x is None or x.numel() == 0 else Argument(c_void_p(x.data_ptr()), (x,))


def _scalars(rows: Tensor) -> Argument:  # [len(Row), M]
    return Argument(_Scalars(rows.data_ptr(), rows.stride(0)), (rows,))


def _temperature(tau: Temperature) -> Argument:
    if tau.learned is None:
        return Argument(_Temperature(tau.number, None, _ANY_DTYPE))
    return Argument(_Temperature(tau.number, tau.learned.data_ptr(), _DTYPES[tau.learned.dtype]), (tau.learned,))


def _terms(terms: TermList) -> _TermList:
    numbers, sends = (c_int64 * _MAX_TERMS)(*terms.ids), (c_bool * _MAX_TERMS)(*terms.differentiable)
    return _TermList(len(terms.names), numbers, sends)


def _pairs(pairs: Pairs) -> Argument:
    guide, ids = _matrix(pairs.guide), pairs.key_ids
    if ids is None:
        return Argument(_Pairs(None, None, 0, 0, guide.value, pairs.margin), guide.tensors)
    stride = ids.stride(0) if ids.dim() == 2 else 0
    value = _Pairs(pairs.row_ids.data_ptr(), ids.data_ptr(), ids.shape[-1], stride, guide.value, pairs.margin)
    return Argument(value, (*guide.tensors, pairs.row_ids, ids))


def _incoming(grad_values: Tensor | None, grad_loss: Tensor | None, weights: Tensor | None, terms: TermList):
    tensors = [x for x in (grad_loss, weights, grad_values) if x is not None]
    addresses = [None if x is None else x.data_ptr() for x in (grad_loss, weights, grad_values)]
    return Argument(_Incoming(*addresses, _terms(terms)), tuple(tensors))


class SimtPrimitives:
    """Every call runs the kernels of the launcher of that name."""

    reads_any_dtype = True
    chunk_bytes = DEFAULT_CHUNK_BYTES["cuda"]

    def __init__(self, library: Library):
        self._library = library
        self._half_weights = False

    def row_stats(self, pred, target, rows, key_scale, form: InfonceForm, weight=-1.0) -> None:
        arguments = (_matrix(pred), _matrix(target), _scalars(rows), _by_group(key_scale))
        self._library.call("row_stats", *arguments, Argument(c_double(weight)), Argument(_Form(*form)))

    def softmax_rows_(self, logits, key_scale, rows, rescale, pairs: Pairs, own, tau: Temperature, weights) -> None:
        arguments = (_matrix(logits), _matrix(key_scale), _scalars(rows), _matrix(rescale), _matrix(weights))
        self._library.call("softmax_rows_", *arguments, _pairs(pairs), Argument(c_int64(own)), _temperature(tau))
        self._half_weights = weights.itemsize == 2

    def softmax_stats_(self, logits, key_scale, rows, pairs: Pairs, form: InfonceForm, own, tau: Temperature) -> None:
        arguments = (_matrix(logits), _matrix(key_scale), _scalars(rows), _pairs(pairs), Argument(_Form(*form)))
        self._library.call("softmax_stats_", *arguments, Argument(c_int64(own)), _temperature(tau))

    def softmax_cols(self, logits, sums, pairs: Pairs, form: InfonceForm) -> None:
        rows = sums.new_zeros(len(Row), *sums.shape[1:])
        rows[list(COLUMN_SUMS)] = sums
        cols = Argument(c_int64(sums.shape[-1]))
        self._library.call(
            "softmax_cols", _matrix(logits), _scalars(rows.flatten(1)), cols, _pairs(pairs), Argument(_Form(*form))
        )
        sums.copy_(rows[list(COLUMN_SUMS)])

    def col_factors(self, key_rows, cols, tau: Temperature) -> None:
        keys = Argument(c_int64(key_rows.shape[1]))
        self._library.call(
            "col_factors", _scalars(key_rows), keys, _matrix(cols[0]), _matrix(cols[1]), _temperature(tau)
        )

    def softmax_weights_(
        self, logits, key_scale, rows, cols, pairs: Pairs, form: InfonceForm, own, raw: bool, tau: Temperature, weights
    ) -> None:
        arguments = (_matrix(logits), _matrix(key_scale), _scalars(rows), _by_group(cols[0]), _by_group(cols[1]))
        more = (_pairs(pairs), Argument(_Form(*form)), Argument(c_int64(own)), Argument(c_bool(raw)))
        self._library.call("softmax_weights_", *arguments, *more, _temperature(tau))
        if weights is not logits:
            weights.copy_(logits)

    def row_dots(self, pred, target, attention, rows, held: Attention, form: InfonceForm, tau: Temperature) -> None:
        if held == Attention.UNNORMALISED and self._half_weights:
            held = _SCALED
        arguments = (_matrix(pred), _matrix(target), _matrix(attention), _scalars(rows), Argument(c_int64(held)))
        self._library.call("row_dots", *arguments, Argument(_Form(*form)), _temperature(tau))

    def col_stats(self, pred, target, rows, moments, count) -> None:
        partial = self._scratch(self._library.col_stats_scratch(rows.shape[1], pred.shape[-1]), pred, target)
        arguments = (_matrix(pred), _matrix(target), _scalars(rows), _pointer(moments), _pointer(count))
        self._library.call("col_stats", *arguments, _pointer(partial))

    def col_terms(self, moments, count, gamma: float, columns, values) -> None:
        arguments = (_pointer(moments), _pointer(count), Argument(c_double(gamma)), _matrix(columns), _pointer(values))
        self._library.call("col_terms", *arguments)

    def col_dots(self, pred, target, attention, columns, rows) -> None:
        arguments = (_matrix(pred), _matrix(target), _matrix(attention), _matrix(columns), _scalars(rows))
        self._library.call("col_dots", *arguments)

    def term_sums(
        self, rows, col_values, terms: TermList, form: InfonceForm, dim, tau: Temperature, values, gram, metrics,
        weights=None, loss=None,
    ) -> None:  # fmt: skip
        count = rows.shape[1]
        partial = torch.full((self._library.term_sums_scratch(count),), torch.nan, dtype=torch.float64)
        arguments = (_scalars(rows), Argument(c_int64(count)), _pointer(col_values), Argument(_terms(terms)))
        more = (Argument(_Form(*form)), Argument(c_int64(dim)), _temperature(tau))
        real = Argument(c_int32(_DTYPES[values.dtype]))
        out = (_pointer(x) for x in (partial, weights, values, gram, metrics, loss))
        self._library.call("term_sums", *arguments, *more, real, *out)

    def row_combine(
        self, grad_values, pred, target, attention, columns, rows, terms: TermList, tau: Temperature, grad,
        grad_loss=None, weights=None,
    ) -> None:  # fmt: skip
        incoming = _incoming(grad_values, grad_loss, weights, terms)
        arguments = (_matrix(pred), _matrix(target), _matrix(attention), _matrix(columns), _scalars(rows))
        real = (weights if grad_values is None else grad_values).dtype
        self._library.call(
            "row_combine", incoming, *arguments, _temperature(tau), _matrix(grad), Argument(c_int32(_DTYPES[real]))
        )

    def mirror_rows(self, rows, mirrored) -> None:
        self._library.call("mirror_rows", _scalars(rows), _scalars(mirrored), Argument(c_int64(rows.shape[1])))

    def mirror_columns(self, columns, mirrored) -> None:
        self._library.call("mirror_columns", _matrix(columns), _matrix(mirrored))

    def temperature_grad(
        self, grad_values, rows, terms: TermList, tau: Temperature, grad, grad_loss=None, weights=None
    ) -> None:
        incoming = _incoming(grad_values, grad_loss, weights, terms)
        arguments = (_scalars(rows), Argument(c_int64(rows.shape[1])), incoming)
        real = Argument(c_int32(_DTYPES[(weights if grad_values is None else grad_values).dtype]))
        self._library.call("temperature_grad", *arguments, _temperature(tau), real, _pointer(grad))

    def balance(self, values, gram, state: dict[str, Tensor], options: tuple, weights, loss) -> None:
        """`state` and `options` by the names and in the order of launchers.h and types.h."""
        ordered = [state[name] for name, _ in _BalanceState._fields_]
        of_state = Argument(_BalanceState(*(x.data_ptr() for x in ordered)), tuple(ordered))
        arguments = (_pointer(values), _pointer(gram), of_state, Argument(c_int64(len(values))))
        real = Argument(c_int32(_DTYPES[values.dtype]))
        out = (_pointer(weights), _pointer(loss))
        self._library.call("balance", *arguments, Argument(_BalanceOptions(*options)), real, *out)

    @staticmethod
    def _scratch(numbers: int, pred: Tensor, target: Tensor) -> Tensor:
        """Memory in the dtype that is computed in, NaN until it is written."""
        real = torch.float64 if torch.float64 in (pred.dtype, target.dtype) else torch.float32
        return torch.full((numbers,), torch.nan, dtype=real)
