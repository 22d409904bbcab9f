"""What `align inspect` finds out, and how it is shown: `inspect_datamodule(data, tokenizer)` and `inspect_run(...)`."""

from alignment_modules.cli.inspection.findings import Inspection
from alignment_modules.cli.inspection.gather import inspect_datamodule
from alignment_modules.cli.inspection.run import inspect_run

__all__ = ["Inspection", "inspect_datamodule", "inspect_run"]
