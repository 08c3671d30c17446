"""Modules that compute in microscaling formats."""
