"""Export of adapted models to formats that need no vlkr."""
