"""The commands of a task, from its fit to its export."""

import json
from pathlib import Path

from flags import FLAGS, LIMITS, QUIET

from geolora_pl.cli.dispatch import main


def from_fit_to_export(task, model, source, file, *more):
    """Fit, test, resume, predict and export in the working folder.

    Returns:
        The checkpoint of the first fit, and the first row of the predictions. The merged model is in the folder merged.
    """
    run = [f"--model={task}", f"--model.model_name={model}", f"--data={source}", *FLAGS, *more,
           f"--data.train_file={file}", f"--data.test_file={file}", "--data.cache_dir=cache",
           "--data.num_workers=0", "--trainer.logger=false", "--trainer.default_root_dir=run"]  # fmt: skip
    limits = [f"--trainer.{name}={value}" for name, value in LIMITS.items() if name not in QUIET]
    main(["fit", *run, *limits, "--test_after_fit=true"])
    (last,) = Path("run").rglob("*.ckpt")
    main(["fit", *run, *limits, "--trainer.max_epochs=2", f"--ckpt_path={last}"])
    main(["predict", *run, f"--ckpt_path={last}", "--output=p.jsonl"])
    main(["export", f"--ckpt_path={last}", "--format=merged", "--output=merged"])
    return last, json.loads(Path("p.jsonl").read_text().splitlines()[0])
