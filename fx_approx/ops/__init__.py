"""Sampled products: one file per family, each with what the passes need to know of it."""

from fx_approx.ops.base import OPS, SAMPLING_ARGUMENTS, ProductOp, Unsupported, find_op, register_op
from fx_approx.ops.channel_slices import (
    Part,
    Slices,
    check_width,
    narrow,
    pad_parts,
    positions,
    remaining,
    resize,
    slice_weights,
    split_parts,
    spread,
    take_parts,
    tapped,
    tapped_relu,
    whole_size,
    width,
)
from fx_approx.ops.conv import conv1d, conv2d, conv3d
from fx_approx.ops.conv_gradients import sampled_convolution
from fx_approx.ops.einsum import einsum
from fx_approx.ops.functorch_guard import refuse_transforms
from fx_approx.ops.gather import gather, has_channels, select_channels
from fx_approx.ops.grad_norm_ema import new_running
from fx_approx.ops.gradient_selection import BackwardDrawn, Choice, ForwardDrawn, ProductSampling, Rule
from fx_approx.ops.linear import linear
from fx_approx.ops.matmul import addmm, baddbmm, bmm, matmul, mm
from fx_approx.ops.narrow_calls import NARROW_CALLS, SLICED_CONVOLUTIONS
from fx_approx.ops.sliced_linear import sliced_linear

__all__ = [
    "NARROW_CALLS",
    "OPS",
    "SAMPLING_ARGUMENTS",
    "SLICED_CONVOLUTIONS",
    "BackwardDrawn",
    "Choice",
    "ForwardDrawn",
    "Part",
    "ProductOp",
    "ProductSampling",
    "Rule",
    "Slices",
    "Unsupported",
    "addmm",
    "baddbmm",
    "bmm",
    "check_width",
    "conv1d",
    "conv2d",
    "conv3d",
    "einsum",
    "find_op",
    "gather",
    "has_channels",
    "linear",
    "matmul",
    "mm",
    "narrow",
    "new_running",
    "pad_parts",
    "positions",
    "refuse_transforms",
    "register_op",
    "remaining",
    "resize",
    "sampled_convolution",
    "select_channels",
    "slice_weights",
    "sliced_linear",
    "split_parts",
    "spread",
    "take_parts",
    "tapped",
    "tapped_relu",
    "whole_size",
    "width",
]
