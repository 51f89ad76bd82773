"""Tools for working on the repository; not installed with the package."""
