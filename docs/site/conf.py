"""The documentation as a site: the pages of the repository as they are, and the API from the docstrings."""

from typing import Any

from sphinx.application import Sphinx

import geolora_pl

project = "geolora_pl"
version = release = geolora_pl.__version__
html_title = f"{project} {release}"
html_theme = "furo"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]

# The source folder is the root of the repository, so that the links of its pages lead where they do there.
root_doc = "docs/site/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md", "docs/**.md"]
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
nitpicky = True  # a reference that leads nowhere is a warning, and the site is built with warnings as errors
# The types of other libraries, which have pages of their own, and type variables; a name of ours is one of these.
nitpick_ignore_regex = [("py:.*", r"(?!geolora_pl|[A-Za-z]*(Task|DataModule|LoRA)).*")]


def _resolve(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Lead a reference that is not found to the one object of that name: by its public path, from wherever it is."""
    if node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    name = node["reftarget"].rpartition(".")[2]
    found = [path for path, what in domain.objects.items() if path.rpartition(".")[2] == name and not what.aliased]
    if len(found) != 1:
        return None
    kind = domain.objects[found[0]].objtype
    role = {"function": "func", "method": "meth"}.get(kind, kind)
    return domain.resolve_xref(env, node["refdoc"], app.builder, role, found[0], node, content)


def setup(app: Sphinx) -> None:
    """Register the handler of references."""
    app.connect("missing-reference", _resolve)
