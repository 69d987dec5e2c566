"""The place of fused dynamic-sampling kernels; empty yet, the operator runs as standard ops everywhere."""
