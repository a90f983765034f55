"""Run-time compilation: CUDA C++ text -> cubin -> function. Knows nothing of quantisation."""
