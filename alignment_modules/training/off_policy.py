"""What losses and corrections need of completions that another distribution sampled than the one that scores them."""

from torch import Tensor

from alignment_modules.functional import Correction, Surrogate, as_correction, correction_statistics
from alignment_modules.functional.statistics import Statistic
from alignment_modules.rollouts.engines import Engine
from alignment_modules.rollouts.rollout import Rollout


def gate(correction: str | Correction | None, surrogate: Surrogate, engine: Engine | None) -> Correction | None:
    """The correction that holds: what is given, else what the engine needs, which cannot be left out.

    Args:
        correction: What was given.
        surrogate: The loss.
        engine: What samples; None: the policy itself.

    Returns:
        None with a loss that compares with the sampler itself, or where none is given and the engine needs none.

    Raises:
        ValueError: If there is none of that name, or the loss compares with the sampler itself.
    """
    given = as_correction(correction)
    if surrogate.row.of_sampler:
        if given is not None:
            raise ValueError(
                f"correction={correction!r} must be None with loss={surrogate.loss!r}, which compares with the "
                "sampler itself"
            )
        return None
    return as_correction(engine.correction) if given is None and engine is not None else given


def check_sampled(rollout: Rollout, surrogate: Surrogate, correction: Correction | None, *, updates: int) -> None:
    """Refuses completions from which a loss or a correction could not learn what it is meant to.

    Args:
        rollout: Of the whole batch, as it was sampled or given.
        surrogate: The loss.
        correction: The correction, if there is one.
        updates: Optimizer steps on a rollout.

    Raises:
        ValueError: If the probabilities that they were sampled with are read and missing, or a penalty of the ratio
            could do nothing because the ratio never moves.
    """
    if surrogate.loss == "kl_cov" and updates == 1 and rollout.old_logps is None:
        raise ValueError(
            "loss='kl_cov' penalises a ratio that moves, and it is 1 in the first update of a rollout: set "
            "num_iterations or minibatches to 2 or more"
        )
    reader = f"loss={surrogate.loss!r}" if surrogate.row.of_sampler else f"correction={correction}"
    reads = surrogate.row.of_sampler or correction is not None
    if reads and bool((rollout.sampled_logps.isnan() & rollout.own.to(rollout.sampled_logps.device)).any()):
        raise ValueError(
            f"{reader} compares with the probabilities that tokens were sampled with, and these completions come "
            "without: a batch that brings responses needs old_logprobs, too"
        )


def corrected(
    values: Tensor, correction: Correction, rollout: Rollout, scored_logps: Tensor, mask: Tensor, read: Tensor
) -> tuple[Tensor, dict[str, Statistic]]:
    """The loss of a piece's tokens times their weights, and what is logged of these.

    Args:
        values: [N, T], the loss of each token.
        correction: What weighs them.
        rollout: The piece, with its advantages.
        scored_logps: [N, T], what the sampled log-probabilities are compared with.
        mask: [N, T] bool: the tokens of the loss.
        read: [N, T] bool: those that were scored.

    Raises:
        ValueError: If the piece has no advantages.
    """
    if rollout.advantages is None:
        raise ValueError("advantages=None: a correction reads their sign")
    weights = correction(rollout.sampled_logps, scored_logps, rollout.advantages.to(values.device), mask)
    told = correction_statistics(weights, read)
    return values * weights, {name: Statistic(*share) for name, share in told.items()}
