"""What paradigms share whose policy may be sampled elsewhere than in this process."""

from typing import Any

from alignment_modules.functional.ranges import check_options
from alignment_modules.rollouts.engines import Engine
from alignment_modules.training.module import AlignmentModule


class EngineModule(AlignmentModule):
    """Base of paradigms whose completions an engine makes, in training, validation and test.

    Args:
        engine: Makes the completions, such as a `VLLMEngine`; None: the policy itself, in this process.
        **common: Keywords of what it is mixed with, and of `AlignmentModule` (policy, optimizer, lr_scheduler,
            tokenizer, evaluation).

    Raises:
        ValueError: If the engine cannot sample as `evaluation` says.
    """

    def __init__(self, *, engine: Engine | None = None, **common: Any) -> None:
        check_options(EngineModule.__init__, locals())
        super().__init__(**common)
        if engine is None:
            return
        self.engine = engine
        if engine.codec is None:
            engine.codec = self.codec
        if self.evaluator is not None:
            engine.check("evaluation.", self.evaluator.config)
            self.evaluator.engine = engine

    def extra_state(self) -> dict[str, Any]:
        """Adds the engine's, where it has some."""
        state = self.engine.state_dict()
        return super().extra_state() | ({"engine": state} if state else {})

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes it up."""
        super().load_extra_state(state)
        if "engine" in state:
            self.engine.load_state_dict(state["engine"])

    def describe(self) -> dict[str, str]:
        """Adds the engine, where it is not this process."""
        told = self.engine.describe()
        return super().describe() | ({} if told is None else {"engine": told})
