"""The wing of `ft.attention`: tiles, masks, ways around a ring of ranks, and `ft.context_parallel`."""
