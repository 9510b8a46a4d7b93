"""The processes that see the memory: attaching, following the map, allocating."""
