"""Flags of a quiet trainer."""

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


FLAGS = [f"--trainer.{name}={str(value).lower()}" for name, value in QUIET.items()]
