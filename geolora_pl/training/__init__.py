"""The optimizer's step and the retraction after it, in plain torch."""
