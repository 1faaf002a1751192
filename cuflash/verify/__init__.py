"""Whether it is right: exact answers, how far results may be from them, random problems, resources of kernels."""
