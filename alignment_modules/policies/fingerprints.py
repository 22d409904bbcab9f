"""Exact hashes of weights, by which a run that resumes knows them again."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.policies.quantization import stored_parts


def fingerprint(module: nn.Module) -> str:
    """An exact hash of a module's weights and persistent buffers.

    It depends on names, types, shapes and bytes, and not on the device, the order of registration or the memory
    layout. Tensors are hashed by a few threads (hashing leaves the interpreter free), so that many cores help; at most
    that many tensors are copied at a time.

    Args:
        module: Any module.

    Returns:
        64 hexadecimal digits (BLAKE2b, 256 bits).
    """
    digest = hashlib.blake2b(digest_size=32)
    for part in _hash_entries(sorted(module.state_dict().items())):
        digest.update(part)
    return digest.hexdigest()


def fingerprints(entries: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """An exact hash of each entry of a state dictionary: 32 hexadecimal digits by name (see `fingerprint`)."""
    entries = list(entries)
    return {name: part.hex()[:32] for (name, _), part in zip(entries, _hash_entries(entries), strict=True)}


def _hash_entries(entries: list[tuple[str, Any]]) -> Iterator[bytes]:
    if any(hasattr(value, "full_tensor") for _, value in entries):  # all ranks gather these, in one order
        yield from map(_hash_entry, entries)
        return
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(_hash_entry, entries)


def _hash_entry(entry: tuple[str, Any]) -> bytes:
    name, value = entry
    digest = hashlib.blake2b(digest_size=32)
    if isinstance(value, Tensor):
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        for part in stored_parts(whole.detach()):
            tensor = part.cpu().contiguous()
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            if tensor.numel():
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    else:  # quantized layers keep settings among their weights
        digest.update(f"{name}|{value!r}|".encode())
    return digest.digest()
