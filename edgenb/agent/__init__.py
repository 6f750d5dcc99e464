"""The agent on a device: takes signed updates, proves them, serves from two slots. Written by hand: dense mechanism reads better as plain Python."""
