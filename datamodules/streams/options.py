"""How a stream is read."""

from __future__ import annotations

from dataclasses import dataclass

from datamodules.ranges import Count, check_options


@dataclass(frozen=True)
class StreamOptions:
    """Reads training rows on the fly, in blocks, instead of all of them before the first step.

    Args:
        buffer_size: Rows of a block: each worker of each rank reads so many of its rows, tokenises and packs them, and
            hands them out, shuffled among themselves. A resumed run reads one block again.
        eval_rows: Validation, test and predict sources that are streams or hub ids give their first rows, so many.
    """

    buffer_size: Count = 2048
    eval_rows: Count | None = None

    def __post_init__(self) -> None:
        check_options(StreamOptions, vars(self), "stream.")
