"""What a row is: segments, the queries that stand in it, windows, blocks. Nothing here knows a device."""
