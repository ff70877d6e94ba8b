"""Largest error allowed per (op, dtype, direction), relative to the largest reference value.

Errors are ``max |result - exact| / max |exact|`` with the exact result in float64. Masks and bytes
have no tolerance: they are compared for equality. The worst value seen over the cases of
test_masked_conv3d.py with the reference backend (x86-64 with AVX-512, torch 2.13, 1 and 2 threads)
stands beside each row; the limit is about 4 times that, since the order of sums differs between
machines.
"""

import torch

TOLERANCES: dict[tuple[str, torch.dtype, str], float] = {
    ("masked_conv3d", torch.float64, "forward"): 4e-15,  # 8.9e-16
    ("masked_conv3d", torch.float64, "input"): 3e-15,  # 6.3e-16
    ("masked_conv3d", torch.float64, "weight"): 2e-14,  # 4.5e-15
    ("masked_conv3d", torch.float64, "bias"): 6e-15,  # 1.5e-15
    ("masked_conv3d", torch.float32, "forward"): 2.5e-6,  # 6.3e-7
    ("masked_conv3d", torch.float32, "input"): 2e-6,  # 5.0e-7
    ("masked_conv3d", torch.float32, "weight"): 2e-6,  # 4.9e-7
    # torch adds the output gradient up voxel by voxel: 2,002 terms here.
    ("masked_conv3d", torch.float32, "bias"): 1.1e-5,  # 2.8e-6
    # test_masked_conv3d_cpu.py.
    ("masked_conv3d_cpu", torch.float32, "forward"): 7.5e-6,  # 1.9e-6
    ("masked_conv3d_cpu", torch.float32, "input"): 5.5e-6,  # 1.4e-6
    ("masked_conv3d_cpu", torch.float32, "weight"): 3.5e-6,  # 8.1e-7
    ("masked_conv3d_cpu", torch.float32, "bias"): 2.5e-6,  # 6.5e-7
    # test_conv_norm_pool_relu.py; the weights and biases after 20 steps of SGD are "training".
    ("conv_norm_pool_relu", torch.float32, "forward"): 1.2e-6,  # 3.0e-7
    ("conv_norm_pool_relu", torch.float32, "input"): 2.5e-6,  # 5.8e-7
    ("conv_norm_pool_relu", torch.float32, "weight"): 1.6e-6,  # 4.0e-7
    ("conv_norm_pool_relu", torch.float32, "training"): 1e-6,  # 2.4e-7
    # test_norm_pool_relu.py, the same machine, both backends and every memory layout.
    ("norm_pool_relu", torch.float32, "forward"): 6e-7,  # 1.5e-7
    ("norm_pool_relu", torch.float32, "input"): 9e-7,  # 2.2e-7
    # test_conv_norm_pool_relu_single.py; the gradient for the op's own winners.
    ("conv_norm_pool_relu_single", torch.float32, "forward"): 1e-6,  # 2.5e-7
    # The worst is an output of one window, whose gradient is a difference of almost equal terms.
    ("conv_norm_pool_relu_single", torch.float32, "weight"): 6.4e-6,  # 1.6e-6
    # Weights of a whole network; the same network of torch.nn layers in float32 is off by 3.8e-6.
    ("norm_pool_relu", torch.float32, "network"): 1.8e-5,  # 4.4e-6
}
