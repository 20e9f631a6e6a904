"""The Dynamo frontend: torch.compile(model, backend=fx_approx.backend(policy))."""
