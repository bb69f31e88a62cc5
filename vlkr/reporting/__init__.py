"""Tables, figures, statistics and report pages. Imports no torch."""
