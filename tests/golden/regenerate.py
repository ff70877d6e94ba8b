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


def masked(shape: tuple[int, ...], *, every: int, pruned: bool = False) -> tuple[Tensor, Tensor]:
    """Numbers under a mask that keeps about one of `every`, irregularly, or prunes it."""
    n = torch.Size(shape).numel()
    mask = (torch.arange(n) * 7919 % 1009 % every == 0) ^ pruned
    return (torch.arange(1, n + 1) * mask).float().reshape(shape), mask.reshape(shape)


def spread(dtype: torch.dtype, n: int, *, wide: bool = False) -> Tensor:
    """Numbers of both signs and many magnitudes, 0 and infinity among them if `wide`."""
    mantissa = 1 + torch.arange(n) * 7919 % 1009 / 1009
    exponent = torch.arange(n) % (40 if wide else 4) - (20 if wide else 4)
    values = mantissa * 2.0**exponent * (1 - 2 * (torch.arange(n) % 3 % 2))
    if wide:
        values[:2] = torch.tensor([0.0, float("inf")])
    return values.to(dtype)


def moved(base: Tensor) -> Tensor:
    """Each number a little larger or smaller, some much, some not at all, one with another sign."""
    n = torch.arange(base.numel())
    factor = 1 + (n * 7919 % 1009 - 504) / 2.0 ** (11 + n % 11)
    values = base.reshape(-1) * torch.where(n % 13 == 5, 1.0, factor)
    values[7:9] *= torch.tensor([-1.0, 1000.0])
    return values.reshape(base.shape)


def stepped(base: Tensor, most: int) -> Tensor:
    """Each number of a few bits a whole number of small steps away, most of them not many."""
    n = torch.arange(base.numel())
    steps = n * 7919 % 1009 % (2 * min(most, 20) + 1) - min(most, 20)
    steps[3] = -most
    return base + (steps * 2.0**-9).reshape(base.shape) * (base != 0)


def ranked(base: Tensor) -> tuple[Tensor, Tensor]:
    """Multiples of the larger half of the base under a mask with some exceptions."""
    size = base.abs().double()
    mask = (size >= size[size > 0].median()) ^ (torch.arange(base.numel()) % 37 == 0).view(
        base.shape
    )
    mask &= base != 0
    return 2 * base * mask, mask


def beyond(base: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers under a mask as `ranked`, which also keeps some zeros of the base."""
    values, mask = ranked(base)
    more = (base == 0) & (torch.arange(base.numel()) % 23 == 0).view(base.shape)
    return values + more * 0.25, mask | more


def all_of(n: int) -> Tensor:
    """Mask that keeps all."""
    return torch.ones(n, dtype=torch.bool)


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
    fifth = masked((16, 90), every=5)[1]
    vector = scattered((300,), [0, 299], torch.float32)
    base = scattered((4, 5), [1, 2, 3, 9, 13], torch.float32)
    numbers = spread(torch.float32, 800).view(20, 40)
    numbers = numbers * (torch.arange(800) * 31 % 101 % 5 != 0).view(20, 40)
    shared = {
        "w": numbers,
        "v": spread(torch.float32, 300),
        "d": numbers.double() / 3,
        "b": numbers[:7].bfloat16(),
        "s": spread(torch.float32, 9),
        "g": (numbers * 64).round() / 64,
    }
    half = {
        name: (t * (torch.arange(t.numel()) % 3 != 1).view(t.shape), (t != 0))
        for name, t in shared.items()
    }
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
            "level": "fast",
            "tensors": {
                "odd": tensor_entry(odd, odd != 0),
                "vector": tensor_entry(vector, vector != 0),
                "wide": tensor_entry(scattered((2, 65_536), [65_535, 131_071], torch.int8)),
            },
        },
        "rice": {
            "mask_encoding": "rice",
            "tensors": {
                "sparse": tensor_entry(*masked((7, 11, 3), every=9)),
                "very sparse": tensor_entry(scattered((40, 200), [0, 77, 7_999], torch.int8)),
                "few are pruned": tensor_entry(*masked((5, 41), every=9, pruned=True)),
                "one is pruned": tensor_entry(*masked((3, 3), every=9, pruned=True)),
                "half": tensor_entry(*masked((4, 9), every=2)),
            },
        },
        "structured": {
            "tensors": {
                "half of the filters": tensor_entry(
                    scattered((40, 64), list(range(1280, 2560, 5)), torch.int8)
                ),
            },
        },
        "split": {
            "tensors": {
                "float32": tensor_entry(spread(torch.float32, 300), dense=True),
                "many exponents": tensor_entry(spread(torch.float32, 257, wide=True), all_of(257)),
                "sparse": tensor_entry(spread(torch.float32, 1440).view(16, 90) * fifth),
                "float16": tensor_entry(spread(torch.float16, 256), dense=True),
                "bfloat16": tensor_entry(spread(torch.bfloat16, 270), dense=True),
                "wide bfloat16": tensor_entry(spread(torch.bfloat16, 260, wide=True), all_of(260)),
                "raw": tensor_entry(spread(torch.float32, 255), dense=True),
            },
        },
        "bf16": {
            "values": "bf16",
            "tensors": {
                "split": tensor_entry(spread(torch.bfloat16, 256).float(), dense=True),
                "raw": tensor_entry(spread(torch.bfloat16, 9).float(), dense=True),
                "float64": tensor_entry(spread(torch.float64, 5), dense=True),
                "none": tensor_entry(torch.zeros(4), torch.zeros(4, dtype=torch.bool)),
            },
        },
        "fp16": {
            "values": "fp16",
            "tensors": {
                "split": tensor_entry(spread(torch.float16, 257).float(), dense=True),
                "special": tensor_entry(
                    from_bits(
                        torch.float32, 0x7F800000, 0xFF800000, 0x33800000, 0x477FE000, 0xB8800000
                    ),
                    all_of(5),
                ),
            },
        },
        "base": {"tensors": {"w": tensor_entry(base), "b": tensor_entry(torch.ones(3))}},
        "shared": {"tensors": {n: tensor_entry(t) for n, t in shared.items()}},
        "subset": {
            "base": "shared",
            "mask_encoding": "subset",
            "tensors": {
                n: tensor_entry(value, keep & (value != 0)) for n, (value, keep) in half.items()
            },
        },
        "predicted": {
            "base": "shared",
            "mask_encoding": "predicted",
            "tensors": {n: tensor_entry(*ranked(t)) for n, t in shared.items()},
        },
        "delta": {
            "base": "shared",
            "tensors": {n: tensor_entry(moved(shared[n]), shared[n] != 0) for n in ("w", "v", "s")},
        },
        "delta-bf16": {
            "base": "shared",
            "values": "bf16",
            "tensors": {
                n: tensor_entry(moved(shared[n]).bfloat16().float(), shared[n] != 0)
                for n in ("w", "v", "s")
            },
        },
        "delta-fp16": {
            "base": "shared",
            "values": "fp16",
            "tensors": {"w": tensor_entry(moved(shared["w"]).half().float(), shared["w"] != 0)},
        },
        "int8": {
            "base": "shared",
            "values": "int8",
            "tensors": {
                "g": tensor_entry(stepped(shared["g"], 127), shared["g"] != 0),
                "s": tensor_entry(moved(shared["s"]), shared["s"] != 0),
            },
        },
        "int4": {
            "base": "shared",
            "values": "int4",
            "tensors": {"g": tensor_entry(stepped(shared["g"], 7), shared["g"] != 0)},
        },
        "int8-alone": {
            "values": "int8",
            "tensors": {
                "w": tensor_entry(stepped(torch.ones(300), 127) - 1, all_of(300)),
                "raw": tensor_entry(spread(torch.float32, 15), dense=True),
            },
        },
        "int4-alone": {
            "values": "int4",
            "tensors": {"w": tensor_entry(stepped(torch.ones(301), 7) - 1, all_of(301))},
        },
        "ranked": {
            "base": "shared",
            "mask_encoding": "ranked",
            "tensors": {n: tensor_entry(*beyond(shared[n])) for n in ("w", "d", "b", "s")},
        },
        "short": {
            "level": "small",
            "round": 3,
            "tensors": {
                "layer.0.weight": tensor_entry(*masked((7, 11, 3), every=9)),
                "layer.0.bias": tensor_entry(torch.ones(7), dense=True),
                "layer.1.weight": tensor_entry(*masked((90, 10), every=3)),
                "layer": tensor_entry(torch.tensor(2.5)),
                "größe": tensor_entry(flags, flags),
                "größen": tensor_entry(torch.empty(0, 300), dense=True),
            },
        },
        "short-int4": {
            "base": "shared",
            "level": "small",
            "values": "int4",
            "tensors": {
                "g": tensor_entry(stepped(shared["g"], 7), shared["g"] != 0),
                "w": tensor_entry(torch.zeros(20, 40), torch.zeros(20, 40, dtype=torch.bool)),
            },
        },
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
            level=entry.get("level", "balanced"),
            values=entry.get("values", "lossless"),
            round=entry.get("round", 0),
        )
        (FOLDER / f"{name}.spu").write_bytes(payload)
    text = json.dumps(contents, indent=1, ensure_ascii=False)
    (FOLDER / "contents.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
