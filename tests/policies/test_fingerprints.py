import torch
from torch import nn

from alignment_modules.policies.fingerprints import fingerprint


class Reordered(nn.Module):
    def __init__(self, names, values):
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(values[name]))


def test_fingerprint():
    values = {"a": torch.randn(2, 3), "b": torch.randn(3, dtype=torch.bfloat16), "c": torch.tensor(1.5)}
    first = fingerprint(Reordered("abc", values))
    assert len(first) == 64
    assert fingerprint(Reordered("cba", values)) == first
    strided = {**values, "a": values["a"].T.contiguous().T}
    assert not strided["a"].is_contiguous()
    assert fingerprint(Reordered("abc", strided)) == first
    for change in (
        {"a": torch.nextafter(values["a"], torch.tensor(9.0))},
        {"a": values["a"].reshape(3, 2)},
        {"a": values["a"].double()},
        {"b": torch.zeros(3, dtype=torch.bfloat16)},
        {"c": torch.tensor([1.5])},
    ):
        assert fingerprint(Reordered("abc", {**values, **change})) != first
    swapped = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert fingerprint(Reordered("ab", swapped)) != fingerprint(Reordered("ab", {"a": swapped["b"], "b": swapped["a"]}))
    empty = Reordered("a", {"a": torch.empty(0, 3)})
    assert fingerprint(empty) != fingerprint(nn.Module())


def test_fingerprint_sees_buffers_and_any_one_bit():
    norm = nn.BatchNorm1d(4)
    before = fingerprint(norm)
    norm.running_mean.view(torch.int32)[2] ^= 1
    assert fingerprint(norm) != before
    norm.running_mean.view(torch.int32)[2] ^= 1
    assert fingerprint(norm) == before
