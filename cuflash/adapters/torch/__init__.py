"""Tensors of PyTorch: in memory, recorded by autograd, in its transforms and in graphs that are compiled."""
