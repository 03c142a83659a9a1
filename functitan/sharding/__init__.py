"""Names to mesh dims to plans to collectives: how a tensor with a pattern lives on a mesh."""
