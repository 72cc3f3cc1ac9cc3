"""The cases as tests: ``pytest --pyargs helios_conformance --backend NAME``."""
