"""The name of every number that a fit logs of its adapters, once: the callback writes them, the report reads them."""

RANK = "rank/"  # and the name of an adapter
MEAN_RANK = "rank/mean"
ADAPTER_PARAMS = "adapter_params"
ORTHONORMALITY_DEFECT = "orthonormality_defect"
SKIPPED_STEPS = "skipped_steps"
ROLLBACKS = "rollbacks"
TRUNCATION_ERROR = "truncation_error"  # of the last retraction, as the two that follow
ENERGY_KEPT = "energy_kept"
ADAPTATION_TIME = "adaptation_time"

# Those that an adapter cannot be mistaken for.
OF_THE_RUN = (
    ADAPTER_PARAMS,
    ORTHONORMALITY_DEFECT,
    SKIPPED_STEPS,
    ROLLBACKS,
    TRUNCATION_ERROR,
    ENERGY_KEPT,
    ADAPTATION_TIME,
)


def is_rank(metric: str) -> bool:
    """Whether a metric is the rank of an adapter or the mean of them."""
    return metric.startswith(RANK)


def rank_of(adapter: str) -> str:
    """The metric that is the rank of an adapter.

    Example:
        >>> rank_of("blocks.0.fc")
        'rank/blocks.0.fc'
    """
    return RANK + adapter
