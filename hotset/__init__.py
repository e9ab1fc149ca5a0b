"""hotset: cluster-wide weight residency for Mixture-of-Experts models.

The folders `policies`, `transport`, `blocks`, `actors`, `dashboards` and `cluster` stand at the
repository's root; here they are symlinks, so that one import name works from a checkout, from a
wheel and from a Ray job's working directory.
"""

from pathlib import Path

__version__ = "0.1.0"

if not (Path(__file__).parent / "policies" / "types.py").exists():
    # Links are broken in zip archives and on file systems without symlinks.
    __path__.append(str(Path(__file__).parent.parent))
