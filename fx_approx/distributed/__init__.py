"""Data-parallel training: gradients of which the sampled part is sent only, and models whose parameters are sharded."""

from fx_approx.distributed.data_parallel import enable_fsdp, enable_sparse_allreduce, estimate_traffic
from fx_approx.distributed.traffic import Traffic
from fx_approx.runtime.controls import synchronize_scores

__all__ = ["Traffic", "enable_fsdp", "enable_sparse_allreduce", "estimate_traffic", "synchronize_scores"]
