"""How `ft.attention` meets a sharded sequence: which tiles it computes, how keys and values come to queries."""
