"""What an inspection finds, as plain values; how it is shown is another file's business."""

from dataclasses import dataclass, field
from math import ceil
from typing import Any


@dataclass(frozen=True)
class Token:
    """A token as text, control characters written out.

    Attributes:
        text: What it adds to the text before it.
        target: Whether the loss is computed on it.
        special: Whether the tokenizer holds it for a special token.
    """

    text: str
    target: bool = False
    special: bool = False


@dataclass(frozen=True)
class Passage:
    """Tokens under one name, such as a prompt or a completion.

    Attributes:
        name: "" for a row that is one passage.
        documents: Several where a packed row holds several.
        length: Its token ids; of `documents` a character that takes several of them is one.
        targets: Those that are targets.
    """

    name: str
    documents: tuple[tuple[Token, ...], ...]
    length: int
    targets: int


@dataclass(frozen=True)
class Judged:
    """What rewards say of a completion.

    Attributes:
        what: Where the completion comes from.
        completion: Its text.
        values: By reward; None: it does not apply, or its model was not loaded.
        total: The weighted sum; None where a reward is missing from it or none applies.
    """

    what: str
    completion: str
    values: dict[str, float | None]
    total: float | None


@dataclass(frozen=True)
class Row:
    """A row of a batch, as the model sees it.

    Attributes:
        title: Where it comes from, as far as the batch tells.
        passages: Its text.
        columns: More of it, such as its label or what reaches the rewards, by name.
        judged: What the rewards say of completions of it.
    """

    title: str
    passages: tuple[Passage, ...]
    columns: dict[str, str] = field(default_factory=dict)
    judged: tuple[Judged, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """An epoch of this process, counted batch by batch.

    Attributes:
        batches: Batches.
        rows: Rows in them.
        tokens: Tokens without padding.
        targets: Tokens that the loss is computed on.
        padding: Places that padding takes.
        most_rows: Rows of the largest batch.
        largest: Places of the largest batch, padding included.
        lengths: Tokens of each document: of a row, of each document in a packed row, of a prompt with its longest
            completion.
        packed_into: Places of the packed rows were each `max_length` long; None: nothing is packed.
        complete: Whether these are all batches of the epoch.
    """

    batches: int
    rows: int
    tokens: int
    targets: int
    padding: int
    most_rows: int
    largest: int
    lengths: tuple[int, ...]
    packed_into: int | None = None
    complete: bool = True

    @property
    def padding_share(self) -> float:
        """Of all places, those that padding takes: `train/padding_share` of a run."""
        return self.padding / max(self.tokens + self.padding, 1)

    @property
    def packing_efficiency(self) -> float | None:
        """Of the places that packed rows offer, those that tokens take; None: nothing is packed."""
        return None if self.packed_into is None else self.tokens / self.packed_into


@dataclass(frozen=True)
class Plan:
    """How long the run is.

    Attributes:
        processes: Data-parallel processes.
        batches: Batches of an epoch and of one process.
        accumulate: Batches of an optimizer step.
        steps_per_batch: Optimizer steps that the module takes itself for each batch.
        epochs: Most epochs; None: no limit.
        max_steps: Most optimizer steps; None: no limit.
        steps: Optimizer steps of the whole run, infinite without a limit.
        completions: Completions of each prompt, and the most tokens of one; None: the module samples none.
    """

    processes: int
    batches: int
    accumulate: int
    steps_per_batch: int
    epochs: int | None
    max_steps: int | None
    steps: float
    completions: tuple[int, int] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return ceil(self.batches / self.accumulate) * self.steps_per_batch


@dataclass(frozen=True)
class Memory:
    """Bytes that one device holds through the run: where weights are sharded, its share of them.

    Attributes:
        parameters: Number of parameters of the policy.
        trained: Number of parameters that are trained.
        weights: Bytes of the trained weights.
        gradients: Bytes of their gradients.
        optimizer: Bytes of the optimizer's state; None: it cannot be told without weights.
        frozen: Bytes of what is not trained: a base under LoRA, a reference.
        optimizer_name: Class of the optimizer.
        processes: That share everything between them; 1: nothing is sharded.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int | None
    frozen: int
    optimizer_name: str
    processes: int = 1

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + (self.optimizer or 0) + self.frozen


@dataclass(frozen=True)
class RewardUse:
    """What a reward asks for.

    Attributes:
        name: Its name in the logs.
        weight: Its factor.
        columns: Parameter names; those in brackets it can do without.
        computes: Whether it can judge here; a reward model cannot without its weights.
    """

    name: str
    weight: float
    columns: tuple[str, ...]
    computes: bool = True


@dataclass(frozen=True)
class ToolUse:
    """A tool that a policy may call.

    Attributes:
        name: Its name.
        environment: Whose it is; "": of all rows.
        arguments: With their types.
        description: What the policy is told of it.
    """

    name: str
    environment: str
    arguments: str
    description: str


@dataclass(frozen=True)
class Actions:
    """What a policy acts on, and how.

    Attributes:
        form: How calls are written.
        call: One as the chat template writes it.
        stops: What ends a turn: tokens and strings.
        limits: Of an episode and its calls.
        tools: What may be called.
    """

    form: str
    call: str
    stops: tuple[str, ...]
    limits: str
    tools: tuple[ToolUse, ...]


@dataclass(frozen=True)
class Inspection:
    """All that was found.

    Attributes:
        title: What is inspected.
        rows: Some rows.
        sizes: An epoch.
        reports: By split, what became of its rows, as the data module counted.
        max_length: The data module's; None: it has none.
        plan: The run's length; None: data alone were inspected.
        memory: Bytes; None: data alone were inspected.
        rewards: What rewards ask for.
        actions: What the policy acts on, in training or else where it is evaluated; None: it writes text alone.
        problems: Why the run would fail, a line each.
    """

    title: str
    rows: tuple[Row, ...]
    sizes: Sizes
    reports: dict[str, dict[str, Any]]
    max_length: int | None = None
    plan: Plan | None = None
    memory: Memory | None = None
    rewards: tuple[RewardUse, ...] = ()
    actions: Actions | None = None
    problems: tuple[str, ...] = ()
