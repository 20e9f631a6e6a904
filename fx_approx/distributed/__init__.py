"""Data-parallel training: gradients of which the sampled part is sent only, and models whose parameters are sharded."""

from fx_approx.distributed.data_parallel import planned, register, register_sharded
from fx_approx.distributed.traffic import Traffic

__all__ = ["Traffic", "planned", "register", "register_sharded"]
