"""Whether what a Trainer is to run on is there."""

from typing import Any

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

_GPUS = ("mps", "cuda")


def check_devices(accelerator: Any, devices: Any) -> None:
    """Refuses an accelerator that this system does not have, and devices that there are none of.

    Args:
        accelerator: The Trainer's; only names are looked at.
        devices: The Trainer's.

    Raises:
        ValueError: With the option, its value and what there is.
    """
    if not isinstance(accelerator, str):
        return
    known = {name: AcceleratorRegistry[name]["accelerator"] for name in AcceleratorRegistry.available_accelerators()}
    there = [name for name, kind in known.items() if kind.is_available()]
    gpu = next((name for name in _GPUS if name in there), None)
    allowed = ["auto", *(["gpu"] if gpu else []), *there]
    if accelerator not in allowed:
        names = ", ".join(allowed)
        raise ValueError(f"trainer.accelerator={accelerator!r}: this system has none; allowed here: {names}")
    if devices == "auto":
        return
    auto = "tpu" if "tpu" in there else gpu or "cpu"
    name = {"auto": auto, "gpu": gpu or auto}.get(accelerator, accelerator)
    count = "a number of processes" if name == "cpu" else f"at most {known[name].auto_device_count()}"
    try:
        wrong = "" if devices not in ([], 0, "0") and known[name].parse_devices(devices) else "none are asked for"
    except (TypeError, ValueError, MisconfigurationException) as error:
        wrong = " ".join(str(error).split()).rstrip(".")
    if wrong:
        raise ValueError(f"trainer.devices={devices!r} on {name}: {wrong}; allowed here: auto, or {count}")
