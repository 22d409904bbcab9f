"""`align`, and the same from Python: `run_cli(args)` gives back `.trainer`, `.model` and `.datamodule`."""

from alignment_modules.cli.app import AlignCLI, main, run_cli

__all__ = ["AlignCLI", "main", "run_cli"]
