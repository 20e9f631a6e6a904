"""Sampled products: one file per family, each with what the passes need to know of it."""

from fx_approx.ops.base import OPS, ProductOp, Unsupported, find_op, register_op
from fx_approx.ops.conv import conv1d, conv2d, conv3d, select_channels
from fx_approx.ops.einsum import einsum
from fx_approx.ops.gather import gather
from fx_approx.ops.linear import linear
from fx_approx.ops.matmul import addmm, baddbmm, bmm, matmul, mm

__all__ = [
    "OPS",
    "ProductOp",
    "Unsupported",
    "addmm",
    "baddbmm",
    "bmm",
    "conv1d",
    "conv2d",
    "conv3d",
    "einsum",
    "find_op",
    "gather",
    "linear",
    "matmul",
    "mm",
    "register_op",
    "select_channels",
]
