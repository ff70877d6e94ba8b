"""The CPU convolution in data-parallel training on two processes."""

import os
import socket
import subprocess
import sys

DDP = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from sparsekit import prune, sparsify
from sparsekit.masks import masks_of

rank, port = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

def model():
    torch.manual_seed(0)
    made = sparsify(nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 2, 3)))
    prune.apply_masks(made, prune.magnitude_masks(made, 0.6))
    return made

def batch(of):
    return torch.randn(2, 1, 7, 8, 9, generator=torch.Generator().manual_seed(of))

def gradients(made, call, of):
    made.zero_grad()
    call(batch(of)).square().sum().backward()
    return [p.grad.clone() for p in made.parameters()]

alone = model()
wanted = [(a + b) / 2 for a, b in zip(*(gradients(alone, alone, of) for of in (0, 1)))]
shared = model()
ddp = DistributedDataParallel(shared)
found = gradients(shared, ddp, rank)
for a, b in zip(found, wanted):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
for name, mask in masks_of(shared).items():
    assert not bool(shared.get_parameter(name).grad[~mask].any())

# The first process changes its mask; DDP sends buffers before each forward pass.
if rank == 0:
    shared[0].set_mask(~shared[0].mask)
with torch.no_grad():
    shared[0].weight.fill_(0.5)
y = ddp(batch(5))
from sparsekit import masked_conv3d
x = batch(5)
for layer in (shared[0], nn.ReLU(), shared[2]):
    x = layer(x) if isinstance(layer, nn.ReLU) else masked_conv3d(
        x, layer.weight, layer.mask, layer.bias, backend="reference")
torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)
both = [torch.empty_like(y) for _ in range(2)]
dist.all_gather(both, y.detach())
assert torch.equal(both[0], both[1])
dist.destroy_process_group()
print("fine")
"""


def test_two_processes_average_their_gradients() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(rank), str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            out, err = process.communicate(timeout=90)
            assert out.strip().endswith("fine"), err
    finally:
        for process in processes:
            process.kill()
            process.communicate()
