"""Testing machines and policies without KVM."""

from pagegate._core import Fake, Reply, Step

__all__ = ["Fake", "Reply", "Step"]
