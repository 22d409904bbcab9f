"""Accelerators and devices that are not there, on systems with and without GPUs."""

import re

import pytest
from lightning.pytorch.accelerators import MPSAccelerator

from alignment_modules.cli.devices import check_devices


@pytest.fixture
def system(monkeypatch):
    """A system with so many GPUs."""

    def build(gpus):
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: False))

    return build


@pytest.mark.parametrize(
    ("gpus", "accelerator", "devices", "message"),
    [
        (0, "gpu", "auto", "trainer.accelerator='gpu': this system has none; allowed here: auto, cpu"),
        (0, "cuda", 2, "trainer.accelerator='cuda': this system has none; allowed here: auto, cpu"),
        (2, "mps", "auto", "trainer.accelerator='mps': this system has none; allowed here: auto, gpu, "),
        (0, "auto", -1, "trainer.devices=-1 on cpu: "),
        (2, "cpu", "0,1", "trainer.devices='0,1' on cpu: "),
        (2, "gpu", 4, "trainer.devices=4 on cuda: "),
        (2, "auto", [2], "trainer.devices=[2] on cuda: "),
        (2, "cuda", "0", "trainer.devices='0' on cuda: none are asked for; allowed here: auto, or at most 2"),
    ],
)
def test_what_is_not_there(system, gpus, accelerator, devices, message):
    system(gpus)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_devices(accelerator, devices)


def test_what_is_there(system):
    for gpus, accelerator, devices in (
        (0, "auto", "auto"),
        (0, "cpu", 2),
        (0, "auto", "2"),
        (2, "gpu", 2),
        (2, "cuda", "1,"),
        (2, "auto", [0, 1]),
        (2, "gpu", -1),
        (2, "cpu", "3"),
    ):
        system(gpus)
        check_devices(accelerator, devices)
