"""`neftune-hf compare`: did NEFTune help? Runs, metrics, intervals and the report."""
