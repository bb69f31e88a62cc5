"""Which weight updates adapters can make, and which ones runs have made."""
