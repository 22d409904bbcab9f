"""A control: the right rewards, given to the wrong completions."""

import random
import zlib

from alignment_modules.rewards import ExactMatch


def shuffled_exact_match(completions: list[str], answer: list[str]) -> list[float | None]:
    """Exact match, shuffled over all completions of the batch, so that a reward says nothing of its completion.

    The order follows from the texts alone, so that a run can be repeated.
    """
    rewards = ExactMatch()(completions=completions, answer=answer)
    order = random.Random(zlib.crc32("\n".join([*completions, *answer]).encode()))  # not for secrets
    order.shuffle(rewards)
    return rewards
