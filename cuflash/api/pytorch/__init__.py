"""PyTorch's attention functions, with its names, argument orders and results."""
