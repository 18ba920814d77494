"""C++ for one or a few cores: the backend that `auto` takes on a CPU. Read grouped_swiglu.cpp first, then tile.h."""

from sigma_lite.kernels.cpu.op import grouped_swiglu_cpu, why_not

__all__ = ["grouped_swiglu_cpu", "why_not"]
