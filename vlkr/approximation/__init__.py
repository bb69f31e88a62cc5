"""How well adapters follow matrices of known spectra: closed forms, training, measures."""
