"""The size of a tiny ViT of timm, and its images."""

SIZE = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2}
OVERLAY = {"input_size": (1, 16, 16), "mean": (0.4,), "std": (0.3,)}
