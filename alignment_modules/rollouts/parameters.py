"""How completions are drawn: what people choose, and what one rollout is drawn with."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar

from alignment_modules.functional.ranges import Count, Natural, NonNegative, Positive, Range, Share, check_options


@dataclass(frozen=True)
class SamplingOptions:
    """What people choose of how completions are drawn.

    Attributes:
        max_completion_length: Most tokens in a completion; one that reaches it without a stop is truncated.
        temperature: Divides the logits, for sampling and for the log-probabilities.
        top_p: Keeps the smallest set of likeliest tokens with this mass; 1 keeps all.
        top_k: Keeps this many likeliest tokens; 0 keeps all.
        min_p: Keeps tokens at least this many times as likely as the likeliest; 0 keeps all.
        stop_strings: A completion ends with the token that completes one of these.

    Raises:
        ValueError: If a value is outside its range.
    """

    option: ClassVar[str] = ""
    """What stands before a field's name in messages."""

    max_completion_length: Count = 256
    temperature: Positive = 1.0
    top_p: Annotated[float, Range(0, 1, "(]")] = 1.0
    top_k: Natural = 0
    min_p: Share = 0.0
    stop_strings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_options(type(self), vars(self), self.option)

    def parameters(self, *, greedy: bool = False, stop_token_ids: Sequence[int] = ()) -> "SamplingParameters":
        """These options for one rollout; the likeliest tokens need neither a temperature nor a filter.

        Args:
            greedy: Take the likeliest token instead of sampling.
            stop_token_ids: Tokens that end a completion.
        """
        chosen: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(SamplingOptions)}
        if greedy:
            chosen |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        return SamplingParameters(**chosen, greedy=greedy, stop_token_ids=tuple(stop_token_ids))


@dataclass(frozen=True)
class SamplingParameters(SamplingOptions):
    """How completions are drawn.

    Attributes:
        temperature: As in `SamplingOptions`. Where `greedy`, it does not matter for the choice, and 0 means that
            log-probabilities are under 1.
        greedy: Takes the likeliest token instead of sampling.
        stop_token_ids: Tokens that end a completion and belong to it.

    Raises:
        ValueError: If a value is outside its range.
    """

    temperature: NonNegative = 1.0
    greedy: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.greedy and not self.temperature:
            raise ValueError(f"temperature={self.temperature} must be > 0 unless greedy=True")

    @property
    def truncates_support(self) -> bool:
        """Whether tokens are drawn from fewer than the policy gives a probability to."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0
