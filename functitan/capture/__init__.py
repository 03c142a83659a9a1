"""Programs as graphs: tracing, passes over graphs, and lowering to what runs."""
