"""What top-1 hides: which predictions changed, which class paid, how sure the model is, what corrupted images do to it, where it looks."""

from edgecnn.trust.examine import examine, warnings

__all__ = ["examine", "warnings"]
