"""Kernels of sampled products, and the table that chooses one for a device and data type.

Every kernel has a reference in plain torch with the same arguments. The reference is a gather, which Inductor fuses
into what makes the operand, followed by the library's own product; it is the default everywhere. The Triton kernels
read the chosen slices where they lie instead of copying them first. See docs/kernels.md.
"""

from fx_approx.kernels.draws import uniforms
from fx_approx.kernels.gathered import gathered_k_matmul, gathered_rows_matmul
from fx_approx.kernels.norms import column_norms
from fx_approx.kernels.table import LOWERINGS, REFERENCE, Lowering, choose, prefer, preferring, table_text

__all__ = [
    "LOWERINGS",
    "REFERENCE",
    "Lowering",
    "choose",
    "column_norms",
    "gathered_k_matmul",
    "gathered_rows_matmul",
    "prefer",
    "preferring",
    "table_text",
    "uniforms",
]
