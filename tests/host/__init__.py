"""Runs the real kernels on a CPU: ``block.hpp`` plays a thread block, ``ptx/*.cuh`` stand in for the PTX floor."""
