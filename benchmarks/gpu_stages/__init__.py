"""The stages of gpu.py: what is measured. `ledger` has how a run of them goes."""
