"""The wing of `ft.float8`: recipes, quantized values, their arithmetic, and the wrapper."""
