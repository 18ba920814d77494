"""The grouped expert matmul: one signature, several backends, and a chooser that says why."""

from sigma_lite.kernels.choose import BACKENDS, choose_backend, explain_backend, grouped_swiglu

__all__ = ["BACKENDS", "choose_backend", "explain_backend", "grouped_swiglu"]
