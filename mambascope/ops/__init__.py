"""The model's operators: scan, convolution, norm, elementwise pieces, on every backend.

Tensors are ``B L D``. Nothing here knows of models or hooks.
"""

from mambascope.ops.compat import selective_scan_fn
from mambascope.ops.conv import ConvOutput, causal_conv, long_causal_conv
from mambascope.ops.dispatch import BACKENDS, Backend, check_backend, resolve_backend
from mambascope.ops.elementwise import gate, silu, softplus
from mambascope.ops.linear import linear
from mambascope.ops.loss import linear_cross_entropy, softmax_losses
from mambascope.ops.maps import KernelRow, kernel_column, kernel_map, kernel_row, over_channels
from mambascope.ops.norm import AddNormOutput, NormOutput, add_norm, rms_norm
from mambascope.ops.scan import ScanOutput, linear_scan, selective_scan, state_window, window_dot
from mambascope.ops.scan.adjoint import Course, state_contraction

__all__ = [
    "BACKENDS",
    "AddNormOutput",
    "Backend",
    "ConvOutput",
    "Course",
    "KernelRow",
    "NormOutput",
    "ScanOutput",
    "add_norm",
    "causal_conv",
    "check_backend",
    "gate",
    "kernel_column",
    "kernel_map",
    "kernel_row",
    "linear",
    "linear_cross_entropy",
    "linear_scan",
    "long_causal_conv",
    "over_channels",
    "resolve_backend",
    "rms_norm",
    "selective_scan",
    "selective_scan_fn",
    "silu",
    "softmax_losses",
    "softplus",
    "state_contraction",
    "state_window",
    "window_dot",
]
