"""Policies from files: loading and checking them, their options, loading them again when they change."""
