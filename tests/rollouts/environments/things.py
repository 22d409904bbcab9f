"""Environments and tools of tests that are named by import path."""

import os
import time


class Counter:
    """Counts."""

    def __init__(self, start: int = 0):
        self.start = start
        self.closed = False

    def reset(self, goal: int, seed: int = -1) -> str:
        self.goal, self.seed, self.total = goal, seed, self.start
        return f"Count to {goal}."

    def add(self, number: int) -> int:
        """Adds a number.

        Args:
            number: The number.
        """
        self.total += number
        return self.total

    def get_reward(self) -> float:
        return float(self.total == self.goal)

    def close(self) -> None:
        self.closed = True

    def _private(self, anything):
        raise AssertionError


class Calculator:
    """Methods without state."""

    @staticmethod
    def plus(a: int, b: int) -> int:
        """Adds.

        Args:
            a: One.
            b: Another.
        """
        return a + b


def double(number: int) -> int:
    """Doubles a number.

    Args:
        number: The number.
    """
    return 2 * number


async def promise(number: int) -> list[int]:
    """Returns a number in a list.

    Args:
        number: The number.
    """
    return [number]


def misbehave(how: str) -> str:
    """Does what a tool should not.

    Args:
        how: What.
    """
    if how == "hang":
        time.sleep(1000)
    elif how == "die":
        os._exit(3)
    elif how == "exit":
        raise SystemExit(3)
    elif how == "raise":
        raise KeyError("gone")
    elif how == "close":
        os.closerange(0, 100)
    elif how == "print":
        print("PRINTED")
        os.write(1, b"WRITTEN")
    elif how == "read":
        return input()
    elif how == "large":
        return "x" * 5_000_000
    elif how == "bytes":
        return b"\xff\xfe ok"
    elif how == "process":
        return str(os.getpid())
    return "done"
