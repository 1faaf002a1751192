"""Stand-ins for a GPU: arrays over host memory, and launches that run kernels by ``host``."""
