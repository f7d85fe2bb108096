"""Support tools that require a setup.py; the package is configured in pyproject.toml."""

from setuptools import setup

setup()
