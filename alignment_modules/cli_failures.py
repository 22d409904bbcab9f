"""Which failures of a run are told in one message, and which keep their traceback.

A message says all there is to say where somebody wrote it for whoever runs the program. That is so for every `raise`
of this library. It is so for a `raise` of Lightning or torch while the run is set up (Trainer, module, optimizers,
loaders, checkpoint), as long as no code of the user's was running: then only an option can be wrong. Once batches are
worked on, and wherever the user's own code takes part, the traceback is the better answer.
"""

import sys
import traceback

_OURS = {"alignment_modules", "datamodules"}
_TOLD = {"lightning", "lightning_fabric", "torch"}
_SETUP = {"jsonargparse", "lightning_utilities", "fsspec", "tensorboard", *sys.stdlib_module_names} - {"__main__"}
_BATCHES = {"advance", "on_advance_end", "on_run_end", "_evaluation_step", "_predict_step"}  # of Lightning's loops


def is_message(error: BaseException) -> bool:
    """Whether an error's message says all there is to say, by the rule at the top of this file.

    An `OSError` of the set-up counts as raised on purpose: it names the file and what is wrong with it.

    Args:
        error: What ended the program.
    """
    frames = [
        (frame.f_globals.get("__name__", ""), frame.f_code.co_name, lines)
        for (frame, _), lines in zip(
            traceback.walk_tb(error.__traceback__), traceback.extract_tb(error.__traceback__), strict=True
        )
    ]
    if not frames:
        return False
    packages = [module.partition(".")[0] for module, _, _ in frames]
    raised = (frames[-1][2].line or "").startswith("raise ")
    if raised and packages[-1] in _OURS:
        return True
    worked = any(module.startswith("lightning.pytorch.loops.") and name in _BATCHES for module, name, _ in frames)
    foreign = set(packages) - _OURS - _TOLD - _SETUP
    if worked and frames[-1][0].startswith("lightning.pytorch.callbacks."):
        worked = False  # a callback that finds nothing under the name that it is to monitor
    return not worked and not foreign and (isinstance(error, OSError) or (raised and packages[-1] in _TOLD))
