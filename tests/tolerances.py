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
    # tests/triton/test_masked_conv3d.py, with Triton 3.7.1 in its interpreter and in ttsem 0.1.0.
    # Neither rounds as bf16x3 does (3.3e-7): its limit is what 16 bits of each factor leave.
    ("masked_conv3d_triton", torch.float32, "forward"): 2.5e-6,  # 6.2e-7
    ("masked_conv3d_triton", torch.float32, "input"): 4e-6,  # 9.2e-7
    ("masked_conv3d_triton", torch.float32, "weight"): 9e-6,  # 2.2e-6
    ("masked_conv3d_triton", torch.float16, "forward"): 1.3e-3,  # 3.1e-4
    ("masked_conv3d_triton", torch.float16, "input"): 9e-4,  # 2.2e-4
    ("masked_conv3d_triton", torch.float16, "weight"): 1e-3,  # 2.5e-4
    ("masked_conv3d_triton", torch.bfloat16, "forward"): 1e-2,  # 2.5e-3
    ("masked_conv3d_triton", torch.bfloat16, "input"): 1.1e-2,  # 2.7e-3
    ("masked_conv3d_triton", torch.bfloat16, "weight"): 1.2e-2,  # 2.9e-3
    ("masked_conv3d_triton tf32", torch.float32, "forward"): 3.3e-3,  # 8.1e-4
    ("masked_conv3d_triton tf32", torch.float32, "input"): 3.1e-3,  # 7.6e-4
    ("masked_conv3d_triton tf32", torch.float32, "weight"): 3.2e-3,  # 7.9e-4
    ("masked_conv3d_triton tf32x3", torch.float32, "forward"): 1.4e-6,  # 3.3e-7
    ("masked_conv3d_triton tf32x3", torch.float32, "input"): 1.3e-6,  # 3.1e-7
    ("masked_conv3d_triton tf32x3", torch.float32, "weight"): 5e-7,  # 1.1e-7
    ("masked_conv3d_triton bf16x3", torch.float32, "forward"): 4e-5,
    ("masked_conv3d_triton bf16x3", torch.float32, "input"): 4e-5,
    ("masked_conv3d_triton bf16x3", torch.float32, "weight"): 4e-5,
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
