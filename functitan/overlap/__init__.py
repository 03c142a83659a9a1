"""The wing of `ft.async_tp`: rings that run beside products, their messages, and the wrapper."""
