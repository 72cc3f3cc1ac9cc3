"""Judge any installed Helios backend, with evidence that a third party can check again without the device.

``helios certify --backend NAME`` runs the suite, ``helios verify DIR`` judges its bundle of evidence anew.
"""

FORMAT = 1
"""Raised when the bundle's form changes; a bundle is verified by the suite that made it."""
