"""The user's folder, and `align` in it."""

from tests.workplace import align, workplace  # noqa: F401
