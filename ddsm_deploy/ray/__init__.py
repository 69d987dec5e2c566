"""`ddsm segment --engine ray`: batches through Ray Data, in worker processes on one machine or many."""
