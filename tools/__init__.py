"""Command lines over the package. A package itself, so that tests can import them as `tools.NAME`."""
