"""GPU kernels of csrc/cuda, each beside its plain version in torch."""
