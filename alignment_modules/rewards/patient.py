"""A slow reward, such as a judge behind a network: asked in threads, with retries and a time limit."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from alignment_modules.functional.http import pause_before
from alignment_modules.functional.ranges import Count, Natural, Positive, Range, check_options
from alignment_modules.rewards.calling import call, numbers
from alignment_modules.rewards.protocol import FinalRewardError, RewardError
from alignment_modules.rewards.reward_set import RewardSet

_log = logging.getLogger(__name__)


class PatientReward:
    """A reward asked for several parts of a batch at once, each again where it fails.

    What was judged is kept when another part fails. A part is asked again after a pause of 0.1 seconds, then four times
    as long each time, 30 at most. Its name is that of the reward it holds.

    Args:
        reward: A callable, also an `async def` one, or the import path of one.
        retries: How often a part that failed is asked again; one that raised a `FinalRewardError` is not.
        timeout: Seconds that one call may take; None: any time. A plain function that is late is left to itself, an
            `async def` one is cancelled.
        max_workers: Calls at the same time.
        batch_size: Completions in one call; None: equal shares of the batch for all workers. A reward that compares
            completions with each other needs a multiple of `num_generations`.
        on_failure: What a part that fails for good means: "raise" ends the run; "none" counts its completions as not
            judged (the reward does not apply to them), with a warning.

    Raises:
        ValueError: If an option is outside its range or the reward cannot be found.

    Examples:
        >>> def judge(completions):
        ...     return [float(len(text)) for text in completions]
        >>> PatientReward(judge, retries=2, timeout=10.0, batch_size=2)(completions=["a", "bb", "ccc"])
        [1.0, 2.0, 3.0]
    """

    def __init__(
        self,
        reward: str | Callable[..., Any],
        retries: Natural = 0,
        timeout: Positive | None = None,
        max_workers: Annotated[int, Range(1, 1024)] = 8,
        batch_size: Count | None = None,
        on_failure: Literal["raise", "none"] = "raise",
    ) -> None:
        check_options(PatientReward.__init__, locals())
        held = RewardSet([reward])
        self.__wrapped__ = held.functions[0]  # what it asks for is what the reward asks for
        self.name = held.names[0]
        self.retries = retries
        self.timeout = timeout
        self.max_workers = max_workers
        self.batch_size = batch_size
        self.on_failure = on_failure

    def __call__(self, **arguments: list[Any]) -> list[float]:
        """Judges a batch.

        Args:
            **arguments: What the reward asks for, each a list with one entry per completion.

        Returns:
            One number per completion; NaN where the reward does not apply or, with `on_failure="none"`, gave no answer.

        Raises:
            RewardError: If a part of the batch fails for good and `on_failure` is "raise".
        """
        count = len(next(iter(arguments.values())))
        if not count:
            return []
        size = self.batch_size or math.ceil(count / self.max_workers)
        parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        pool = ThreadPoolExecutor(min(self.max_workers, len(parts)), thread_name_prefix=self.name)
        try:
            answers = [pool.submit(self._ask, arguments, part) for part in parts]
            return [number for answer in answers for number in answer.result()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, arguments: dict[str, list[Any]], part: slice) -> list[float]:
        count = part.stop - part.start
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(pause_before(attempt))
            try:
                result = call(self.__wrapped__, {key: value[part] for key, value in arguments.items()}, self.timeout)
                return numbers(result, self.name, count)
            except Exception as error:
                failure = error
                if isinstance(error, FinalRewardError):
                    break
        where = f"completions {part.start} to {part.stop - 1} of the batch, asked {attempt + 1} times"
        what = f"{type(failure).__name__}: {failure}"
        if self.on_failure == "raise":
            raise RewardError(f"no answer for {where}: {what}") from failure
        _log.warning("reward %r gave no answer for %s, which count as not judged: %s", self.name, where, what)
        return [math.nan] * count
