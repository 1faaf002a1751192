"""The arrays and keywords of a call to its Problem, or an InvalidArgument that says what is wrong with which."""

from cuflash.ops.check.array import check_output, pair_strides
from cuflash.ops.check.cache import cached_rows
from cuflash.ops.check.dropout import dropout_of
from cuflash.ops.check.layout import check_on_cuda, layout_of
from cuflash.ops.check.mask import band_of
from cuflash.ops.check.options import settled
from cuflash.ops.check.packed import LENGTHS, length
from cuflash.ops.check.parts import check_gradient, dtype_of_parts
from cuflash.ops.check.problem import problem_of, written
from cuflash.ops.check.sizes import MAX_LENGTH, shapes
from cuflash.ops.check.tangents import TANGENT, check_tangents
from cuflash.ops.check.written import refuse_second_derivatives

__all__ = [
    "LENGTHS", "MAX_LENGTH", "TANGENT", "band_of", "cached_rows", "check_gradient", "check_on_cuda", "check_output",
    "check_tangents", "dropout_of", "dtype_of_parts", "layout_of", "length", "pair_strides", "problem_of",
    "refuse_second_derivatives", "settled", "shapes", "written",
]  # fmt: skip
