"""Long parts of a step say what they do and how far they are, to whoever shows it.

Without a listener that costs one comparison, and nothing here waits for a device.
"""

from collections.abc import Callable

Listener = Callable[[str, int, int], None]
_listeners: list[Listener] = []


def tell(what: str, done: int = 0, total: int = 0) -> None:
    """Says what is being done now.

    Args:
        what: In a word or two, such as "sampling".
        done: How much of it is done.
        total: Of how much; 0 where that is not known.
    """
    for listener in _listeners:
        listener(what, done, total)


def listen(listener: Listener) -> Callable[[], None]:
    """Calls `listener` with what is told from now on; returns what ends that.

    Example:
        >>> end = listen(lambda what, done, total: print(f"{what} {done}/{total}"))
        >>> tell("sampling", 3, 16)
        sampling 3/16
        >>> end()
        >>> tell("sampling", 4, 16)
    """
    _listeners.append(listener)

    def end() -> None:
        if listener in _listeners:
            _listeners.remove(listener)

    return end
