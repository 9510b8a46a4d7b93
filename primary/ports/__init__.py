"""The primary's side of ports whose devices it keeps: one file a transport."""
