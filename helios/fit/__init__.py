"""What a size needs and what a device gives: memory, arithmetic, and predictions made of both. Nothing runs here.

``host`` reads this machine, ``devices`` the table of accelerators, ``costs`` counts graphs, ``estimate`` joins them.
"""
