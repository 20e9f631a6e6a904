"""The savings report: what each layer saves, in operations and memory, and why the others were left exact."""
