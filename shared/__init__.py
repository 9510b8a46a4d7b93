"""What primary and secondary have in common: errors, options, the session protocol, the view of the map."""
