"""Let a torchvision wheel built for CUDA import beside a CPU build of torch.

Such a wheel cannot load its compiled operators, and then its own import fails with "operator torchvision::nms does
not exist". Installed as ``_mend_torchvision.py`` with a ``.pth`` file beside it (``make venv`` does both), this module
defines the two missing operators just before torchvision is first imported. Where the compiled library loads, it does
nothing. It is a part of the environment, and the package never imports it.

Run it once with the Python of a virtual environment: ``.venv/bin/python tools/mend_torchvision.py``.
"""

import importlib.util
import pathlib
import shutil
import sys
import sysconfig


def _define_missing_operators() -> None:
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    for library in pathlib.Path(spec.submodule_search_locations[0]).glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except (OSError, RuntimeError):  # built against another torch
            continue
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_library"] = library  # the definitions live as long as this object


class _BeforeTorchvision:
    """A finder that finds no module, but defines the operators once, when torchvision is first imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            _define_missing_operators()


if __name__ == "__main__":
    site = pathlib.Path(sysconfig.get_path("purelib"))
    shutil.copyfile(__file__, site / "_mend_torchvision.py")
    (site / "_mend_torchvision.pth").write_text("import _mend_torchvision\n")
else:
    sys.meta_path.insert(0, _BeforeTorchvision())
