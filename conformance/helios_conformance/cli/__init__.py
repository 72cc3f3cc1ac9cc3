"""Commands of the suite. ``helios`` finds them by the entry points ``helios.commands``; none needs torch for its help."""
