"""Settings of a quiet trainer and of a short run."""

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
LIMITS = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "log_every_n_steps": 1, **QUIET}


FLAGS = [f"--trainer.{name}={str(value).lower()}" for name, value in QUIET.items()]
