"""Where classes and functions of the user's own are looked for."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from alignment_modules.cli.recipes import recipes


def find_own_files(configurations: Iterable[str] = ()) -> None:
    """Lets Python import files of the working folder, and of the folders of configurations, after what is installed.

    Args:
        configurations: Paths, of which the shipped ones have no files beside them.
    """
    shipped = {path.parent for path in recipes().values()}
    folders = [Path(path).expanduser().absolute().parent for path in configurations]
    for folder in (os.getcwd(), *(str(folder) for folder in folders if folder.is_dir() and folder not in shipped)):
        if folder not in sys.path and not (folder == os.getcwd() and "" in sys.path):
            sys.path.append(folder)
