"""Each op in plain PyTorch, written to be read: what the fast kernels are tested against."""
