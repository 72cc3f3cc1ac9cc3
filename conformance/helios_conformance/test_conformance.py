"""Where pytest finds the cases: ``pytest --pyargs helios_conformance --backend NAME``.

The file is empty: ``pytest_cases`` puts the cases of the run in its place, with the ids of ``helios cases list``.
"""
