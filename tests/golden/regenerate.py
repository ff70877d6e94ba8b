"""Write the golden payloads anew, with a description of what each holds.

Run it only when the wire format changes on purpose: ``python tests/golden/regenerate.py``.
The tests never do. `contents.json` has, per payload, the arguments of `encode` and each tensor
as the positions of its kept elements and their bit patterns as unsigned integers.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.codec import encode

FOLDER = Path(__file__).parent
WHOLE = "all"

Entry = dict[str, Any]


def tensor_entry(tensor: Tensor, mask: Tensor | None = None, *, dense: bool = False) -> Entry:
    """Describe a tensor: under a given mask, whole, or by its non-zero pattern."""
    flat = tensor.reshape(-1)
    integers = flat.view(getattr(torch, f"int{8 * tensor.element_size()}"))
    keep = flat != 0 if mask is None else mask.reshape(-1)
    positions = range(flat.numel()) if dense else keep.nonzero().flatten().tolist()
    modulus = 2 ** (8 * tensor.element_size())
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "masked": mask is not None,
        "positions": WHOLE if dense else positions,
        "bits": [int(integers[position]) % modulus for position in positions],
    }


def from_bits(dtype: torch.dtype, *bits: int) -> Tensor:
    """Make a vector of bit patterns given as unsigned integers."""
    width = torch.empty(0, dtype=dtype).element_size()
    half = 2 ** (8 * width - 1)
    signed = [b - 2 * half if b >= half else b for b in bits]
    return torch.tensor(signed, dtype=getattr(torch, f"int{8 * width}")).view(dtype)


def scattered(shape: tuple[int, ...], positions: list[int], dtype: torch.dtype) -> Tensor:
    """Zeros but for 1, 2, 3... at flat positions."""
    flat = torch.zeros(torch.Size(shape).numel(), dtype=dtype)
    flat[positions] = torch.arange(1, len(positions) + 1).to(dtype)
    return flat.reshape(shape)


def payloads() -> dict[str, Entry]:
    """Every golden payload: arguments of `encode`, and its tensors."""
    weight = torch.tensor([0.0, 1.5, 0, 0, 0, -2.25, 0, 0, 0, 0, 0.1, 0]).reshape(2, 1, 3, 2)
    whole = {
        dtype: (torch.arange(1, 7).reshape(2, 3) / 3).to(dtype)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    } | {
        dtype: torch.tensor([[1, -2, 3], [-4, 5, 127]]).to(dtype)
        for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
    }
    flags = torch.tensor([[True, False, True], [True, False, True]])
    float32 = from_bits(
        torch.float32, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 1, 0x807FFFFF
    )
    bfloat16 = from_bits(torch.bfloat16, 0x7F81, 0xFFC1, 0x0001, 0x7F80)
    kept_zero = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], dtype=torch.bool)
    odd = scattered((3, 1, 3, 3), [0, 4, 5, 13, 26], torch.float32)
    base = scattered((4, 5), [1, 2, 3, 9, 13], torch.float32)
    return {
        "example": {
            "round": 7,
            "tensors": {
                "conv.weight": tensor_entry(weight),
                "conv.bias": tensor_entry(torch.tensor([0.5, -1.0]), dense=True),
            },
        },
        "empty": {"tensors": {}},
        "dtypes": {
            "tensors": {
                **{str(d).removeprefix("torch."): tensor_entry(t) for d, t in whole.items()},
                "bool": tensor_entry(flags, dense=True),
                "scalar": tensor_entry(torch.tensor(2.5)),
                "no elements": tensor_entry(torch.empty(0, 3), dense=True),
                "größe": tensor_entry(torch.tensor([7], dtype=torch.int16)),
            },
        },
        "bits": {
            "round": 2**64 - 1,
            "tensors": {
                "float32": tensor_entry(float32),
                "bfloat16": tensor_entry(bfloat16),
                "kept zeros": tensor_entry(
                    scattered((17,), [2, 16], torch.float64), kept_zero, dense=False
                ),
            },
        },
        "bitmap": {
            "mask_encoding": "bitmap",
            "tensors": {
                "odd": tensor_entry(odd, odd != 0),
                "nothing": tensor_entry(torch.zeros(5, 7), torch.zeros(5, 7, dtype=torch.bool)),
                "everything": tensor_entry(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)),
                "flags": tensor_entry(flags, flags),
            },
        },
        "csr": {
            "mask_encoding": "csr",
            "tensors": {
                "odd": tensor_entry(odd, odd != 0),
                "vector": tensor_entry(scattered((300,), [0, 299], torch.float32)),
                "wide": tensor_entry(scattered((2, 65_536), [65_535, 131_071], torch.int8)),
            },
        },
        "base": {"tensors": {"w": tensor_entry(base), "b": tensor_entry(torch.ones(3))}},
        "same": {
            "base": "base",
            "mask_encoding": "same",
            "round": 2,
            "tensors": {
                "w": tensor_entry(2.5 * base, base != 0),
                "b": tensor_entry(torch.full((3,), 3.0)),
            },
        },
    }


def state_of(entry: Entry) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors and given masks of one entry of `payloads`."""
    state, masks = {}, {}
    for name, record in entry["tensors"].items():
        dtype = getattr(torch, record["dtype"])
        n = torch.Size(record["shape"]).numel()
        positions = list(range(n)) if record["positions"] == WHOLE else record["positions"]
        flat = torch.zeros(n, dtype=dtype)
        if positions:
            flat[positions] = from_bits(dtype, *record["bits"])
        state[name] = flat.reshape(record["shape"])
        if record["masked"]:
            mask = torch.zeros(n, dtype=torch.bool)
            mask[positions] = True
            masks[name] = mask.reshape(record["shape"])
    return state, masks


def main() -> None:
    """Write every golden file."""
    contents = payloads()
    for name, entry in contents.items():
        state, masks = state_of(entry)
        payload = encode(
            state,
            masks=masks or None,
            base=state_of(contents[entry["base"]])[0] if "base" in entry else None,
            mask_encoding=entry.get("mask_encoding", "auto"),
            round=entry.get("round", 0),
        )
        (FOLDER / f"{name}.spu").write_bytes(payload)
    text = json.dumps(contents, indent=1, ensure_ascii=False)
    (FOLDER / "contents.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
