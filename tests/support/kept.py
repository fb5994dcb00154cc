"""A logger that keeps what it is given."""

from lightning.pytorch.loggers import Logger


class Keeps(Logger):
    """A logger of somebody else, who knows of no pictures."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    name, version = "keeps", 0

    def log_metrics(self, metrics, step=None):
        self.seen.update(dict.fromkeys(metrics, step))

    def log_hyperparams(self, *args, **kwargs):
        pass
