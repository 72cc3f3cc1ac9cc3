"""Commands of the suite: ``helios`` finds them by the entry points ``helios.commands``. Their help needs no torch."""
