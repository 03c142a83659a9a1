"""The wing of `ft.remat`: what is stored by which policy, regions that compute again, and the wrapper."""
