"""Policies from files, for programs: ``script.load(path)`` is what ``pagegate run -p`` does."""

from pagegate.loading.policy_file import load

__all__ = ["load"]
