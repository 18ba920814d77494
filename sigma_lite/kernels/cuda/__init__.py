"""CUDA C++ on tensor cores: the backend that the book takes apart. Read grouped_swiglu.cu first, then tile.cuh."""

from sigma_lite.kernels.cuda.binding import why_not
from sigma_lite.kernels.cuda.op import grouped_swiglu_cuda

__all__ = ["grouped_swiglu_cuda", "why_not"]
