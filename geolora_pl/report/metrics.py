"""The name of every number that a fit logs of its adapters, once: the callback writes them, the report reads them.

TensorBoard shows what stands before the first slash as a group.
"""

RANK = "rank/"  # and the short name of an adapter
MEAN_RANK = "geolora/mean_rank"
ADAPTER_PARAMS = "geolora/adapter_params"
ORTHONORMALITY_DEFECT = "geolora/orthonormality_defect"
SKIPPED_STEPS = "geolora/skipped_steps"
ROLLBACKS = "geolora/rollbacks"
GRADIENT_NORM = "geolora/gradient_norm"
LEARNING_RATE = "geolora/lr_"  # and the name of a group of the optimizer
TRUNCATION_ERROR = "geolora/truncation_error"  # of the last retraction, as the two that follow
ENERGY_KEPT = "geolora/energy_kept"
ADAPTATION_TIME = "geolora/adaptation_time"

LR_MONITOR = "lr-"  # and the name of an optimizer, as Lightning's LearningRateMonitor logs it

_OURS = "geolora/"
# Their names in runs that were made before there were groups.
_OLDER = {
    "rank/mean": MEAN_RANK,
    "adapter_params": ADAPTER_PARAMS,
    "orthonormality_defect": ORTHONORMALITY_DEFECT,
    "skipped_steps": SKIPPED_STEPS,
    "rollbacks": ROLLBACKS,
    "truncation_error": TRUNCATION_ERROR,
    "energy_kept": ENERGY_KEPT,
    "adaptation_time": ADAPTATION_TIME,
}
_OF_LIGHTNING = ("epoch", "step", "hp_metric")


def is_rank(metric: str) -> bool:
    """Whether a metric is the rank of an adapter."""
    return metric.startswith(RANK)


def is_of_the_run(metric: str) -> bool:
    """Whether a metric is one that the callback logs, and not the module."""
    return metric.startswith(_OURS) or is_rank(metric)


def is_score(metric: str) -> bool:
    """Whether a metric is one of the module: a loss, a score, or whatever else it logs."""
    return not (is_of_the_run(metric) or metric in _OF_LIGHTNING or metric.startswith(LR_MONITOR))


def rank_of(adapter: str) -> str:
    """The metric that is the rank of an adapter.

    Args:
        adapter: Its name without the beginning that all have in common.

    Example:
        >>> rank_of("blocks.0.fc")
        'rank/blocks.0.fc'
    """
    return RANK + adapter


def name_today(metric: str) -> str:
    """The name of a metric in a run that was made before these names had groups.

    Example:
        >>> name_today("adapter_params"), name_today("val_loss")
        ('geolora/adapter_params', 'val_loss')
    """
    return _OLDER.get(metric, metric)
