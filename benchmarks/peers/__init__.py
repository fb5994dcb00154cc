"""How well this package learns beside LoRA, AdaLoRA, DoRA, full fine-tuning and other ways to descend."""
